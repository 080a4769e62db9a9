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
    refuse_directory(path)
    _make_parent(path)
    beside = _name_beside(path)
    try:
        yield beside
        _make_readable(beside)
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
    _make_parent(path)
    beside = _name_beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _make_readable(file)
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_directory(path: Path) -> None:
    """Raise InputError where a file cannot be put at `path` since a directory is there."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file to write")


def refuse_unwritable(path: Path) -> None:
    """Raise InputError where nothing can be put at `path`, before time is spent on what to put there."""
    present = next(parent for parent in path.absolute().parents if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        raise InputError(f"nothing can be written at {path}: {present} is not a directory that can be written to")


def _make_parent(path: Path) -> None:
    refuse_unwritable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"nothing can be written at {path}: {error.strerror}") from error


def _make_readable(file: Path) -> None:
    """Let those read a file whom the umask lets; safetensors makes its files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(file.stat().st_mode | (0o444 & ~umask))


def refuse_to_overwrite(path: Path) -> None:
    """Raise InputError where a directory cannot be put at `path` without losing something."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{path} exists already and is not empty; choose another place or remove it first")
