"""What lies beside the weights: config, tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from moeprune.checkpoint.files import INDEX_NAME

CARD_NAME = "README.md"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


def is_weights(name: str) -> bool:
    """Whether a file holds the model's weights, in whatever format, or tells where they are."""
    return PurePosixPath(name).suffix in _WEIGHTS or name == INDEX_NAME


def other_files(directory: Path) -> list[Path]:
    """What lies beside the weights. Not the model card, which tells of the source only."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not is_weights(path.name) and path.name != CARD_NAME
    ]


def copy_other_files(source: Path, target: Path) -> None:
    """Carry over what lies beside the weights."""
    for path in other_files(source):
        shutil.copyfile(path, target / path.name)
