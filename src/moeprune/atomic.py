"""Nothing is written half: write beside, then rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeprune.errors import InputError


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing-{os.getpid()}")


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; on success it replaces `path`, on any exception (Ctrl-C too) it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file to write")
    beside = _name_beside(path)
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def build_beside(path: Path) -> Iterator[Path]:
    """The same for a directory.

    Raises:
        InputError: `path` exists and is not an empty directory; nothing of the user's is overwritten.
    """
    refuse_to_overwrite(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _name_beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_to_overwrite(path: Path) -> None:
    """Raise InputError where a directory cannot be put at `path` without losing something."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{path} exists already and is not empty; choose another place or remove it first")
