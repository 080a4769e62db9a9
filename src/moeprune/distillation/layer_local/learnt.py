"""What layers have learnt, as files in a directory: of each its parameters, and in the header how it went.

Beside them, under a memory limit, is how many bytes of experts the teacher ran at once: whoever trains the other layers
adds up as many, and so finds the same numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeprune.atomic import PART
from moeprune.errors import InputError

_ENTRY = "moeprune_distilled_layer"
_ROOM_NAME = "room.json"


@dataclass(frozen=True)
class LayerLearnt:
    """How a layer's training went (`learn.Outcome`).

    Attributes:
        layer: name of the teacher's experts module.
        parameters: names of the student's parameters that are in the file; none where it got no better.
    """

    layer: str
    before: float
    after: float
    curve: list[float]
    reason: str
    parameters: list[str]


def save(directory: Path, learnt: LayerLearnt, tensors: dict[str, torch.Tensor]) -> None:
    """Put a layer's file into a directory; it is not there before it is whole."""
    path = _path(directory, learnt.layer)
    beside = path.with_name(path.name + PART)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {_ENTRY: json.dumps(asdict(learnt))}
    )
    beside.replace(path)


def load(directory: Path, layer: str) -> LayerLearnt | None:
    """How the layer's training went; None where its file is not there.

    Raises:
        InputError: the file is none of ours.
    """
    path = _path(directory, layer)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return LayerLearnt(**json.loads((file.metadata() or {})[_ENTRY]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} does not hold what a layer has learnt ({error}); remove it") from error


def tensors(directory: Path, layer: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """A layer's parameters."""
    with safe_open(_path(directory, layer), "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def save_room(directory: Path, experts_bytes: int) -> None:
    """Note it where it is not noted yet; it is there before the first layer's file."""
    path = directory / _ROOM_NAME
    if not path.is_file():
        beside = path.with_name(path.name + PART)
        beside.write_text(json.dumps(experts_bytes))
        beside.replace(path)


def load_room(directory: Path) -> int | None:
    """What was noted; None where nothing was."""
    path = directory / _ROOM_NAME
    return int(json.loads(path.read_text())) if path.is_file() else None


def copy_all(source: Path, target: Path) -> None:
    """Put all layers' files of a directory into another as well."""
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)


def _path(directory: Path, layer: str) -> Path:
    return directory / f"{layer}.safetensors"
