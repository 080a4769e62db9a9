"""What can be known to be wrong with a run before it starts anything."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from moeprune import places
from moeprune.budget import Budget, check_method, check_reachable
from moeprune.builtin import corpus
from moeprune.checkpoint.loading import Checkpoint
from moeprune.clustering import check_clustering
from moeprune.distillation.end_to_end.job import Training
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.objective import Objective
from moeprune.distillation.parts import parse_parts, parse_parts_of_a_layer
from moeprune.errors import InputError
from moeprune.methods import check_room, find, parse_options
from moeprune.sources import format_sources, mixture_name, parse_sources
from moeprune.statistics import LayerStats
from moeprune.steps.combine import combine
from moeprune.steps.machine import dtype_named, quieten
from moeprune.streaming.room import parse_bytes
from moeprune.texts import check_sequences, read_blocks

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
    check_values(arguments)
    model = arguments["model"]
    if not places.is_remote(model) and not _may_be_on_the_hub(model):
        _check_model_and_texts(arguments)


def check_values(arguments: dict[str, Any]) -> None:
    """Check the arguments of the pipeline alone, whatever lies at the addresses. Raises InputError."""
    method = find(arguments["method"])
    budget = _budget(arguments)
    parse_options(method, arguments["method_options"])
    for name in [arguments["method"], *arguments["baselines"]]:
        find(name)
        if budget.ratio is None:
            check_method(name)
    dtype_named(arguments["calibration_dtype"])
    if arguments["calibration_memory_limit"]:
        parse_bytes(arguments["calibration_memory_limit"])
    check_sequences(arguments["calibration_sequences"])
    check_clustering(arguments["cluster_similarity"], arguments["cluster_algorithm"], arguments["clusters_per_layer"])
    _check_distillation(arguments)
    names = [mixture_name(text) for text in arguments["evaluation_data"]]
    if len(set(names)) < len(names):
        raise InputError(f"two texts to measure on have the same name ({', '.join(names)}); rename a file")


def check_sweep(arguments: dict[str, Any]) -> None:
    """Check the arguments of the sweep, whatever lies at the addresses. Raises InputError."""
    for choice in combine(arguments["methods"], arguments["ratios"], arguments["method_options"]):
        of_one = {"method": choice.method, "ratio": choice.ratio, "method_options": choice.options}
        check_values(arguments | of_one | {"parameters_ratio": 0.0, "size": "", "baselines": []})


def _check_distillation(arguments: dict[str, Any]) -> None:
    """It comes late in a run, and what is asked of it is known now."""
    parts = arguments["distillation_parts"]
    if arguments.get("distillation_nodes"):
        training = dict(arguments["distillation_training"])
        if objective := training.pop("objective", ""):
            Objective.parse(objective)
        training.pop("work", None)  # says where, and not how
        Training.of(**training)
        if parts:
            parse_parts(parts)
        return
    asked = Objective.parse(arguments["distillation_objective"])
    Settings(asked, arguments["learning_rate"], arguments["distillation_epochs"])
    if parts:
        parse_parts_of_a_layer(parts)
    if arguments["distillation_memory_limit"]:
        parse_bytes(arguments["distillation_memory_limit"])


def _budget(arguments: dict[str, Any]) -> Budget:
    other = arguments["parameters_ratio"] or arguments["size"]
    return Budget.of(None if other else arguments["ratio"], arguments["parameters_ratio"], arguments["size"])


def _check_model_and_texts(arguments: dict[str, Any]) -> None:
    quieten()
    with places.local_model(arguments["model"]) as directory:
        checkpoint = Checkpoint(directory, arguments["trust_remote_code"])
        layout = checkpoint.layout
        top_k = getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None)
        if top_k:  # a model that calls it otherwise is checked where it is pruned
            groups, budget = layout.groups, _budget(arguments)
            layers = {name: LayerStats(layer.experts, top_k, groups=groups) for name, layer in layout.layers.items()}
            if budget.ratio is None:
                check_reachable(budget, layers, checkpoint)
            elif any(find(name).removes == "experts" for name in [arguments["method"], *arguments["baselines"]]):
                for name, layer in layers.items():
                    check_room(budget.ratio, name, layer.experts, top_k, groups)
        tokenizer = checkpoint.tokenizer()
    block_tokens, text_field = arguments["block_tokens"], arguments["text_field"]
    for mixture in [arguments["data"], *arguments["evaluation_data"]]:
        for source in parse_sources(mixture):
            is_file = PurePosixPath(source.address).suffix or not _may_be_on_the_hub(source.address)
            if is_file and not places.is_remote(source.address):
                alone = format_sources([source])
                read_blocks(alone, tokenizer, block_tokens=block_tokens, max_blocks=1, text_field=text_field)


def _may_be_on_the_hub(address: str) -> bool:
    return bool(_HUB_ID.fullmatch(address)) and not Path(address).exists()
