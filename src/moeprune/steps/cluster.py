"""cluster: Stats -> Clusters."""

from __future__ import annotations

from moeprune import places, tracking
from moeprune.clusters import Clusters, make_clusters
from moeprune.evaluation import figures
from moeprune.statistics import Stats


def cluster(stats: str, out: str, *, algorithm: str = "ward", clusters_per_layer: int = 0) -> Clusters:
    """Cluster the experts of each layer and put the Clusters at `out`. See `clusters.make_clusters`."""
    params = {"algorithm": algorithm, "clusters_per_layer": clusters_per_layer}
    with (
        tracking.step("cluster", params) as run,
        places.output(out) as path,
        places.local_file(stats) as stats_path,
    ):
        clusters = make_clusters(Stats.load(stats_path), algorithm=algorithm, clusters_per_layer=clusters_per_layer)
        clusters.save(path)
        run.metrics({"clusters_per_layer_used": clusters.clusters_per_layer})
        run.figure(figures.expert_similarity(similarity_of(clusters)), "expert_similarity")
        return clusters


def similarity_of(clusters: Clusters) -> figures.Similarity:
    """What the figure of similarity shows: per layer, the cosines and the clusters over all data."""
    return {name: (layer.similarity_EE, layer.overall_E) for name, layer in clusters.layers.items()}
