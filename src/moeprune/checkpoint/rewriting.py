"""Write a checkpoint again with some parameters changed, everything else bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
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
        model: the model that the parameters are of; it says how they are stored.
        parameters: new values by the model's own names.

    Raises:
        InputError: the checkpoint stores these parameters in a way that is not known.
    """
    copy_other_files(source.directory, out)
    if (card := source.directory / CARD_NAME).is_file():
        (out / CARD_NAME).write_text(card.read_text())
    files = source.files
    named = next((way for way in stored_ways(model, dict(parameters)) if _holds(files, way)), None)
    if named is None:
        raise InputError(
            f"{files.address} does not store {next(iter(parameters))} in any way that its family is known by"
        )

    def planned(name: str, entry: TensorEntry) -> PlannedTensor:
        if name not in named:
            return unchanged(name, entry)
        values = Values(entry.nbytes, lambda: named[name].to("cpu", files.dtype(name)))
        return PlannedTensor(name, entry.dtype, entry.shape, (values,))

    shards = plan_shards((planned(name, entry) for name, entry in files.entries.items()), SHARD_BYTES)
    for shard in shards:
        write_shard(shard, files.source, out / shard.name)
    for name, text in index_of(shards).items():
        (out / name).write_text(text)


def _holds(files: CheckpointFiles, tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        name in files.entries and files.entries[name].shape == tuple(tensor.shape) for name, tensor in tensors.items()
    )
