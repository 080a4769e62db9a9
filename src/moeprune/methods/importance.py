"""C-Prune's importance of an expert, comparable across layers (arXiv 2504.07807, after its two stages' idea).

An expert is worth its use times how poorly another of its cluster stands in for it, times how little the experts of its
layer resemble each other:

    importance(e) = use(e) * (1 - max over others o of its cluster of cos(e, o)) * (1 - homogeneity of the layer)

`use` is the gate weight that it gets, as a multiple of an even share of its layer's, so that layers are comparable.
Experts leave one after another, the least important first; what an expert was used for passes to the one that stands in
for it. So of a cluster the last to stay has the use of all of them, and nobody to stand in for it.

Axes: E experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprune.clusters import LayerClusters
from moeprune.methods.base import count_of
from moeprune.methods.voting import fewest_votes_across_layers
from moeprune.statistics import LayerStats


@dataclass(frozen=True)
class Farewell:
    """In which order a layer's experts leave, and how important each was when its turn came, `[E]`."""

    order: list[int]
    importance_E: np.ndarray[Any, Any]


def farewell(clusters: LayerClusters, layer: LayerStats) -> Farewell:
    """In which order the experts of a layer leave, until none is left."""
    gate_E = layer.sum("gate").numpy()
    use_E = gate_E / (gate_E.mean() or 1.0)
    cosine_EE = np.clip(clusters.similarity_EE, 0, 1)
    stands_in_EE = np.where(clusters.overall_E[:, None] == clusters.overall_E, cosine_EE, 0)
    np.fill_diagonal(stands_in_EE, 0)
    variety = 1 - homogeneity(clusters.similarity_EE)
    importance_E = np.full(layer.experts, np.inf)
    order: list[int] = []
    stays_E = np.ones(layer.experts, dtype=bool)
    for _ in range(layer.experts):
        now_E = np.where(stays_E, use_E * (1 - stands_in_EE.max(axis=1)) * variety, np.inf)
        leaves = int(now_E.argmin())
        heir = int(stands_in_EE[leaves].argmax())
        if stands_in_EE[leaves, heir] > 0:
            use_E[heir] += use_E[leaves]
        importance_E[leaves] = now_E[leaves]
        order.append(leaves)
        stays_E[leaves] = False
        stands_in_EE[:, leaves] = 0
    return Farewell(order, importance_E)


def homogeneity(similarity_EE: np.ndarray[Any, Any]) -> float:
    """The mean cosine of two different experts, at least 0; 0 for an expert alone."""
    experts = len(similarity_EE)
    if experts == 1:
        return 0.0
    return max(0.0, float((similarity_EE.sum() - np.trace(similarity_EE)) / (experts * (experts - 1))))


def share_out(
    farewells: Mapping[str, Farewell], layers: Mapping[str, LayerStats], room: dict[str, int], ratio: float
) -> Counter[str]:
    """How many experts each layer loses of a ratio of all: those whose importance is the lowest anywhere.

    Args:
        room: how many a layer may lose.
    """
    place = [(name, expert) for name, each in farewells.items() for expert in each.order]
    # Where the next one is less important than the one that must leave before it, it waits for that one's turn.
    price_N = np.concatenate([np.maximum.accumulate(each.importance_E[each.order]) for each in farewells.values()])
    lot = next(iter(layers.values())).groups.count
    gone = fewest_votes_across_layers(price_N, [name for name, _ in place], room, count_of(ratio, len(place)), lot=lot)
    return Counter(place[number][0] for number in gone)
