"""What the views of a Plan say in words: numbers, ranges of experts, what becomes of an expert, how close it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from moeprune import layer_names
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan

_PLAIN = 1e5  # numbers from here on are written with an exponent
_TINY = 1e-3


class Fate(StrEnum):
    """What becomes of an expert."""

    STAYS = "stays"
    MERGED = "merged"
    CONSTANT = "constant"
    GOES = "goes"


@dataclass(frozen=True)
class Border:
    """Where a layer's decision was closest.

    Attributes:
        lowest_kept, highest_dropped: experts.
        margin: how much less the second scored than the first, as a fraction of the larger of the two; below 0 where
            something else than the scores decided.
    """

    lowest_kept: int
    highest_dropped: int
    margin: float


def fates(layer: LayerPlan) -> list[Fate]:
    """Of each expert of a layer."""
    found = [Fate.GOES] * layer.experts
    for experts, fate in ((layer.keep, Fate.STAYS), (layer.merged, Fate.MERGED), (layer.constant, Fate.CONSTANT)):
        for expert in experts:
            found[expert] = fate
    return found


def border(layer: LayerPlan) -> Border | None:
    """None where the method had no scores, or where all or none of the experts stay."""
    if layer.scores is None or not layer.keep or not layer.drop:
        return None
    lowest = min(layer.keep, key=layer.scores.__getitem__)
    highest = max(layer.drop, key=layer.scores.__getitem__)
    low, high = layer.scores[lowest], layer.scores[highest]
    return Border(lowest, highest, (low - high) / (max(abs(low), abs(high)) or 1.0))


def ranges(experts: Iterable[int]) -> str:
    """Ascending numbers with runs drawn together: `0-3, 7, 9-10`."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def number(value: float) -> str:
    """Three digits that count, in seven characters at most (eight below zero)."""
    if not math.isfinite(value):
        return str(value)
    if value and not _TINY <= abs(value) < _PLAIN:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def find_layer(plan: Plan, given: str) -> str:
    """The full name of a layer that a person may call by its number. Raises InputError where there is none."""
    short = dict(zip(layer_names.labels(list(plan.layers)), plan.layers, strict=True))
    if given in plan.layers:
        return given
    if given not in short:
        raise InputError(f"the plan has no layer {given!r}; its layers: {', '.join(short)}")
    return short[given]


def sparsity(plan: Plan) -> str:
    """Which weights become zero; empty where none do."""
    if plan.sparsity is None:
        return ""
    zeros, colon, of = plan.sparsity.pattern.partition(":")
    share = f"{zeros} of every {of} weights" if colon else f"{float(zeros):.0%} of each output row's weights"
    return f"{share} inside the experts that stay become zero, the lowest by {plan.sparsity.score}"


def recovery(plan: Plan) -> str:
    """What is fitted after the cut; empty where nothing is."""
    if plan.recovery is None:
        return ""
    chosen = ", ".join(f"{name}={value}" for name, value in plan.recovery.model_dump().items())
    return f"what stays is fitted, after the cut, to what the original puts out ({chosen})"


def how_it_was_made(plan: Plan) -> str:
    """Method, ratio and options, and the budget that the ratio follows from."""
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items())
    asked = f" ({plan.budget})" if plan.budget else ""
    return f"{plan.method}, ratio {plan.ratio:.4g}{asked}" + (f"; {options}" if options else "")


def shortened(listed: str, most: int | None) -> str:
    """A list of ranges, ended with an ellipsis where it has more characters than that."""
    if most is None or len(listed) <= most:
        return listed
    return listed[:most].rpartition(",")[0] + ", ..."
