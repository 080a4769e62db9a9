"""Write a checkpoint again with some parameters changed, everything else bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from moeprune.checkpoint.files import TensorEntry
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.other_files import CARD_NAME, copy_other_files
from moeprune.checkpoint.pieces import PlannedTensor, Values, unchanged
from moeprune.checkpoint.shards import SHARD_BYTES, index_of, plan_shards, write_shard


def rewrite(source: Checkpoint, model: PreTrainedModel, parameters: Mapping[str, torch.Tensor], out: Path) -> None:
    """Copy a checkpoint into the directory `out`, with new values for some parameters.

    Args:
        source: what is copied; its tensors keep their dtypes.
        model: the model that the parameters are of; it says how they are stored.
        parameters: new values by the model's own names.
    """
    copy_other_files(source.directory, out)
    if (card := source.directory / CARD_NAME).is_file():
        (out / CARD_NAME).write_text(card.read_text())
    named = dict(parameters)
    if not named.keys() <= source.files.entries.keys():  # stored under other names, or split, than in the model
        model._weight_conversions = get_model_conversion_mapping(model)
        named = revert_weight_conversion(model, named)

    files = source.files

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
