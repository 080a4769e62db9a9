"""A checkpoint's tensors as they lie in its safetensors files, read one at a time, or by parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moeprune.checkpoint import safetensors_header
from moeprune.checkpoint.byte_sources import ByteSource, LocalDirectory
from moeprune.checkpoint.safetensors_header import LENGTH_BYTES, DamagedHeaderError
from moeprune.errors import InputError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_BLOCK_BYTES = 16 << 20
_TORCH_DTYPES: dict[str, torch.dtype | None] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),  # not in the oldest torch that we take
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is, and what it is, without its values. `start` and `stop` are bytes of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: BF16, F32, ...
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class CheckpointFiles:
    """The tensors of a checkpoint, by name. Only headers are read until a tensor is asked for.

    Args:
        source: a local directory, or where else its files lie.

    Raises:
        InputError: there are no safetensors, a shard that the index names is missing, or one is damaged.
    """

    def __init__(self, source: Path | ByteSource) -> None:
        self.source = LocalDirectory(source) if isinstance(source, Path) else source

    @property
    def address(self) -> str:
        return self.source.address

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors, in the order in which they lie in the shards, one shard after another."""
        with ThreadPoolExecutor(self.source.parallel_reads) as pool:
            headers = dict(zip(self.shards, pool.map(self._header, self.shards), strict=True))
        for name, shard in self._weight_map.items():
            if name not in headers[shard]:
                raise InputError(
                    f"the shard {self.address}/{shard} is missing or damaged: {INDEX_NAME} says that it holds {name}, "
                    "and it does not"
                )
        return {
            name: entry
            for shard, header in headers.items()
            for name, entry in header.items()
            if self._weight_map.get(name, shard) == shard
        }

    def _header(self, shard: str) -> dict[str, TensorEntry]:
        size = self._sizes.get(shard, 0)
        try:
            if shard not in self._sizes:
                raise DamagedHeaderError("there is no such file")
            length = safetensors_header.header_length(self._bytes(shard, 0, min(LENGTH_BYTES, size)), size)
            data = LENGTH_BYTES + length
            found = safetensors_header.parse(self._bytes(shard, LENGTH_BYTES, data), size - data)
        except (OSError, EOFError, DamagedHeaderError) as error:
            raise InputError(f"the shard {self.address}/{shard} is missing or damaged: {error}") from error
        return {
            name: TensorEntry(shard, entry.shape, entry.dtype, data + entry.start, data + entry.stop)
            for name, entry in found.items()
        }

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.source.read_into(file, start, memoryview(buffer))
        return bytes(buffer)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.source.sizes()

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """What the index says; nothing where there is none."""
        if INDEX_NAME not in self._sizes:
            return {}
        try:
            named = json.loads(self._bytes(INDEX_NAME, 0, self._sizes[INDEX_NAME]))["weight_map"]
            return {str(name): str(shard) for name, shard in named.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"the index {self.address}/{INDEX_NAME} is damaged: it does not say which shard holds what ({error})"
            ) from error

    @cached_property
    def shards(self) -> list[str]:
        """The names of the safetensors files that are this checkpoint's."""
        if INDEX_NAME in self._sizes:
            return sorted(set(self._weight_map.values()))
        if SINGLE_NAME in self._sizes:  # others beside it are not this model's, or hold it once more
            return [SINGLE_NAME]
        shards = sorted(name for name in self._sizes if name.endswith(".safetensors"))
        if not shards:
            raise InputError(f"{self.address} holds no safetensors files; moeprune reads no other format of weights")
        return shards

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, shard after shard, holding one at a time."""
        for name in self.entries:
            yield name, self._read(name)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read a few tensors by name. Raises InputError for a dtype that torch has not."""
        return {name: self._read(name) for name in names}

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """A tensor's part from `start` to `stop` along an axis.

        Where no axis before it is longer than 1, as for axis 0, only the part's bytes are read; otherwise all of the
        tensor passes through memory, some MB at a time.

        Raises:
            InputError: its dtype is one that torch has not.
            IndexError: there is no such axis, or the part does not lie within it.
        """
        shape = self.entries[name].shape
        if not 0 <= axis < len(shape) or not 0 <= start <= stop <= shape[axis]:
            raise IndexError(f"{name} of shape {shape} has no part {start} to {stop} along axis {axis}")
        rows = math.prod(shape[:axis])
        row_shape = shape[axis:]
        row_length, item_length = math.prod(row_shape), math.prod(row_shape[1:])
        part_shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
        if rows == 1:
            return self.read_values(name, start * item_length, stop * item_length).reshape(part_shape)
        part = torch.empty((rows, (stop - start) * item_length), dtype=self.dtype(name))
        rows_at_once = max(1, _BLOCK_BYTES // max(1, row_length * part.itemsize))
        for row in range(0, rows, rows_at_once):
            after = min(rows, row + rows_at_once)
            block = self.read_values(name, row * row_length, after * row_length).reshape(after - row, row_length)
            part[row:after] = block[:, start * item_length : stop * item_length]
        return part.reshape(part_shape)

    def _read(self, name: str) -> torch.Tensor:
        shape = self.entries[name].shape
        return self.read_values(name, 0, math.prod(shape)).reshape(shape)

    def read_values(self, name: str, first: int, last: int) -> torch.Tensor:
        """A tensor's values from the `first` to before the `last`, flat, as they lie in the file."""
        entry, dtype = self.entries[name], self.dtype(name)
        raw = torch.empty((last - first) * dtype.itemsize, dtype=torch.uint8)
        try:
            self.source.read_into(entry.file, entry.start + first * dtype.itemsize, raw.numpy().data)
        except (OSError, EOFError) as error:
            raise InputError(f"the shard {self.address}/{entry.file} is missing or damaged: {error}") from error
        return raw.view(dtype)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype in memory. Raises InputError where torch has none for it."""
        dtype = _TORCH_DTYPES.get(self.entries[name].dtype)
        if dtype is None:
            raise InputError(
                f"{name} in {self.address} is stored as {self.entries[name].dtype}, with which torch cannot compute"
            )
        return dtype

    @property
    def bytes_on_disk(self) -> int:
        return sum(self._sizes[shard] for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.entries.values())
