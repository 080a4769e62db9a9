"""What a tensor that is to be written is made of: ranges of bytes of a source's files, or values made in memory.

A selection of experts is copied range by range where an expert's bytes lie together and are many; otherwise the tensor
passes through memory, a few MB at a time. Dtypes do not matter: bytes are moved, and not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from moeprune.checkpoint.byte_sources import ByteSource, write_all
from moeprune.checkpoint.files import TensorEntry
from moeprune.errors import InputError

# A range of its own for less than this costs more, by its request, than reading what lies between.
_SMALLEST_RANGE_BYTES = 256 << 10
_BLOCK_BYTES = 16 << 20


class Piece(Protocol):
    """A part of a tensor, of `nbytes`."""

    @property
    def nbytes(self) -> int: ...

    def write(self, source: ByteSource, target: int, offset: int) -> None:
        """Put it at `offset` of the file of the descriptor `target`. Raises EOFError where the source ends before."""


@dataclass(frozen=True)
class Range:
    """Bytes that lie together in one file of the source."""

    file: str
    start: int
    nbytes: int

    def write(self, source: ByteSource, target: int, offset: int) -> None:
        source.copy_into(self.file, self.start, self.nbytes, target, offset)

    def is_followed_by(self, other: Range) -> bool:
        return self.file == other.file and self.start + self.nbytes == other.start


@dataclass(frozen=True)
class Selection:
    """From each of `rows`, the items of the numbers in `keep`. The rows lie one after another from `start` on."""

    file: str
    start: int
    rows: int
    items: int
    item_bytes: int
    keep: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.rows * len(self.keep) * self.item_bytes

    def write(self, source: ByteSource, target: int, offset: int) -> None:
        row_bytes = self.items * self.item_bytes
        at_once = max(1, _BLOCK_BYTES // row_bytes)
        for row in range(0, self.rows, at_once):
            rows = min(at_once, self.rows - row)
            block = bytearray(rows * row_bytes)
            source.read_into(self.file, self.start + row * row_bytes, memoryview(block))
            items_RI = np.frombuffer(block, np.dtype((np.void, self.item_bytes))).reshape(rows, self.items)
            kept = items_RI.take(self.keep, axis=1).tobytes()
            write_all(target, kept, offset)
            offset += len(kept)


@dataclass(frozen=True)
class Values:
    """Values that are made when they are written."""

    nbytes: int
    make: Callable[[], torch.Tensor] = field(repr=False)

    def write(self, source: ByteSource, target: int, offset: int) -> None:
        raw = self.make().contiguous().flatten().view(torch.uint8)
        write_all(target, raw.numpy().data, offset)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor as it will be stored; `dtype` as safetensors writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def unchanged(name: str, entry: TensorEntry) -> PlannedTensor:
    """A tensor as it is, under this name."""
    return PlannedTensor(name, entry.dtype, entry.shape, (Range(entry.file, entry.start, entry.nbytes),))


def selected(name: str, entry: TensorEntry, axis: int, keep: Sequence[int]) -> PlannedTensor:
    """The items `keep` along an axis of a tensor.

    Raises:
        InputError: its dtype packs values of several items into one byte.
    """
    shape = (*entry.shape[:axis], len(keep), *entry.shape[axis + 1 :])
    if not entry.nbytes:
        return PlannedTensor(name, entry.dtype, shape, ())
    rows, items = math.prod(entry.shape[:axis]), entry.shape[axis]
    item_bytes, rest = divmod(entry.nbytes, rows * items)
    if rest:
        raise InputError(f"{name} is stored as {entry.dtype} {list(entry.shape)}: bytes hold parts of several experts")
    pieces: tuple[Piece, ...]
    if item_bytes < _SMALLEST_RANGE_BYTES:
        pieces = (Selection(entry.file, entry.start, rows, items, item_bytes, tuple(keep)),)
    else:
        starts = (entry.start + (row * items + item) * item_bytes for row in range(rows) for item in keep)
        pieces = tuple(Range(entry.file, start, item_bytes) for start in starts)
    return PlannedTensor(name, entry.dtype, shape, pieces)
