"""cluster: Stats -> Clusters."""

from __future__ import annotations

from contextlib import ExitStack

from moeprune import places, tracking
from moeprune.checkpoint.loading import Checkpoint
from moeprune.clustering import PUBLISHED, make_clusters
from moeprune.clusters import Clusters
from moeprune.evaluation import figures
from moeprune.statistics import Stats


def cluster(
    stats: str,
    out: str,
    *,
    similarity: str = "outputs",
    algorithm: str = "ward",
    clusters_per_layer: str | int = PUBLISHED,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Clusters:
    """Cluster the experts of each layer and put the Clusters at `out`. See `clustering.make_clusters`.

    Args:
        model: read where the similarity is that of parameters; not touched otherwise.
    """
    params = {"similarity": similarity, "algorithm": algorithm, "clusters_per_layer": clusters_per_layer}
    with ExitStack() as stack:
        run = stack.enter_context(tracking.step("cluster", params))
        path = stack.enter_context(places.output(out))
        source = None
        if model and similarity != "outputs":
            directory, weights = stack.enter_context(places.streamed_model(model))
            source = Checkpoint(directory, trust_remote_code, weights)
        clusters = make_clusters(
            Stats.load(stack.enter_context(places.local_file(stats))),
            similarity=similarity,
            algorithm=algorithm,
            clusters_per_layer=clusters_per_layer,
            model=source,
        )
        clusters.save(path)
        run.metrics({"clusters_per_layer_used": clusters.mean_count})
        run.figure(figures.expert_similarity(similarity_of(clusters)), "expert_similarity")
        return clusters


def similarity_of(clusters: Clusters) -> figures.Similarity:
    """What the figure of similarity shows: per layer, the cosines and the clusters over all data."""
    return {name: (layer.similarity_EE, layer.overall_E) for name, layer in clusters.layers.items()}
