"""How alike the weights of a layer's experts are, read from the stored tensors, a part at a time; nothing is built.

Axes: E experts of a layer, P values of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import LayerLayout
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.unsupported import quantisation
from moeprune.errors import InputError

_PART_BYTES = 128 << 20  # of all experts' values that are in memory together, as float32
_MATRIX_AXES = 2


def cosines_of_weights(source: Checkpoint, layer: str) -> np.ndarray:
    """The cosine of every two experts' weights, `[E, E]` float64, an expert's matrices taken as one long vector.

    Raises:
        InputError: the weights are quantised; what is stored is then not what they are.
    """
    if quantisation(source.config) is not None:
        raise InputError(
            f"the weights of {source.files.address} are stored quantised, and cannot be compared as they are; use "
            "`--similarity outputs`"
        )
    layout = source.layout.layers[layer]
    gram_EE = np.zeros((layout.experts, layout.experts))
    for part_EP in _parts(source.files, layout):
        gram_EE += (part_EP @ part_EP.T).double().numpy()
    length_E = np.sqrt(np.maximum(np.diagonal(gram_EE), 1e-300))
    return gram_EE / length_E[:, None] / length_E


def _parts(files: CheckpointFiles, layout: LayerLayout) -> Iterator[torch.Tensor]:
    """The matrices of all experts in parts `[E, P]`: an expert's row holds the same places of its own."""
    with ThreadPoolExecutor(files.source.parallel_reads) as pool:
        for names in layout.separate:
            shape = files.entries[names[0]].shape
            if len(shape) >= _MATRIX_AXES:
                yield from _rows(files, pool, [(name, 0) for name in names], math.prod(shape))
        for name, axis in layout.fused.items():
            if len(files.entries[name].shape) > _MATRIX_AXES:  # others are the router's, or biases
                yield from _of_fused(files, pool, name, axis, layout.experts)


def _of_fused(
    files: CheckpointFiles, pool: ThreadPoolExecutor, name: str, axis: int, experts: int
) -> Iterator[torch.Tensor]:
    if axis:  # then an expert's values do not lie together
        whole = files.read([name])[name].narrow(axis, 0, experts)
        yield whole.movedim(axis, 0).reshape(experts, -1).float()
    else:
        length = math.prod(files.entries[name].shape[1:])
        yield from _rows(files, pool, [(name, expert) for expert in range(experts)], length)


def _rows(
    files: CheckpointFiles, pool: ThreadPoolExecutor, places: list[tuple[str, int]], length: int
) -> Iterator[torch.Tensor]:
    """Parts of what lies together of each expert: the `length` values of the item of a number in a tensor."""
    at_once = max(1, _PART_BYTES // 4 // len(places))
    for first in range(0, length, at_once):
        last = min(length, first + at_once)

        def read(place: tuple[str, int], first: int = first, last: int = last) -> torch.Tensor:
            name, number = place
            return files.read_values(name, number * length + first, number * length + last).float()

        yield torch.stack(list(pool.map(read, places)))
