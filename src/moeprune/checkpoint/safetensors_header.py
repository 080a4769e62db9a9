"""The safetensors format: 8 bytes that say how long the header is, a header in JSON, and the tensors' bytes.

Written by hand and not with the library of that name, which takes and gives only whole tensors of the dtypes it
knows; here tensors are ranges of bytes in files, of whatever dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the format's own limit
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class DamagedHeaderError(ValueError):
    """The header of a safetensors file is not one, or does not fit its file. The message says what is wrong."""


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor: `dtype` as the format writes it, `start` and `stop` in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(first_bytes: bytes, file_bytes: int) -> int:
    """The header's length, from the first `LENGTH_BYTES` of a file of `file_bytes`. Raises DamagedHeaderError."""
    if len(first_bytes) < LENGTH_BYTES:
        raise DamagedHeaderError(f"it has only {file_bytes} bytes")
    length = int.from_bytes(first_bytes, "little")
    if length > _LONGEST_HEADER or length + LENGTH_BYTES > file_bytes:
        raise DamagedHeaderError(f"it says that its header has {length} bytes, of {file_bytes} in all")
    return length


def parse(header: bytes, data_bytes: int) -> dict[str, HeaderEntry]:
    """The tensors of a file, in the order of their bytes.

    Args:
        header: the JSON.
        data_bytes: how many bytes there are after it.

    Raises:
        DamagedHeaderError: it is not readable, ranges overlap or leave holes, or do not fit shapes or the file.
    """
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        entries = {name: _entry(told) for name, told in described.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedHeaderError(f"its header cannot be read: {error}") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end or entry.stop < entry.start:
            how = "overlaps what comes before it" if entry.start < end else "leaves a hole before it"
            raise DamagedHeaderError(f"{name} {how}, at byte {entry.start}")
        bits = _BITS.get(entry.dtype)
        if bits and bits * math.prod(entry.shape) != 8 * (entry.stop - entry.start):
            raise DamagedHeaderError(
                f"{name} has {entry.stop - entry.start} bytes, which {entry.dtype} {list(entry.shape)} has not"
            )
        end = entry.stop
    if end != data_bytes:
        raise DamagedHeaderError(f"its header tells of {end} bytes of tensors, but there are {data_bytes}")
    return entries


def _entry(told: dict[str, Any]) -> HeaderEntry:
    start, stop = told["data_offsets"]
    entry = HeaderEntry(told["dtype"], tuple(told["shape"]), start, stop)
    if not all(type(number) is int and number >= 0 for number in (*entry.shape, start, stop)):
        raise ValueError("a shape or offset is not a number")
    if type(entry.dtype) is not str:
        raise ValueError("a dtype is not a text")
    return entry


def alignment(dtype: str) -> int:
    """The bytes of one value, at least 1: at a multiple of them in the data such values must begin."""
    return max(1, _BITS.get(dtype, 8) // 8)


def build(entries: Mapping[str, HeaderEntry]) -> bytes:
    """Length and header, as a file begins; padded so that the data starts at a multiple of 8."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        offsets = [entry.start, entry.stop]
        described[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
