"""Clusters: per layer, which experts belong together and how far each is from its centre.

The clustering itself is scikit-learn's. An expert's embedding is its mean output on the calibration samples (C-Prune,
section 3).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.statistics import Stats

VERSION = 1
Algorithm = Literal["ward", "average", "k-means"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
_CLUSTERS_PER_EXPERT = 12 / 64  # the authors' setting for 64 experts, carried over to other numbers


@dataclass
class LayerClusters:
    """One layer's clusters.

    Attributes:
        label_GE: cluster of each expert, one row per group of calibration blocks that votes.
        distance_GE: Euclidean distance to the centre of its cluster.
        similarity_EE: cosine of the experts' mean outputs over all data; for people to look at.
        overall_E: cluster of each expert by its mean output over all data; likewise.
    """

    label_GE: np.ndarray
    distance_GE: np.ndarray
    similarity_EE: np.ndarray
    overall_E: np.ndarray


@dataclass
class Clusters:
    """The clusters of every layer, and what they were made from: the fingerprints of model and data, and how."""

    model: str
    data: str
    algorithm: str
    clusters_per_layer: int
    layers: dict[str, LayerClusters]

    def save(self, path: Path) -> None:
        """Write the file beside its place, then rename it."""
        header = {
            "version": VERSION,
            "model": self.model,
            "data": self.data,
            "algorithm": self.algorithm,
            "clusters_per_layer": self.clusters_per_layer,
            "layers": list(self.layers),
        }
        tensors = {
            f"{name}/{field}": torch.from_numpy(np.ascontiguousarray(value))
            for name, layer in self.layers.items()
            for field, value in vars(layer).items()
        }
        with write_beside(path) as beside:
            save_file(
                dict(sorted(tensors.items())),
                beside,
                metadata={"moeprune_clusters": json.dumps(header, sort_keys=True)},
            )

    @classmethod
    def load(cls, path: Path) -> Clusters:
        """Raises InputError: not a Clusters file, damaged, or of another version."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["moeprune_clusters"])
                if header.pop("version") != VERSION:
                    raise InputError(f"{path} holds Clusters of another version of moeprune; cluster again")
                fields = LayerClusters.__annotations__
                layers = {
                    name: LayerClusters(**{field: file.get_tensor(f"{name}/{field}").numpy() for field in fields})
                    for name in header.pop("layers")
                }
                return cls(layers=layers, **header)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a readable Clusters file ({error}); make one with `moeprune cluster`"
            ) from error


def make_clusters(stats: Stats, *, algorithm: str = "ward", clusters_per_layer: int = 0) -> Clusters:
    """Cluster the experts of each layer, once per group of calibration blocks.

    Args:
        stats: with `probe_output`.
        algorithm: `ward`, `average` (agglomerative) or `k-means`.
        clusters_per_layer: 0 takes 12 for every 64 experts.

    Raises:
        InputError: unknown algorithm, more clusters than experts, or Stats without probe outputs.
    """
    layers = {}
    clusters = 0
    for name, layer in stats.layers.items():
        clusters = clusters_per_layer or max(2, round(_CLUSTERS_PER_EXPERT * layer.experts))
        if not 1 <= clusters <= layer.experts:
            raise InputError(f"{clusters} clusters were asked for, but {name} has {layer.experts} experts")
        point_GEH = mean_outputs(stats, name)
        labels, distances = zip(*(assign(point_EH, clusters, algorithm) for point_EH in point_GEH), strict=True)
        overall_EH = layer.sum("probe_output").sum(0).numpy() / stats.blocks
        unit_EH = overall_EH / np.maximum(np.linalg.norm(overall_EH, axis=1, keepdims=True), 1e-30)
        overall_E, _ = assign(overall_EH, clusters, algorithm)
        layers[name] = LayerClusters(np.stack(labels), np.stack(distances), unit_EH @ unit_EH.T, overall_E)
    return Clusters(stats.model, stats.data, algorithm, clusters, layers)


def mean_outputs(stats: Stats, layer: str) -> np.ndarray:
    """Mean outputs `[G', E, H]` of a layer's experts, for those groups that saw any block."""
    blocks_G = np.asarray(stats.blocks_per_group, dtype=np.float64)
    seen = blocks_G > 0
    return stats.layers[layer].sum("probe_output").numpy()[seen] / blocks_G[seen, None, None]


def assign(points_NH: np.ndarray, clusters: int, algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """Cluster points; return each one's label (int64) and Euclidean distance to the mean of its cluster, `[N]` both.

    Raises:
        InputError: unknown algorithm.
    """
    from sklearn.cluster import AgglomerativeClustering, KMeans  # takes seconds, which no other step need spend

    match algorithm:
        case "ward" | "average":
            model = AgglomerativeClustering(n_clusters=clusters, linkage=algorithm)
        case "k-means":
            model = KMeans(n_clusters=clusters, random_state=0, n_init=4)
        case _:
            raise InputError(f"unknown clustering algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters is no fault here
        labels = model.fit_predict(points_NH).astype(np.int64)
    centres = np.stack([points_NH[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return labels, np.linalg.norm(points_NH - centres[labels], axis=1)
