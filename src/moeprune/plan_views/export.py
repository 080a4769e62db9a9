"""The list of experts that go, as other programs read it.

Such a list says which experts of the original are to be left out, and nothing else: a plan that also changes weights
(merged or condensed experts, mean outputs in their place, zeros, recovery) is no such list, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from moeprune import layer_names
from moeprune.errors import InputError
from moeprune.plan import Plan

_HAVE_NONE = {
    "llama.cpp": "llama.cpp reads no list of experts; apply the plan and convert the checkpoint with its "
    "convert_hf_to_gguf.py, which knows one number of experts for all layers",
    "sglang": "SGLang reads no list of experts; apply the plan and serve the checkpoint",
}


def export(plan: Plan, form: str) -> str:
    """The plan's dropped experts in one of `FORMATS`.

    Raises:
        InputError: no such format, or a plan that a list of experts cannot stand for.
    """
    if form in _HAVE_NONE:
        raise InputError(_HAVE_NONE[form])
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    if more := _more_than_a_list(plan):
        raise InputError(f"the plan {more}, which a list of experts cannot say; apply it and serve the checkpoint")
    return FORMATS[form](plan)


def _more_than_a_list(plan: Plan) -> str:
    layers = plan.layers.values()
    found = {
        "merges experts": any(layer.merged for layer in layers),
        "puts mean outputs in the place of experts": any(layer.constant for layer in layers),
        "condenses layers": bool(plan.condensed),
        "makes weights zero": plan.sparsity is not None,
        "fits the experts that stay": plan.recovery is not None,
    }
    return " and ".join(what for what, does in found.items() if does)


def _plain(plan: Plan) -> str:
    """Layer number -> the experts that go."""
    rows = [f" {json.dumps(number)}: {dropped}" for number, dropped in _dropped(plan)]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _vllm(plan: Plan) -> str:
    """The profile of vLLM's pull requests 37824 (`--riy-expert-profile`) and 42613 (`--moe-pruned-experts-profile`).

    Raises:
        InputError: the layers are not told apart by a number.
    """
    pairs = [[_whole(number), expert] for number, dropped in _dropped(plan) for expert in dropped]
    return json.dumps({"version": 1, "pruned_experts": pairs}) + "\n"


def _dropped(plan: Plan) -> list[tuple[str, list[int]]]:
    numbers = layer_names.labels(list(plan.layers))
    return [(number, layer.drop) for number, layer in zip(numbers, plan.layers.values(), strict=True)]


def _whole(number: str) -> int:
    if not number.isdecimal():
        raise InputError(f"vLLM wants the layers' numbers, and {number} has none that tells it from the others")
    return int(number)


FORMATS: dict[str, Callable[[Plan], str]] = {"json": _plain, "vllm": _vllm}
