"""hc-smoe: cluster the experts of a layer by their mean outputs, and merge each cluster into one expert.

HC-SMoE (arXiv 2410.08589, section 3). Agglomerative clustering, so that a cluster's experts are alike whatever their
order; average linkage, which the paper found best. A cluster becomes the mean of its experts' weights, each weighted
by how many tokens choose it, and takes the place of the one chosen most.

An expert's mean output is that of calibration's probes: every expert on the same inputs, chosen for them or not. The
paper lets every expert run on every token; here the inputs are the means of whole sequences, which costs nothing.

The paper's router keeps a row for every expert, and several rows lead to one merged expert. A checkpoint of fewer
experts has fewer rows. By default the merged expert answers to the row of its most used expert, which goes on finding
that one's tokens. The mean of its experts' rows (`router: merged`) lies between the directions that those answer to,
and is long along none of them; on the embedded model it was never better.

Where the router chooses among groups of experts first, clusters stay within a group and are as many in each.

Axes: E experts of the layer, N of one of the router's groups, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from moeprune.methods.base import Decision, Evidence, Method, Options, count_of
from moeprune.plan import LayerPlan
from moeprune.statistics import LayerStats

Array = np.ndarray[Any, Any]


class HcSmoeOptions(Options):
    linkage: Literal["average", "complete", "single", "ward"] = Field(
        "average", description="how far two clusters are from each other: by the mean, largest or smallest distance"
    )
    router: Literal["own", "merged"] = Field(
        "own", description="a merged expert's router row: its most used expert's own, or the mean of its experts'"
    )


def decide(evidence: Evidence, ratio: float, options: HcSmoeOptions) -> Decision:
    layers = {}
    for name, layer in evidence.stats.layers.items():
        output_EH = layer.sum("probe_output").sum(0).numpy() / evidence.stats.blocks
        use_E = layer.count("routed_tokens").numpy()
        merged = {}
        for cluster in _clusters(output_EH, ratio, layer, options.linkage):
            most_used = max(cluster, key=lambda expert: (use_E[expert], -expert))
            merged[most_used] = dict(zip(cluster, _shares(use_E[cluster]), strict=True))
        layers[name] = LayerPlan(
            experts=layer.experts,
            top_k=layer.top_k,
            keep=sorted(merged),
            merged={expert: of for expert, of in sorted(merged.items()) if len(of) > 1},
            merged_router=options.router == "merged",
            scores=use_E.tolist(),
        )
    return Decision(layers, score="calibration tokens that chose it")


def _clusters(output_EH: Array, ratio: float, layer: LayerStats, linkage: str) -> Iterator[list[int]]:
    """The experts of each cluster, ascending; as many clusters in each of the router's groups."""
    from sklearn.cluster import AgglomerativeClustering  # takes seconds, which no other step need spend

    groups = layer.groups.count
    size = layer.experts // groups
    clusters = size - count_of(ratio, layer.experts, layer.groups) // groups
    for first in range(0, layer.experts, size):
        expert_N = np.arange(first, first + size)
        label_N = np.arange(size)
        if clusters < size:
            label_N = AgglomerativeClustering(clusters, linkage=linkage).fit_predict(output_EH[expert_N])
        yield from (expert_N[label_N == label].tolist() for label in range(clusters))


def _shares(use_N: Array) -> list[float]:
    """What each expert weighs in the mean. Where none of them is used, they weigh the same."""
    return (use_N / use_N.sum() if use_N.sum() else np.full(len(use_N), 1 / len(use_N))).tolist()


METHOD = Method(
    "hc-smoe",
    "cluster the experts of each layer by their outputs and merge each cluster (HC-SMoE, arXiv 2410.08589)",
    decide,
    HcSmoeOptions,
    statistics=frozenset({"probe_output", "routed_tokens"}),
)
