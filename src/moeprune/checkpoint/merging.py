"""Merging: an expert that becomes the weighted mean of several, in every tensor that is indexed by expert.

Means are computed in float32 and stored as the source's dtype. One tensor of one expert is in memory at a time, or a
tensor of all experts where each one's part is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

from moeprune.checkpoint.files import CheckpointFiles, TensorEntry
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.pieces import Piece, PlannedTensor, Range, Values, selected, unchanged
from moeprune.checkpoint.unsupported import QUANTISED_MERGED, quantisation, refusal
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan

Mean = Mapping[int, float]  # expert -> what it weighs in the mean; one alone is that expert as it is

_SMALLEST_PIECE_BYTES = 256 << 10


def check(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where a plan merges experts of a model whose numbers cannot be averaged."""
    merges = any(layer.merged for layer in plan.layers.values())
    if merges and (method := quantisation(source.config)):
        raise refusal(source.config, QUANTISED_MERGED.format(method=method))


def expert_means(layer: LayerPlan) -> list[Mean]:
    """What each expert that stays is made of, in their order."""
    return [layer.merged.get(expert) or {expert: 1.0} for expert in layer.keep]


def router_means(layer: LayerPlan) -> list[Mean]:
    """What each row of the router is made of, in their order."""
    merged = layer.merged if layer.merged_router else {}
    return [merged.get(expert) or {expert: 1.0} for expert in layer.choosable]


def stand_ins(layer: LayerPlan) -> dict[int, int]:
    """Experts that go -> the one that stays and holds most of them."""
    share_of: dict[int, tuple[float, int]] = {}
    for expert, members in layer.merged.items():
        for member, weight in members.items():
            share_of[member] = max(share_of.get(member, (0.0, expert)), (weight / sum(members.values()), expert))
    return {member: expert for member, (_, expert) in share_of.items() if member not in layer.keep}


def merged(files: CheckpointFiles, name: str, axis: int, means: Sequence[Mean]) -> PlannedTensor:
    """A tensor whose items along an axis are means of the source's.

    Raises:
        InputError: its dtype is not one of real numbers.
    """
    entry = files.entries[name]
    if all(len(mean) == 1 for mean in means):
        return selected(name, entry, axis, [expert for mean in means for expert in mean])
    _refuse_whole_numbers(files, name)
    shape = (*entry.shape[:axis], len(means), *entry.shape[axis + 1 :])
    rows, items = math.prod(entry.shape[:axis]), entry.shape[axis]
    item_bytes = entry.nbytes // (rows * items)
    pieces: list[Piece]
    if rows > 1 or item_bytes < _SMALLEST_PIECE_BYTES:
        pieces = [Values(rows * len(means) * item_bytes, partial(_means, files, name, axis, means))]
    else:
        pieces = [
            Range(entry.file, entry.start + next(iter(mean)) * item_bytes, item_bytes)
            if len(mean) == 1
            else Values(item_bytes, partial(_mean_of_items, files, name, axis, mean))
            for mean in means
        ]
    return PlannedTensor(name, entry.dtype, shape, tuple(pieces))


def merged_own(files: CheckpointFiles, new_name: str, names: Sequence[str], mean: Mean) -> PlannedTensor:
    """One expert's tensor as a mean of several experts' own.

    Args:
        names: of all experts' tensors of this kind.

    Raises:
        InputError: the dtype is not one of real numbers, or one of the experts lacks the tensor.
    """
    members = {names[expert]: weight for expert, weight in mean.items()}
    entry: TensorEntry = files.entries[next(iter(members))]
    if len(members) == 1:
        return unchanged(new_name, entry)
    for name in members:
        if name not in files.entries:
            raise InputError(f"{files.address} does not hold {name}, which the plan merges with others of its kind")
        _refuse_whole_numbers(files, name)
    return PlannedTensor(
        new_name, entry.dtype, entry.shape, (Values(entry.nbytes, partial(_mean_of_tensors, files, members)),)
    )


def _refuse_whole_numbers(files: CheckpointFiles, name: str) -> None:
    if not files.dtype(name).is_floating_point:
        raise InputError(f"{name} in {files.address} holds {files.entries[name].dtype}, of which no mean can be taken")


def _means(files: CheckpointFiles, name: str, axis: int, means: Sequence[Mean]) -> torch.Tensor:
    items = files.read([name])[name].unbind(axis)
    return torch.stack([_mean([(items[expert], weight) for expert, weight in mean.items()]) for mean in means], axis)


def _mean_of_items(files: CheckpointFiles, name: str, axis: int, mean: Mean) -> torch.Tensor:
    return _mean((files.read_slice(name, axis, expert, expert + 1), weight) for expert, weight in mean.items())


def _mean_of_tensors(files: CheckpointFiles, members: Mapping[str, float]) -> torch.Tensor:
    return _mean((files.read([name])[name], weight) for name, weight in members.items())


def _mean(members: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Of tensors and what they weigh, one after another, in float32; of their dtype."""
    total, weights = torch.zeros(()), 0.0
    for tensor, weight in members:
        total = total + tensor.to(torch.float32) * weight
        weights += weight
    return (total / weights).to(tensor.dtype)
