"""Clusters: per layer, which experts belong together and how far each is from its centre. `clustering` makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeprune.atomic import write_beside
from moeprune.errors import InputError

VERSION = 2


@dataclass
class LayerClusters:
    """One layer's clusters.

    Attributes:
        label_GE: cluster of each expert, one row per group of calibration blocks that votes.
        distance_GE: Euclidean distance to the centre of its cluster, in the space in which they were clustered.
        similarity_EE: cosine of the experts' mean outputs over all data, of their weights, or the mean of both.
        overall_E: cluster of each expert over all data.
    """

    label_GE: np.ndarray
    distance_GE: np.ndarray
    similarity_EE: np.ndarray
    overall_E: np.ndarray

    @property
    def count(self) -> int:
        return int(self.overall_E.max()) + 1


@dataclass
class Clusters:
    """The clusters of every layer, and what they were made from: the fingerprints of model and data, and how."""

    model: str
    data: str
    similarity: str
    algorithm: str
    layers: dict[str, LayerClusters]

    @property
    def counts(self) -> str:
        """How many clusters layers have, in words: `3`, or `3 to 7`."""
        counts = {layer.count for layer in self.layers.values()}
        return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)

    @property
    def mean_count(self) -> float:
        """How many clusters a layer has on average."""
        return sum(layer.count for layer in self.layers.values()) / len(self.layers)

    def save(self, path: Path) -> None:
        """Write the file beside its place, then rename it."""
        header = {
            "version": VERSION,
            "model": self.model,
            "data": self.data,
            "similarity": self.similarity,
            "algorithm": self.algorithm,
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
