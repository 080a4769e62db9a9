"""Which weights these are: what was made of one model in different ways is told apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.identity import close_fingerprint


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_one_expert_that_is_another_is_another_model(
    family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoint_of(family)
    changed = shutil.copytree(original, tmp_path / "changed")
    assert close_fingerprint(CheckpointFiles(changed)) == close_fingerprint(CheckpointFiles(original))
    tensors = load_file(changed / "model.safetensors")
    last = str(tiny.EXPERTS - 1)
    of_experts = [name for name, tensor in tensors.items() if tensor.dim() > 2 or f".{last}." in name]
    assert of_experts
    for name in of_experts:
        weights = {key: tensor.clone() for key, tensor in tensors.items()}
        of_the_last = weights[name][-1] if weights[name].dim() > 2 else weights[name]
        of_the_last.view(-1)[0] += torch.ones((), dtype=of_the_last.dtype)
        save_file(weights, changed / "model.safetensors", {"format": "pt"})
        assert close_fingerprint(CheckpointFiles(changed)) != close_fingerprint(CheckpointFiles(original)), name
