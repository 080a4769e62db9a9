"""What can be known to be wrong with a run before it starts anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeprune import places
from moeprune.builtin import corpus
from moeprune.errors import InputError
from moeprune.methods import check_ratio, check_room, find, parse_options

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def evaluation_texts(given: str, data: str) -> list[str]:
    """The held-out texts to measure on, the pruned-for domain first.

    Raises:
        InputError: none were given, and those at hand are not of the domain.
    """
    if given:
        return [address.strip() for address in given.split(",") if address.strip()]
    held_out = [f"builtin://{domain}/held-out" for domain in corpus.DOMAINS]
    of_domain = f"{data}/held-out"
    if of_domain not in held_out:
        raise InputError(
            f"held-out text is needed to measure what pruning for {data} costs: name it with --evaluation-data, that "
            "of the same domain first, others after it, separated by commas"
        )
    return [of_domain, *(text for text in held_out if text != of_domain)]


def check_run(arguments: dict[str, Any]) -> None:
    """Check the arguments of the pipeline, and what lies at addresses on this machine. Raises InputError."""
    method = find(arguments["method"])
    check_ratio(arguments["ratio"])
    parse_options(method, arguments["method_options"])
    for baseline in arguments["baselines"]:
        find(baseline)
    if not _HUB_ID.fullmatch(arguments["model"]) or Path(arguments["model"]).exists():
        _check_model_here(arguments)


def _check_model_here(arguments: dict[str, Any]) -> None:
    if places.is_remote(arguments["model"]):
        return
    from moeprune.checkpoint.loading import Checkpoint
    from moeprune.texts import read_blocks, short_name

    with places.local_model(arguments["model"]) as directory:
        checkpoint = Checkpoint(directory, arguments["trust_remote_code"])
        top_k = getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None)
        for name, layer in checkpoint.layout.layers.items():
            if top_k:
                check_room(arguments["ratio"], name, layer.experts, top_k)
        tokenizer = checkpoint.tokenizer()
    names = [short_name(text) for text in arguments["evaluation_data"]]
    if len(set(names)) < len(names):
        raise InputError(f"two texts to measure on have the same name ({', '.join(names)}); rename a file")
    for address in [*arguments["data"].split(","), *arguments["evaluation_data"]]:
        source = address.strip()
        if not places.is_remote(source) and not (_HUB_ID.fullmatch(source) and not Path(source).suffix):
            read_blocks(
                source,
                tokenizer,
                block_tokens=arguments["block_tokens"],
                max_blocks=1,
                text_field=arguments["text_field"],
            )
