"""From the tensors of the experts that a model has to those that one checkpoint holds.

Transformers' weight conversion, run backwards, tells the names under which a family is published; what it saves itself
may lack the prefix of a larger model that the published weights are a part of, or have the model's own names. A
checkpoint whose weights are quantised holds more tensors than the model has, or others in their place:
`up_proj.weight_scale_inv` beside an expert's `up_proj.weight`, `gate_up_proj_blocks` and `gate_up_proj_scales` instead
of `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.errors import InputError


@dataclass(frozen=True)
class StoredExperts:
    """The stored tensors of one layer's experts: their shapes, the rest as in `LayerLayout`."""

    experts: int
    shapes: dict[str, tuple[int, ...]]
    fused: dict[str, int]
    separate: list[list[str]]
    tables: list[str]


def stored_ways(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Parameters of a model under the names and in the shapes of a checkpoint, for each way to store them."""
    published = get_model_conversion_mapping(model, add_legacy=False)
    ways = [published, [conversion for conversion in published if not isinstance(conversion, PrefixChange)], []]
    stored = []
    for conversions in ways:
        model._weight_conversions = conversions
        stored.append(revert_weight_conversion(model, state))
    return stored


def as_stored_here(ways: list[StoredExperts], layer: str, files: CheckpointFiles) -> StoredExperts:
    """The first of several ways to store a layer that this checkpoint follows, with what else it holds of the experts.

    Raises:
        InputError: it follows none of them.
    """
    complete = [_with_companions(way, files) for way in ways]
    for way in complete:
        if all(name in files.entries and files.entries[name].shape == shape for name, shape in way.shapes.items()):
            return way
    missing = min((sorted(set(way.shapes) - set(files.entries)) for way in complete), key=len)
    raise InputError(
        f"{files.address} does not hold the experts of {layer} as its config describes them; "
        + (f"missing: {', '.join(missing[:3])}" if missing else "their shapes differ")
    )


def _with_companions(way: StoredExperts, files: CheckpointFiles) -> StoredExperts:
    """Add what lies beside each tensor under its name and a suffix, and drop those that only such tensors stand for."""
    shapes, fused, separate = dict(way.shapes), dict(way.fused), [list(names) for names in way.separate]
    for name, axis in way.fused.items():
        companions = {
            suffix: files.entries[name + suffix].shape
            for suffix in _suffixes(name, files)
            if name + suffix not in way.shapes and files.entries[name + suffix].shape[: axis + 1][-1:] == (way.experts,)
        }
        shapes |= {name + suffix: shape for suffix, shape in companions.items()}
        fused |= dict.fromkeys([name + suffix for suffix in companions], axis)
        if companions and name not in files.entries:
            del shapes[name], fused[name]
    for names in way.separate:
        for suffix in _suffixes(names[0], files):
            separate.append([name + suffix for name in names])
            shapes |= {name + suffix: files.entries[names[0] + suffix].shape for name in names}
    return StoredExperts(way.experts, shapes, fused, separate, way.tables)


def _suffixes(name: str, files: CheckpointFiles) -> Iterator[str]:
    """What other stored names append to this one: `_scale_inv`, `_blocks`."""
    for other in files.entries:
        if other.startswith(name + "_"):
            yield other.removeprefix(name)
