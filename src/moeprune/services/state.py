"""What is written in the state directory about the services: what runs, and who is using it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from moeprune.errors import InputError
from moeprune.services.process import Server


class Record(BaseModel):
    """The servers that were started and not stopped. They may have ended since."""

    moeprune_services: int = 1
    kept: bool = False  # started by `up`: they stay when the last session ends
    servers: dict[str, Server] = {}

    @classmethod
    def load(cls, state: Path) -> Record:
        """The record of the directory, empty if there is none or it cannot be understood."""
        try:
            return cls.model_validate_json(_file(state).read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls()

    def save(self, state: Path) -> None:
        """Write the record, whole or not at all."""
        beside = _file(state).with_suffix(".new")
        beside.write_text(self.model_dump_json(indent=1))
        beside.replace(_file(state))

    @staticmethod
    def remove(state: Path) -> None:
        """Say that nothing runs."""
        _file(state).unlink(missing_ok=True)


def prepare(state: Path) -> Path:
    """Make the directory, for this user only and ignored by git (there is a key in it); returns its absolute path."""
    state = state.absolute()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / ".gitignore").write_text("*\n")
    except OSError as error:
        raise InputError(f"the services cannot keep their data in {state}: {error}") from error
    return state


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Be the only process that starts or stops services of this directory; waits for another that does."""
    with (state / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Tenancy:
    """A session's mark that it uses the services. The kernel takes it away when the process ends, however it ends.

    All methods are to be called with the directory locked.
    """

    def __init__(self, state: Path) -> None:
        self._mark: IO[str] = (state / "sessions.lock").open("w")
        fcntl.flock(self._mark, fcntl.LOCK_SH)

    def leave(self) -> bool:
        """Take the mark away; returns whether it was the last one."""
        with self._mark:
            try:
                fcntl.flock(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


def _file(state: Path) -> Path:
    return state / "running.json"
