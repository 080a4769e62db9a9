"""Which model this is: so that a Plan or Stats made for one is not applied to another."""

from __future__ import annotations

import hashlib
import json

import torch

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import Layout

_WITNESS_AXES = 2


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
