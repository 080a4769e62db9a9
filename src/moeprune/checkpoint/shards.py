"""The safetensors files of a checkpoint: planned to the last byte before any is written, then written as streams."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from moeprune.checkpoint import safetensors_header
from moeprune.checkpoint.byte_sources import ByteSource
from moeprune.checkpoint.files import INDEX_NAME, SINGLE_NAME
from moeprune.checkpoint.pieces import Piece, PlannedTensor, Range
from moeprune.checkpoint.safetensors_header import HeaderEntry
from moeprune.errors import InputError

SHARD_BYTES = 1 << 30
_LONGEST_RANGE_BYTES = 32 << 20


@dataclass(frozen=True)
class PlannedShard:
    """One file to write: its name and its tensors, in the order of their bytes."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's beginning, before the tensors' bytes."""
        entries, end = {}, 0
        for tensor in self.tensors:
            entries[tensor.name] = HeaderEntry(tensor.dtype, tensor.shape, end, end + tensor.nbytes)
            end += tensor.nbytes
        return safetensors_header.build(entries)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def plan_shards(tensors: Iterable[PlannedTensor], shard_bytes: int) -> list[PlannedShard]:
    """Distribute tensors over files, in their order.

    Args:
        shard_bytes: of tensors in one file at most; a single larger tensor gets a file of its own.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes

    def name(number: int) -> str:
        return SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"

    # The widest values first, so that each tensor lies where its values may.
    return [
        PlannedShard(name(number), tuple(sorted(group, key=lambda tensor: -safetensors_header.alignment(tensor.dtype))))
        for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: list[PlannedShard]) -> dict[str, str]:
    """File name -> text of the index; nothing where one file holds all."""
    if len(shards) == 1:
        return {}
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.data_bytes for shard in shards)}, "weight_map": weight_map}
    return {INDEX_NAME: json.dumps(index, indent=2, sort_keys=True) + "\n"}


def write_shard(
    shard: PlannedShard, source: ByteSource, path: Path, on_tensors: Callable[[int], None] = lambda done: None
) -> None:
    """Write a file and see that it is what was planned.

    Args:
        source: where ranges of bytes come from.
        on_tensors: called now and then with how many of its tensors are written.

    Raises:
        InputError: the source changed meanwhile, or the file cannot be written.
    """
    ends = list(accumulate(tensor.nbytes for tensor in shard.tensors))
    try:
        with path.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)
            file.flush()
            for written in _write_pieces(shard, source, file.fileno()):
                on_tensors(bisect_right(ends, written))
    except EOFError as error:
        raise InputError(f"{source.address} changed while it was read: {error}") from error
    except OSError as error:
        raise InputError(f"{shard.name} cannot be written from {source.address}: {error.strerror or error}") from error
    if not is_written(shard, path):
        raise InputError(f"{path} is not what was written to it; the disk may be damaged")


def is_written(shard: PlannedShard, path: Path) -> bool:
    """Whether there is a whole file with this header. Its values are not read."""
    if not path.is_file() or path.stat().st_size != shard.file_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _write_pieces(shard: PlannedShard, source: ByteSource, target: int) -> Iterator[int]:
    """Write everything after the header, and yield up to which byte after it that is done."""

    def write(offset: int, piece: Piece) -> int:
        piece.write(source, target, len(shard.header) + offset)
        return offset + piece.nbytes

    pieces = list(_placed(piece for tensor in shard.tensors for piece in tensor.pieces))
    if source.parallel_reads == 1:
        yield from (write(offset, piece) for offset, piece in pieces)
        return
    with ThreadPoolExecutor(source.parallel_reads) as pool:
        yield from pool.map(write, *zip(*pieces, strict=True))  # interrupted, it begins no more of them


def _placed(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    """The pieces with their offsets: small ranges joined, and long ones cut, so that none takes long."""
    offset = 0
    for piece in _joined(pieces):
        for part in _cut(piece) if isinstance(piece, Range) else [piece]:
            yield offset, part
            offset += part.nbytes


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in fewer pieces: ranges that follow each other in the source, too, are one."""
    last: Piece | None = None
    for piece in pieces:
        if isinstance(last, Range) and isinstance(piece, Range) and last.is_followed_by(piece):
            last = Range(last.file, last.start, last.nbytes + piece.nbytes)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _cut(whole: Range) -> Iterator[Range]:
    for done in range(0, whole.nbytes, _LONGEST_RANGE_BYTES):
        yield Range(whole.file, whole.start + done, min(_LONGEST_RANGE_BYTES, whole.nbytes - done))
