"""fuse: keep the experts that can best stand in for all, and make each of itself and of those that it stands in for.

Which stay is a k-medoids problem: every expert goes to the one that stays which, on the tokens that chose it, puts out
what is nearest to its own output, `d_ij = sum over those tokens of g_i^2 |f_i - f_j|^2`; the sum over all experts is to
be small. Then recovery makes one expert of each group, router rows and all, and fits what the layer puts out.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep, keep_any
from moeprune.methods.medoids import choose, nearest
from moeprune.plan import LayerPlan, Recovery
from moeprune.statistics import LayerStats


class FuseOptions(Options):
    recover: bool = Field(True, description="whether recovery fits the result; without it, experts are only dropped")


def decide(evidence: Evidence, ratio: float, options: FuseOptions) -> Decision:
    layers = {name: _fused(layer, ratio) for name, layer in evidence.stats.layers.items()}
    return Decision(
        layers,
        score="what is lost, in squares of output, where its nearest among those that stay answers for it",
        recovery=Recovery() if options.recover else None,
    )


def foresee(layers: Mapping[str, LayerStats], ratio: float, options: FuseOptions) -> Decision:
    return Decision(keep_any(layers, ratio), recovery=Recovery() if options.recover else None)


def _fused(layer: LayerStats, ratio: float) -> LayerPlan:
    loss_EE = layer.sum("stand_in").numpy().copy()
    alone_E = loss_EE.diagonal().copy()
    np.fill_diagonal(loss_EE, 0.0)
    size = layer.experts // layer.groups.count
    stay: list[int] = []
    for first in range(0, layer.experts, size):  # of each of the router's groups the same number
        group = slice(first, first + size)
        count = size - count_of(ratio, layer.experts, layer.groups) // layer.groups.count
        stay += [first + place for place in choose(loss_EE[group, group], count)]
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
