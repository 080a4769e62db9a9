"""From Stats, and where asked for the weights, to Clusters. The clustering itself is scikit-learn's.

Experts are points. By what they put out, an expert is its mean output on the calibration samples (C-Prune, section 3).
By their parameters, it is its weights, scaled to length 1: of these only the inner products are known
(`checkpoint.weight_similarity`), which is all that Euclidean distances take. So the points are those that have the same
inner products in as few dimensions as there are experts: classical scaling, and exact, so that Ward's linkage and the
centres mean what they would mean among the weights themselves.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.weight_similarity import cosines_of_weights
from moeprune.clusters import Clusters, LayerClusters
from moeprune.errors import InputError
from moeprune.statistics import Stats

Algorithm = Literal["ward", "average", "k-means"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
Similarity = Literal["outputs", "parameters", "both"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)
PUBLISHED, AUTO = "published", "auto"
_CLUSTERS_PER_EXPERT = 12 / 64  # the authors' setting for 64 experts, carried over to other numbers
_MOST_TRIED = 24  # numbers of clusters, where it is chosen


def make_clusters(
    stats: Stats,
    *,
    similarity: str = "outputs",
    algorithm: str = "ward",
    clusters_per_layer: str | int = PUBLISHED,
    model: Checkpoint | None = None,
) -> Clusters:
    """Cluster the experts of each layer, once per group of calibration blocks.

    Args:
        stats: with `probe_output`, unless the similarity is that of the parameters.
        similarity: `outputs`, `parameters`, or `both`, each of which then counts as much.
        algorithm: `ward`, `average` (agglomerative) or `k-means`.
        clusters_per_layer: a number; `published`: 12 for every 64 experts; `auto`: for each layer the number at which
            experts lie most clearly in their own cluster (the best mean silhouette).
        model: the one the Stats are of, for its parameters.

    Raises:
        InputError: unknown similarity, algorithm or number, more clusters than experts, Stats without probe outputs, or
            no model, another model or a quantised one where its parameters are asked for.
    """
    check_clustering(similarity, algorithm, clusters_per_layer)
    weights = _weights(stats, model) if similarity != "outputs" else None
    layers = {}
    for name, layer in stats.layers.items():
        cosine_EE = cosines_of_weights(weights, name) if weights else None
        point_GEK, overall_EK, similarity_EE = _points(stats, name, similarity, cosine_EE)
        clusters = _count(clusters_per_layer, name, layer.experts, overall_EK, algorithm)
        labels, distances = zip(*(assign(point_EK, clusters, algorithm) for point_EK in point_GEK), strict=True)
        overall_E, _ = assign(overall_EK, clusters, algorithm)
        layers[name] = LayerClusters(np.stack(labels), np.stack(distances), similarity_EE, overall_E)
    return Clusters(stats.model, stats.data, similarity, algorithm, layers)


def check_clustering(similarity: str, algorithm: str, clusters_per_layer: str | int) -> None:
    """Raises InputError for what `make_clusters` does not know."""
    if similarity not in SIMILARITIES:
        raise InputError(f"unknown similarity {similarity!r}; known: {', '.join(SIMILARITIES)}")
    if algorithm not in ALGORITHMS:
        raise InputError(f"unknown clustering algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if clusters_per_layer not in (AUTO, PUBLISHED) and not str(clusters_per_layer).lstrip("-").isdecimal():
        raise InputError(f"{clusters_per_layer!r} clusters per layer: give a number, {PUBLISHED} or {AUTO}")


def mean_outputs(stats: Stats, layer: str) -> np.ndarray:
    """Mean outputs `[G', E, H]` of a layer's experts, for those groups that saw any block."""
    blocks_G = np.asarray(stats.blocks_per_group, dtype=np.float64)
    seen = blocks_G > 0
    return stats.layers[layer].sum("probe_output").numpy()[seen] / blocks_G[seen, None, None]


def overall_outputs(stats: Stats, layer: str) -> np.ndarray:
    """Mean outputs `[E, H]` of a layer's experts over all data."""
    return stats.layers[layer].sum("probe_output").sum(0).numpy() / stats.blocks


def cosines(point_EH: np.ndarray) -> np.ndarray:
    """The cosine of every two points, `[E, E]`; that of a point without length is 0."""
    unit_EH = point_EH / np.maximum(np.linalg.norm(point_EH, axis=1, keepdims=True), 1e-30)
    return unit_EH @ unit_EH.T


def assign(points_NH: np.ndarray, clusters: int, algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """Cluster points; return each one's label (int64) and Euclidean distance to the mean of its cluster, `[N]` both."""
    from sklearn.cluster import AgglomerativeClustering, KMeans  # takes seconds, which no other step need spend

    if len(points_NH) == 1:  # which the linkages refuse
        return np.zeros(1, dtype=np.int64), np.zeros(1)
    if algorithm == "k-means":
        model = KMeans(n_clusters=clusters, random_state=0, n_init=4)
    else:
        model = AgglomerativeClustering(n_clusters=clusters, linkage=algorithm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters is no fault here
        labels = model.fit_predict(points_NH).astype(np.int64)
    centres = np.stack([points_NH[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return labels, np.linalg.norm(points_NH - centres[labels], axis=1)


def best_count(point_EK: np.ndarray, algorithm: str) -> int:
    """The number of clusters with the best mean silhouette (Rousseeuw, 1987), from 2 to half the points.

    More would leave clusters of one, in which nobody stands in for anybody.
    """
    from sklearn.metrics import silhouette_score

    most = max(2, len(point_EK) // 2)
    tried = sorted({round(count) for count in np.linspace(2, most, min(most - 1, _MOST_TRIED))})
    best, best_score = tried[0], -np.inf
    for count in tried:
        label_E, _ = assign(point_EK, count, algorithm)
        if 1 < len(np.unique(label_E)) < len(point_EK):
            score = silhouette_score(point_EK, label_E)
            if score > best_score + 1e-12:
                best, best_score = count, score
    return best


def _weights(stats: Stats, model: Checkpoint | None) -> Checkpoint:
    if model is None:
        raise InputError("the similarity of parameters is read from the model: give it, `--model M`")
    if model.fingerprint != stats.model:
        raise InputError(f"the Stats were not made from {model.files.address}; give the model that was calibrated")
    return model


def _points(
    stats: Stats, layer: str, similarity: str, cosine_EE: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A layer's experts as points, for each group `[G, E, K]` and over all data `[E, K]`, and their cosines."""
    if similarity == "outputs":
        overall_EH = overall_outputs(stats, layer)
        return mean_outputs(stats, layer), overall_EH, cosines(overall_EH)
    assert cosine_EE is not None
    weight_EK = embedded(cosine_EE)
    if similarity == "parameters":  # the same whatever the data: one group votes
        return weight_EK[None], weight_EK, cosine_EE
    overall_EH = overall_outputs(stats, layer)
    both_GEK = np.stack([_beside(point_EH, weight_EK) for point_EH in mean_outputs(stats, layer)])
    return both_GEK, _beside(overall_EH, weight_EK), (cosines(overall_EH) + cosine_EE) / 2


def embedded(gram_EE: np.ndarray) -> np.ndarray:
    """Points `[E, E]` that have these inner products."""
    values_K, vectors_EK = np.linalg.eigh(gram_EE)
    return vectors_EK * np.sqrt(np.maximum(values_K, 0))


def _beside(one_EH: np.ndarray, other_EK: np.ndarray) -> np.ndarray:
    """Points whose squared distances are the mean of two others', each measured by its own mean."""
    return np.concatenate([_to_unit_spread(one_EH), _to_unit_spread(other_EK)], axis=1) / np.sqrt(2)


def _to_unit_spread(point_EH: np.ndarray) -> np.ndarray:
    """With a mean squared distance to their mean of 1; all alike, they stay."""
    spread = np.square(point_EH - point_EH.mean(axis=0)).sum(axis=1).mean()
    return point_EH / np.sqrt(spread) if spread > 0 else point_EH


def _count(asked: str | int, layer: str, experts: int, point_EK: np.ndarray, algorithm: str) -> int:
    if asked == AUTO:
        return min(experts, best_count(point_EK, algorithm))
    if asked == PUBLISHED:
        return min(experts, max(2, round(_CLUSTERS_PER_EXPERT * experts)))
    clusters = int(asked)
    if not 1 <= clusters <= experts:
        raise InputError(f"{clusters} clusters were asked for, but {layer} has {experts} experts")
    return clusters
