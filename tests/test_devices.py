"""Where a model is loaded to and in which dtype. There is no GPU here: what would be asked of one is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.steps import machine


class Asked:
    """Notes how a model is loaded, and where it is put then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
        self.options: dict[str, Any] = {}
        self.put: list[torch.device] = []
        real = AutoModelForCausalLM.from_pretrained

        def from_pretrained(directory: Path, device_map: str | None = None, **options: Any) -> Any:
            self.options = {"device_map": device_map, **options}
            return real(directory, **options)

        def to(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
            self.put.append(device)
            return model

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        monkeypatch.setattr(PreTrainedModel, "to", to)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


def test_a_cpu_computes_in_float32_or_as_asked(qwen: Path) -> None:
    assert Checkpoint(qwen).load(machine.dtype_named("auto")).dtype == torch.float32
    assert Checkpoint(qwen).load(machine.dtype_named("bfloat16")).dtype == torch.bfloat16
    assert machine.describe("bfloat16")["dtype"] == "bfloat16"
    assert machine.describe()["dtype"] == "float32"
    with pytest.raises(InputError, match="unknown dtype 'int8'; known: auto, float32, bfloat16"):
        machine.dtype_named("int8")


def test_one_gpu(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, gpus=1)
    Checkpoint(qwen).load()
    assert (asked.options["device_map"], asked.options["dtype"]) == (None, torch.bfloat16)
    assert asked.put == [torch.device("cuda")]
    assert machine.describe()["device"] == "A GPU"


def test_several_gpus_share_a_model(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, gpus=2)
    Checkpoint(qwen).load()
    assert (asked.options["device_map"], asked.options["dtype"]) == ("auto", torch.bfloat16)
    assert asked.put == []
    assert machine.describe()["device"] == "2 x A GPU"
    Checkpoint(qwen).load(device=torch.device("cuda"))  # where one is named, that one
    assert (asked.options["device_map"], asked.put) == (None, [torch.device("cuda")])
