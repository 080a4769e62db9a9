"""A checkpoint written again with some parameters changed: those, and nothing else, however they are stored."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import tiny
import torch

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.rewriting import rewrite
from moeprune.errors import InputError


# One tensor per expert and fused ones; under the names of a larger model that the text model is a part of.
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe", "qwen3_5_moe_text", "deepseek_v3"])
def test_what_is_changed_is_what_is_loaded(family: str, tmp_path: Path) -> None:
    source = Checkpoint(tiny.write(tmp_path / "source", families.tiny_config(family)))
    model = source.load()
    changed = {
        name: model.get_parameter_or_buffer(name).detach() + 1
        for layer in source.layout.layers.values()
        for name in layer.parameters
    }
    (tmp_path / "out").mkdir()
    rewrite(source, model, changed, tmp_path / "out")
    before, after = model.state_dict(), Checkpoint(tmp_path / "out").load().state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], changed.get(name, tensor)), name


def test_what_is_stored_in_no_known_way_is_not_left_as_it_was(qwen: Path, tmp_path: Path) -> None:
    source = Checkpoint(qwen)
    model = source.load()
    layer = next(iter(source.layout.layers.values()))
    changed = {name: model.get_parameter(name) for name in layer.parameters}
    for names in layer.separate:
        del source.files.entries[names[0]]
    with pytest.raises(InputError, match="does not store"):
        rewrite(source, model, changed, tmp_path)
