"""fuse: keep the experts that can best stand in for all, and make each of itself and of those that it stands in for.

Which stay is a k-medoids problem: every expert goes to the one that stays which, on the tokens that chose it, puts out
what is nearest to its own output, `d_ij = sum over those tokens of g_i^2 |f_i - f_j|^2`; the sum over all experts is to
be small. Then recovery makes one expert of each group, router rows and all, and fits what the layer puts out.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep, keep_any
from moeprune.methods.medoids import choose, nearest
from moeprune.plan import LayerPlan, Recovery
from moeprune.statistics import LayerStats


class FuseOptions(Options):
    recover: bool = Field(True, description="whether recovery fits the result; without it, experts are only dropped")


def decide(evidence: Evidence, ratio: float, options: FuseOptions) -> Decision:
    layers = evidence.stats.layers
    return decided({name: fused(layer, kept_of(layer, ratio)) for name, layer in layers.items()}, options)


def decided(layers: dict[str, LayerPlan], options: FuseOptions) -> Decision:
    return Decision(
        layers,
        score="what is lost, in squares of output, where its nearest among those that stay answers for it",
        recovery=Recovery() if options.recover else None,
    )


def foresee(layers: Mapping[str, LayerStats], ratio: float, options: FuseOptions) -> Decision:
    return Decision(keep_any(layers, ratio), recovery=Recovery() if options.recover else None)


def kept_of(layer: LayerStats, ratio: float) -> int:
    """How many experts of a layer stay where each layer loses a ratio."""
    return layer.experts - count_of(ratio, layer.experts, layer.groups)


def groups_of(layer: LayerStats) -> tuple[np.ndarray[Any, Any], list[slice]]:
    """What is lost where one expert answers for another, `[E, E]`, nothing on the diagonal, and the router's groups of
    them, of each of which the same number stays."""
    loss_EE = layer.sum("stand_in").numpy().copy()
    np.fill_diagonal(loss_EE, 0.0)
    size = layer.experts // layer.groups.count
    return loss_EE, [slice(first, first + size) for first in range(0, layer.experts, size)]


def fused(layer: LayerStats, count: int) -> LayerPlan:
    """A layer of so many experts, a multiple of the number of the router's groups."""
    loss_EE, groups = groups_of(layer)
    alone_E = layer.sum("stand_in").numpy().diagonal()
    stay = [group.start + place for group in groups for place in choose(loss_EE[group, group], count // len(groups))]
    answers_E = nearest(loss_EE, stay)
    stands_for: dict[int, list[int]] = {}
    for expert in range(layer.experts):
        if expert not in stay:
            stands_for.setdefault(int(answers_E[expert]), []).append(expert)
    lost_E = np.where(np.isin(range(layer.experts), stay), alone_E, loss_EE[range(layer.experts), answers_E])
    return keep(stay, layer).model_copy(update={"stands_for": stands_for, "scores": lost_E.tolist()})


METHOD = Method(
    "fuse",
    "make fewer experts of all: those that stay take in those that they can stand in for, and are fitted",
    decide,
    FuseOptions,
    statistics=frozenset({"stand_in"}),
    foresee=foresee,
)
