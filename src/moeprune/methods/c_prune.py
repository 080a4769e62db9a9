"""c-prune: cluster the experts of each layer, and keep of each cluster what the others cannot stand in for.

C-Prune (arXiv 2504.07807). General or for a domain: that is a matter of the calibration data. Two selections:

`published`, as the authors' published results follow it. The first stage takes the same number from each layer; the
second clusters what is left of all layers by what it puts out, whatever the layers' own clusters were made of, and
ranks it, so that layers end with different numbers. How many of a cluster represent it is the published rule. Who they
are is a choice: those nearest to the cluster's centre, as published, or those that the calibration data use most, so
that a domain keeps its own among experts that resemble each other. Ties between votes go against the less used expert,
and a layer keeps at least as many as run for a token.

`importance`, the paper's idea as one number for the experts of all layers, and one budget (`methods.importance`).

Axes: G groups that vote, E experts of a layer, N experts left in all layers, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
from pydantic import Field

from moeprune.clustering import assign, mean_outputs
from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep, keep_all_but, keep_last
from moeprune.methods.importance import farewell, share_out
from moeprune.methods.voting import ascending, count_votes, fewest_votes_across_layers
from moeprune.statistics import LayerStats

_LARGEST_SHARE_OF_A_LAYER = 0.9  # no layer loses more, unless all must

_Left = dict[str, list[int]]  # the experts that stay, by layer
_Votes = dict[str, np.ndarray[Any, Any]]  # of each expert, by layer


class CPruneOptions(Options):
    selection: Literal["published", "importance"] = Field(
        "published",
        description="the rule of the authors' published selections, or one importance for the experts of all layers",
    )
    representative: Literal["most-used", "nearest"] = Field(
        "most-used",
        description="of `published`: who stands for a cluster, its most used experts or those nearest to its centre",
    )
    layerwise_share: float = Field(
        0.8,
        ge=0,
        le=1,
        description="of `published`: share of the removed experts that the layer-wise stage takes; 1: every layer "
        "loses the same",
    )
    global_clusters: int = Field(
        12, ge=2, description="of `published`: clusters of the global stage, over the experts of all layers"
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="of `importance`: all layers lose the same, or those lose most that have least of it"
    )


def decide(evidence: Evidence, ratio: float, options: CPruneOptions) -> Decision:
    if options.selection == "importance":
        return _by_importance(evidence, ratio, options)
    return _as_published(evidence, ratio, options)


def _by_importance(evidence: Evidence, ratio: float, options: CPruneOptions) -> Decision:
    assert evidence.clusters is not None
    stats = evidence.stats.layers
    farewells = {name: farewell(evidence.clusters.layers[name], layer) for name, layer in stats.items()}
    if options.allocation == "uniform":
        lost = {name: count_of(ratio, layer.experts, layer.groups) for name, layer in stats.items()}
    else:
        lost = share_out(farewells, stats, {name: _most_to_lose(layer, ratio) for name, layer in stats.items()}, ratio)
    return Decision(
        {
            name: keep(
                keep_all_but(layer.groups.take(farewells[name].order, lost[name], layer.experts), layer.experts), layer
            ).model_copy(update={"scores": farewells[name].importance_E.tolist()})
            for name, layer in stats.items()
        },
        score="use that no other expert of its cluster can take over, when its turn came, less in a homogeneous layer",
    )


def _as_published(evidence: Evidence, ratio: float, options: CPruneOptions) -> Decision:
    votes: _Votes = {}
    left = _prune_layers(evidence, ratio * options.layerwise_share, options, votes)
    if options.layerwise_share < 1:  # at 1, uniform, even where the layers' whole numbers leave one expert too many
        total = sum(layer.experts for layer in evidence.stats.layers.values())
        gone = total - sum(map(len, left.values()))
        left = _prune_globally(evidence, left, count_of(ratio, total) - gone, ratio, options, votes)
    return Decision(
        {
            name: keep(experts, evidence.stats.layers[name]).model_copy(update={"scores": votes[name].tolist()})
            for name, experts in left.items()
        },
        score="votes as a representative of its cluster, in the last stage that it reached",
    )


def _prune_layers(evidence: Evidence, rate: float, options: CPruneOptions, votes: _Votes) -> _Left:
    """The first stage: each layer for itself. Writes down the votes."""
    assert evidence.clusters is not None
    left = {}
    for name, layer in evidence.stats.layers.items():
        made, use_E = evidence.clusters.layers[name], _use(layer)
        rank_GE = _rank(options, made.distance_GE, use_E)
        votes_E = count_votes(made.label_GE, rank_GE, rate, layer.experts)
        left[name] = keep_last(ascending(votes_E, use_E), rate, layer).keep
        votes[name] = votes_E.astype(float)
    return left


def _prune_globally(
    evidence: Evidence, stay: _Left, count: int, ratio: float, options: CPruneOptions, votes: _Votes
) -> _Left:
    """The second stage: remove `count` more from the list of all that are left. Writes down their votes."""
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
    for (name, expert), number in zip(left, votes_N.tolist(), strict=True):
        votes[name][expert] = number
    room = {
        name: _most_to_lose(layer, ratio) - (layer.experts - len(stay[name])) for name, layer in stats.layers.items()
    }
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


def _most_to_lose(layer: LayerStats, ratio: float) -> int:
    most = max(int(_LARGEST_SHARE_OF_A_LAYER * layer.experts), count_of(ratio, layer.experts))
    return layer.groups.whole(min(most, layer.experts - layer.groups.least_kept(layer.top_k)))


METHOD = Method(
    "c-prune",
    "keep what represents clusters of experts, layer by layer and then across layers (arXiv 2504.07807)",
    decide,
    CPruneOptions,
    uses_clusters=True,
    statistics=frozenset({"routed_tokens", "gate", "probe_output"}),
)
