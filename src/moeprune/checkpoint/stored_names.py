"""From the tensors of the experts that a model has to those that one checkpoint holds.

Transformers' weight conversion, run backwards, tells the names under which a family is published; what it saves itself
may lack the prefix of a larger model that the published weights are a part of, or have the model's own names. A
checkpoint whose weights are quantised holds more tensors than the model has, or others in their place:
`up_proj.weight_scale_inv` beside an expert's `up_proj.weight`, `gate_up_proj_blocks` and `gate_up_proj_scales` instead
of `gate_up_proj`.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from dataclasses import dataclass
from math import prod

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.errors import InputError

_AFTER_ANY_NAME = chr(sys.maxunicode)


@dataclass(frozen=True)
class StoredExperts:
    """The stored tensors of one layer's experts: their shapes, the rest as in `LayerLayout`."""

    experts: int
    shapes: dict[str, tuple[int, ...]]
    fused: dict[str, int]
    separate: list[list[str]]
    tables: list[str]
    routers: frozenset[str]


def stored_ways(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Parameters of a model under the names and in the shapes of a checkpoint, for each way to store them."""
    published = get_model_conversion_mapping(model, add_legacy=False)
    ways = [published, [conversion for conversion in published if not isinstance(conversion, PrefixChange)], []]
    stored = []
    for conversions in ways:
        model._weight_conversions = conversions
        stored.append(revert_weight_conversion(model, state))
    return stored


class StoredTensors:
    """All tensors of a checkpoint by name, quickly found by how their names begin."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.address = files.address
        self.shapes = {name: entry.shape for name, entry in files.entries.items()}
        self._sorted = sorted(self.shapes)

    def beginning(self, prefix: str) -> list[str]:
        """The names that begin so, without it, in alphabetical order."""
        first, last = bisect_left(self._sorted, prefix), bisect_left(self._sorted, prefix + _AFTER_ANY_NAME)
        return [name.removeprefix(prefix) for name in self._sorted[first:last]]


def as_stored_here(ways: list[StoredExperts], layer: str, stored: StoredTensors) -> StoredExperts:
    """The first of several ways to store a layer that this checkpoint follows, with what else it holds of the experts.

    Raises:
        InputError: it follows none of them, or packs several experts' numbers into one.
    """
    complete = [_with_companions(way, stored) for way in ways]
    for way in complete:
        if way.shapes.items() <= stored.shapes.items():
            return way
    missing = min((sorted(way.shapes.keys() - stored.shapes.keys()) for way in complete), key=len)
    raise InputError(
        f"{stored.address} does not hold the experts of {layer} as its config describes them; "
        + (f"missing: {', '.join(missing[:3])}" if missing else "their shapes differ")
    )


def _with_companions(way: StoredExperts, stored: StoredTensors) -> StoredExperts:
    """Add what lies beside the tensors, and drop those that only such companions stand for."""
    shapes, fused, routers = dict(way.shapes), dict(way.fused), set(way.routers)
    for name, axis in way.fused.items():
        beside = [f"{name}_{suffix}" for suffix in stored.beginning(f"{name}_")]
        companions = [one for one in beside if one not in way.shapes and prod(stored.shapes[one]) > 1]
        for companion in companions:
            shape = stored.shapes[companion]
            if shape[axis : axis + 1] != way.shapes[name][axis : axis + 1]:
                raise InputError(
                    f"{stored.address} quantises {name} in blocks that several experts share ({companion}, "
                    f"{list(shape)}); prune the unquantised original"
                )
            shapes[companion], fused[companion] = shape, axis
            if name in way.routers:
                routers.add(companion)
        if companions and name not in stored.shapes:
            del shapes[name], fused[name]
            routers.discard(name)
    separate = _all_of_each_expert(way, stored)
    for names in separate[len(way.separate) :]:
        shape = next(stored.shapes[name] for name in names if name in stored.shapes)
        shapes |= dict.fromkeys(names, shape)
    return StoredExperts(way.experts, shapes, fused, separate, way.tables, frozenset(routers))


def _all_of_each_expert(way: StoredExperts, stored: StoredTensors) -> list[list[str]]:
    """Whatever is stored below an expert's name, for all experts where any has it."""
    separate = [list(names) for names in way.separate]
    for prefixes in {tuple(_prefixes(names)) for names in way.separate}:
        known = {names[0].removeprefix(prefixes[0]) for names in separate if names[0].startswith(prefixes[0])}
        found = {suffix for prefix in prefixes for suffix in stored.beginning(prefix)}
        separate += [[prefix + suffix for prefix in prefixes] for suffix in sorted(found - known)]
    return separate


def _prefixes(names: list[str]) -> list[str]:
    """From the names of all experts' tensors of one kind, each expert's own beginning, its number included."""
    split = [name.split(".") for name in names]
    number = next(place for place, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1)
    return [".".join(parts[: number + 1]) + "." for parts in split]
