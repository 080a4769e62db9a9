"""Write a checkpoint again with some parameters changed, everything else bit for bit as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.files import CheckpointFiles, TensorEntry
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.other_files import CARD_NAME, copy_other_files
from moeprune.checkpoint.pieces import PlannedTensor, Values, unchanged
from moeprune.checkpoint.shards import SHARD_BYTES, index_of, plan_shards, write_shard
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.errors import InputError


def rewrite(source: Checkpoint, model: PreTrainedModel, parameters: Mapping[str, torch.Tensor], out: Path) -> None:
    """Copy a checkpoint into the directory `out`, with new values for some parameters.

    Args:
        source: what is copied; its tensors keep their dtypes.
        model: the model that the parameters are of, with or without weights; it says how they are stored.
        parameters: new values by the model's own names.

    Raises:
        InputError: the checkpoint stores these parameters in a way that is not known.
    """
    rewrite_by_group(source, model, {"": list(parameters)}, lambda _: dict(parameters), out)


def rewrite_by_group(
    source: Checkpoint,
    model: PreTrainedModel,
    groups: Mapping[str, Sequence[str]],
    read: Callable[[str], dict[str, torch.Tensor]],
    out: Path,
) -> None:
    """The same for parameters of which there need not be more than a group in memory.

    Args:
        groups: names of the parameters that change. No stored tensor is made of those of two groups.
        read: gives the new values of a group's.
    """
    copy_other_files(source.directory, out)
    if (card := source.directory / CARD_NAME).is_file():
        (out / CARD_NAME).write_text(card.read_text())
    files = source.files
    changed = _Changed(files, model, groups, read)

    def planned(name: str, entry: TensorEntry) -> PlannedTensor:
        if name not in changed.group_of:
            return unchanged(name, entry)
        values = Values(entry.nbytes, lambda: changed.stored(name).to("cpu", files.dtype(name)))
        return PlannedTensor(name, entry.dtype, entry.shape, (values,))

    shards = plan_shards((planned(name, entry) for name, entry in files.entries.items()), SHARD_BYTES)
    for shard in shards:
        write_shard(shard, files.source, out / shard.name)
    for name, text in index_of(shards).items():
        (out / name).write_text(text)


class _Changed:
    """The stored tensors that parameters make up, those of one group in memory.

    Attributes:
        group_of: stored tensor -> whose parameters make it up.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        model: PreTrainedModel,
        groups: Mapping[str, Sequence[str]],
        read: Callable[[str], dict[str, torch.Tensor]],
    ) -> None:
        self._model = model
        self._read = read
        self._way: dict[str, int] = {}
        self._group, self._in_memory = "", dict[str, torch.Tensor]()
        self.group_of: dict[str, str] = {}
        for group, names in groups.items():
            shapes = {name: torch.empty_like(model.get_parameter_or_buffer(name), device="meta") for name in names}
            ways = stored_ways(model, shapes)
            way = next((place for place, way in enumerate(ways) if _holds(files, way)), None)
            if way is None:
                raise InputError(f"{files.address} does not store {names[0]} in any way that its family is known by")
            self._way[group] = way
            self.group_of |= dict.fromkeys(ways[way], group)

    def stored(self, name: str) -> torch.Tensor:
        group = self.group_of[name]
        if not self._in_memory or group != self._group:
            self._in_memory.clear()
            self._in_memory = stored_ways(self._model, self._read(group))[self._way[group]]
            self._group = group
        return self._in_memory[name]


def _holds(files: CheckpointFiles, tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        name in files.entries and files.entries[name].shape == tuple(tensor.shape) for name, tensor in tensors.items()
    )
