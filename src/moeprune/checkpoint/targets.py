"""Where a checkpoint is put, shard by shard, and how far an interrupted one has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from moeprune.atomic import PART, continue_beside, refuse_to_overwrite, refuse_unwritable, refuse_without_room
from moeprune.checkpoint.shards import PlannedShard, is_written


class OpenTarget(Protocol):
    """A target that is being written to.

    Attributes:
        folder: a local directory for the small files, which are put in place after all shards.
        placed: how many shards were put in place since it was opened.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def placed(self) -> int: ...

    def has(self, shard: PlannedShard) -> bool:
        """Whether a shard is there from before, whole."""

    def refuse_without_room(self, shards: list[PlannedShard]) -> None:
        """Raise InputError where there is no room to write these shards."""

    def place_for(self, shard: PlannedShard) -> AbstractContextManager[Path]:
        """A local path to write a shard at; after the block it is in its place, unless the block raised."""


class Target(Protocol):
    """A place for a checkpoint. Nothing that looks like one is there before it is complete."""

    @property
    def address(self) -> str: ...

    def refuse_if_unusable(self) -> None:
        """Raise InputError where something is there already, or nothing can be put there. Nothing is changed."""

    def open(self, job: str) -> AbstractContextManager[OpenTarget]:
        """Begin or continue a job, named by a digest of all that it is made from; after the block it is complete.

        Raises:
            InputError: something is there already, or nothing can be put there.
        """


class LocalTarget:
    """A directory on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def address(self) -> str:
        return str(self._path)

    def refuse_if_unusable(self) -> None:
        refuse_to_overwrite(self._path)
        refuse_unwritable(self._path)

    @contextmanager
    def open(self, job: str) -> Iterator[OpenTarget]:
        with continue_beside(self._path, job) as beside:
            yield _OpenDirectory(beside, self._path.parent)


class _OpenDirectory:
    def __init__(self, folder: Path, parent: Path) -> None:
        self.folder = folder
        self._parent = parent
        self.placed = 0

    def has(self, shard: PlannedShard) -> bool:
        return is_written(shard, self.folder / shard.name)

    def refuse_without_room(self, shards: list[PlannedShard]) -> None:
        refuse_without_room(self._parent, sum(shard.file_bytes for shard in shards))

    @contextmanager
    def place_for(self, shard: PlannedShard) -> Iterator[Path]:
        part = self.folder / (shard.name + PART)
        yield part
        part.rename(self.folder / shard.name)
        self.placed += 1
