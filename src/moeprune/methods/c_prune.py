"""c-prune: cluster the experts of each layer, then those left of all layers, and keep the clusters' representatives.

C-Prune (arXiv 2504.07807). The first stage takes the same number from each layer; the second ranks what is left across
layers, so that layers end with different numbers. General or for a domain: that is a matter of the calibration data.

Beyond the published rule, ties between votes go against the less used expert, and a layer keeps as many as run for a
token.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from moeprune.clusters import Clusters, assign, embed
from moeprune.methods.base import Evidence, Keep, Method, Options, count_of, keep_all_but
from moeprune.methods.voting import count_votes, fewest_votes, fewest_votes_across_layers
from moeprune.statistics import Stats

_LARGEST_SHARE_OF_A_LAYER = 0.9  # no layer loses more


class CPruneOptions(Options):
    layerwise_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the removed experts that the layer-wise stage takes; 1: every layer loses the same",
    )
    global_clusters: int = Field(12, ge=2, description="clusters of the global stage, over the experts of all layers")


def decide(evidence: Evidence, ratio: float, options: CPruneOptions) -> Keep:
    stats, clusters = evidence.stats, evidence.clusters
    assert clusters is not None
    layerwise_rate = ratio * options.layerwise_share
    keep = {}
    for name, layer in stats.layers.items():
        in_layer = clusters.layers[name]
        votes = count_votes(in_layer.label_GE, in_layer.distance_GE, layerwise_rate, layer.experts)
        use = layer.count("routed_tokens").numpy()
        keep[name] = keep_all_but(fewest_votes(votes, count_of(layerwise_rate, layer.experts), use), layer.experts)

    total = sum(layer.experts for layer in stats.layers.values())
    gone = total - sum(map(len, keep.values()))
    return _prune_globally(stats, clusters, keep, count_of(ratio, total) - gone, options.global_clusters)


def _prune_globally(stats: Stats, made: Clusters, keep: Keep, count: int, clusters: int) -> Keep:
    """Remove `count` more experts from the list of all that are left."""
    if count == 0:
        return keep
    left = [(name, expert) for name, experts in keep.items() for expert in experts]
    points_GNH = np.concatenate(
        [embed(stats, name, made.embedding)[:, experts] for name, experts in keep.items()], axis=1
    )
    assigned = [assign(points_NH, min(clusters, len(left)), made.algorithm) for points_NH in points_GNH]
    label_GN, distance_GN = (np.stack(part) for part in zip(*assigned, strict=True))
    experts_per_layer = max(layer.experts for layer in stats.layers.values())
    votes = count_votes(label_GN, distance_GN, count / len(left), experts_per_layer)
    room = {
        name: min(int(_LARGEST_SHARE_OF_A_LAYER * layer.experts), layer.experts - layer.top_k)
        - (layer.experts - len(keep[name]))
        for name, layer in stats.layers.items()
    }
    use = np.array([stats.layers[name].count("routed_tokens")[expert].item() for name, expert in left])
    gone = {left[place] for place in fewest_votes_across_layers(votes, [name for name, _ in left], room, count, use)}
    return {name: [expert for expert in experts if (name, expert) not in gone] for name, experts in keep.items()}


METHOD = Method(
    "c-prune",
    "keep the representatives of clusters of experts, layer by layer and then across layers (arXiv 2504.07807)",
    decide,
    CPruneOptions,
    uses_clusters=True,
)
