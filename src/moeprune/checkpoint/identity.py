"""Which model this is: so that a Plan or Stats made for one is not applied to another."""

from __future__ import annotations

import hashlib
import json
import math

import torch

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import Layout

_WITNESS_AXES = 2
_VALUES = 256  # of each tensor, by which trainings of one model are told apart


def fingerprint(files: CheckpointFiles, layout: Layout) -> str:
    """The SHA-256 (hex) of every tensor's name, shape and dtype, and of the values of the routers.

    The routers differ between any two trainings and are small, so the weights' identity is known without reading them
    all.
    """
    digest = hashlib.sha256()
    described = {name: [entry.shape, entry.dtype] for name, entry in files.entries.items()}
    digest.update(json.dumps(described, sort_keys=True).encode())
    witnesses = sorted(
        name
        for layer in layout.layers.values()
        for name in layer.fused
        if len(files.entries[name].shape) <= _WITNESS_AXES
    )
    for name, tensor in files.read(witnesses).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def close_fingerprint(files: CheckpointFiles) -> str:
    """The SHA-256 (hex) of every tensor's name, shape and dtype, and of its first values; where it holds several
    experts, of the first values of each.

    It tells apart what was made of one model in different ways, where routers may be the same.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(files.entries.items()):
        digest.update(json.dumps([name, entry.shape, entry.dtype]).encode())
        parts = entry.shape[0] if len(entry.shape) > _WITNESS_AXES else 1
        size = math.prod(entry.shape) // max(1, parts)
        for part in range(parts):
            values = files.read_values(name, part * size, part * size + min(_VALUES, size))
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
