"""c-prune: cluster the experts of each layer, then those left of all layers, and keep the clusters' representatives.

C-Prune (arXiv 2504.07807). The first stage takes the same number from each layer; the second ranks what is left across
layers, so that layers end with different numbers. General or for a domain: that is a matter of the calibration data.

How many of a cluster represent it is the published rule. Who they are is a choice: those nearest to the cluster's
centre, as published, or those that the calibration data use most, so that a domain keeps its own among experts that
resemble each other. Ties between votes go against the less used expert, and a layer keeps at least as many as run for
a token.

Axes: G groups that vote, E experts of a layer, N experts left in all layers, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
from pydantic import Field

from moeprune.clustering import assign, mean_outputs
from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep, keep_last
from moeprune.methods.voting import ascending, count_votes, fewest_votes_across_layers
from moeprune.statistics import LayerStats

_LARGEST_SHARE_OF_A_LAYER = 0.9  # no layer loses more

_Left = dict[str, list[int]]  # the experts that stay, by layer


class CPruneOptions(Options):
    representative: Literal["most-used", "nearest"] = Field(
        "most-used", description="who stands for a cluster: its most used experts, or those nearest to its centre"
    )
    layerwise_share: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the removed experts that the layer-wise stage takes; 1: every layer loses the same",
    )
    global_clusters: int = Field(12, ge=2, description="clusters of the global stage, over the experts of all layers")


def decide(evidence: Evidence, ratio: float, options: CPruneOptions) -> Decision:
    left = _prune_layers(evidence, ratio * options.layerwise_share, options)
    if options.layerwise_share < 1:  # at 1, uniform, even where the layers' whole numbers leave one expert too many
        total = sum(layer.experts for layer in evidence.stats.layers.values())
        gone = total - sum(map(len, left.values()))
        left = _prune_globally(evidence, left, count_of(ratio, total) - gone, options)
    return Decision({name: keep(experts, evidence.stats.layers[name]) for name, experts in left.items()})


def _prune_layers(evidence: Evidence, rate: float, options: CPruneOptions) -> _Left:
    """The first stage: each layer for itself."""
    assert evidence.clusters is not None
    left = {}
    for name, layer in evidence.stats.layers.items():
        made, use_E = evidence.clusters.layers[name], _use(layer)
        rank_GE = _rank(options, made.distance_GE, use_E)
        votes_E = count_votes(made.label_GE, rank_GE, rate, layer.experts)
        left[name] = keep_last(ascending(votes_E, use_E), rate, layer).keep
    return left


def _prune_globally(evidence: Evidence, stay: _Left, count: int, options: CPruneOptions) -> _Left:
    """The second stage: remove `count` more from the list of all that are left."""
    if count == 0:
        return stay
    assert evidence.clusters is not None
    stats = evidence.stats
    left = [(name, expert) for name, experts in stay.items() for expert in experts]
    use_N = np.concatenate([_use(stats.layers[name])[experts] for name, experts in stay.items()])
    point_GNH = np.concatenate([mean_outputs(stats, name)[:, experts] for name, experts in stay.items()], axis=1)
    clusters = min(options.global_clusters, len(left))
    assigned = [assign(point_NH, clusters, evidence.clusters.algorithm) for point_NH in point_GNH]
    label_GN, distance_GN = (np.stack(part) for part in zip(*assigned, strict=True))
    experts_per_layer = max(layer.experts for layer in stats.layers.values())
    votes_N = count_votes(label_GN, _rank(options, distance_GN, use_N), count / len(left), experts_per_layer)
    room = {name: _most_to_lose(layer) - (layer.experts - len(stay[name])) for name, layer in stats.layers.items()}
    groups = next(iter(stats.layers.values())).groups
    gone = fewest_votes_across_layers(votes_N, [name for name, _ in left], room, count, use_N, groups.count)
    lost = Counter(left[place][0] for place in gone)
    order: dict[str, list[int]] = {name: [] for name in stay}
    for place in ascending(votes_N, use_N):
        name, expert = left[place]
        order[name].append(expert)
    removed = {name: set(groups.take(order[name], lost[name], stats.layers[name].experts)) for name in stay}
    return {name: [expert for expert in experts if expert not in removed[name]] for name, experts in stay.items()}


def _use(layer: LayerStats) -> np.ndarray[Any, Any]:
    return layer.count("routed_tokens").numpy()


def _rank(
    options: CPruneOptions, distance_GN: np.ndarray[Any, Any], use_N: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """What the members of a cluster are ordered by, the first to represent it lowest."""
    return distance_GN if options.representative == "nearest" else np.broadcast_to(-use_N, distance_GN.shape)


def _most_to_lose(layer: LayerStats) -> int:
    most = min(int(_LARGEST_SHARE_OF_A_LAYER * layer.experts), layer.experts - layer.groups.least_kept(layer.top_k))
    return layer.groups.whole(most)


METHOD = Method(
    "c-prune",
    "keep the representatives of clusters of experts, layer by layer and then across layers (arXiv 2504.07807)",
    decide,
    CPruneOptions,
    uses_clusters=True,
    statistics=frozenset({"routed_tokens", "probe_output"}),
)
