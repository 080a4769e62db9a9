"""Write a checkpoint again with some parameters changed, everything else bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from moeprune.checkpoint.files import copy_other_files, write_tensors
from moeprune.checkpoint.loading import Checkpoint


def rewrite(source: Checkpoint, model: PreTrainedModel, parameters: Mapping[str, torch.Tensor], out: Path) -> None:
    """Copy a checkpoint into the directory `out`, with new values for some parameters.

    Args:
        source: what is copied; its tensors keep their dtypes.
        model: the model that the parameters are of; it says how they are stored.
        parameters: new values by the model's own names.
    """
    copy_other_files(source.directory, out)
    if (card := source.directory / "README.md").is_file():
        (out / "README.md").write_text(card.read_text())
    named = dict(parameters)
    if not named.keys() <= source.files.entries.keys():  # stored under other names, or split, than in the model
        model._weight_conversions = get_model_conversion_mapping(model)
        named = revert_weight_conversion(model, named)

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return named[name].to("cpu", tensor.dtype).contiguous() if name in named else tensor

    write_tensors(((name, changed(name, tensor)) for name, tensor in source.files.tensors()), out)
