"""Nothing is written half: write beside, then rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        _put_in_place(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


PART = ".part"
_LOCK_NAME = "lock"
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def continue_beside(path: Path, job: str) -> Iterator[Path]:
    """The same for a directory that takes long to make, so that an interruption must not cost what is done.

    Yields the directory to fill. Files whose names end in `.part` are unfinished; all others are kept when the block
    raises or the process is killed, and are there when the same job is begun again. Another job for the same path
    starts from nothing. Of two processes at the same path, the second is refused.

    Args:
        job: a name for what is made, of letters and digits: a digest of everything that it is made from.

    Raises:
        InputError: as `build_beside`, or another process is at it.
    """
    with _kept(path, path.with_name(f".{path.name}.unfinished"), job) as beside:
        yield beside
        _put_in_place(beside, path)


@contextmanager
def work_towards(path: Path, job: str, work: Path | None = None) -> Iterator[Path]:
    """A directory for finished work on the way to `path`: removed when the block ends, kept when it raises or the
    process is killed, and there again when the same job is begun anew. Whatever is to be at `path` is put there inside
    the block. Otherwise as `continue_beside`.

    Args:
        work: keep it in a directory of this one instead of beside `path`; other jobs' work stays there.
    """
    if work is not None:
        refuse_unwritable(work / job)
        work.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished") if work is None else work / job
    with _kept(path, unfinished, job) as kept:
        for half in path.parent.glob(f".{path.name}.writing-*"):  # what a killed process was about to put in place
            shutil.rmtree(half)
        yield kept
        shutil.rmtree(kept)


@contextmanager
def _kept(path: Path, unfinished: Path, job: str) -> Iterator[Path]:
    """The job's directory inside `unfinished`; it stays where it is not moved or removed inside the block."""
    refuse_to_overwrite(path)
    _make_parent(path)
    with _locked(unfinished, path):
        refuse_to_overwrite(path)  # the one that had the lock before may have finished it
        kept = unfinished / job
        for stale in unfinished.iterdir():
            if stale.name not in {job, _LOCK_NAME}:
                shutil.rmtree(stale)
        kept.mkdir(exist_ok=True)
        _remove_parts(kept)
        try:
            yield kept
        finally:
            if kept.is_dir():
                _remove_parts(kept)
                with suppress(OSError):  # what is finished stays
                    kept.rmdir()


def _remove_parts(directory: Path) -> None:
    for part in directory.glob(f"*{PART}"):
        part.unlink()


@contextmanager
def _locked(directory: Path, path: Path) -> Iterator[None]:
    """Make a directory, if need be, and hold the lock that lies in it; afterwards remove it, unless more lies there."""
    lock = directory / _LOCK_NAME
    descriptor = _take_lock(directory, lock, path)
    try:
        yield
    finally:
        if [file.name for file in directory.iterdir()] == [_LOCK_NAME]:
            lock.unlink()
            with suppress(OSError):  # somebody waits in it for the lock
                directory.rmdir()
        os.close(descriptor)


def _take_lock(directory: Path, lock: Path, path: Path) -> int:
    """The lock's open descriptor. Raises InputError where another process has it."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir()
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # the directory was removed meanwhile by one who was done
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"another process is writing {path}; wait until it is done, or choose another place"
            ) from error
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                os.close(descriptor)
                raise
            return descriptor  # a file system without locks, where it is the user who takes care
        with suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # the lock was removed meanwhile, and another may have made a new one


def refuse_without_room(directory: Path, needed_bytes: int) -> None:
    """Raise InputError where a file system lacks the room for what is to be written."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise InputError(
            f"{directory} has {free / 1e9:.1f} GB of free space, and {needed_bytes / 1e9:.1f} GB are needed; make room "
            "or choose another place"
        )


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


def _put_in_place(beside: Path, path: Path) -> None:
    for file in beside.rglob("*"):
        if file.is_file():
            _make_readable(file)
    beside.replace(path)


def _make_readable(file: Path) -> None:
    """Let those read a file whom the umask lets; safetensors makes its files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(file.stat().st_mode | (0o444 & ~umask))


def refuse_to_overwrite(path: Path) -> None:
    """Raise InputError where a directory cannot be put at `path` without losing something."""
    try:
        taken = any(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # not asked before: another process may remove it in between
        taken = path.is_file()
    if taken:
        raise InputError(f"{path} exists already and is not empty; choose another place or remove it first")
