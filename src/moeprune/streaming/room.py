"""How a memory limit is shared out among weights, activations and what is left over for computing."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moeprune.errors import InputError
from moeprune.peak_memory import peak_resident_bytes

_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
CONVERSION = 2.0  # bytes at once per byte brought in: while tensors are fused, the stored ones are there, too
_SHARE_OF_EXPERTS = 0.75  # of what is left for them and for activations
SLACK = 96 << 20  # what Python and the libraries still take on the way
_MMAP_THRESHOLD = -3  # of mallopt: larger blocks are mapped one by one, and given back when they are freed


def parse_bytes(text: str) -> int:
    """`2GiB`, `1.5G` (the same unit), `900MB` (millions) as bytes.

    Raises:
        InputError: not of that form.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"{text!r} is not a size; write for example 2GiB or 900MB")
    thousands = (found[3] or "").lower() == "b"
    return round(float(found[1]) * (1000 if thousands else 1024) ** _EXPONENT[found[2].upper()])


def memory_in_use() -> int:
    """Bytes of this process in memory, without files that are only mapped."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) << 10
    return peak_resident_bytes()


@dataclass(frozen=True)
class Room:
    """What may be in memory at once, in bytes.

    Attributes:
        experts: weights of routed experts that are brought in together.
        activations: what stopped passes hold; what is more goes to disk.
    """

    experts: int
    activations: int


UNLIMITED = Room(sys.maxsize, sys.maxsize)


def bytes_of_pass(tokens: int, *, hidden: int, width: int, top_k: int, item: int) -> int:
    """What the forward pass of so many tokens takes in a layer: a dozen hidden states, and what experts need.

    Args:
        hidden, width: sizes of the hidden state and of an expert.
        top_k: experts that run for a token.
        item: bytes of a number.
    """
    return tokens * (12 * hidden + top_k * (3 * width + 2 * hidden)) * item


def share_out(
    limit: int,
    *,
    largest_part: int,
    fewest_experts: int,
    all_experts: int,
    one_pass: int,
    experts: int | None = None,
) -> Room:
    """Share a limit out.

    Args:
        limit: on this process's memory, including what it has now.
        largest_part: weights of the largest part. It stays while experts are brought in.
        fewest_experts, all_experts: weights of as few experts as can be brought in, and of all of the largest layer's.
        one_pass: what the forward pass of one batch takes while it runs.
        experts: `Room.experts` of an earlier call, taken again where it still fits: what is in use differs from process
            to process, and sums of other experts together are rounded otherwise.

    Raises:
        InputError: the limit is too small to do anything at all; says how much is needed.
    """
    used = memory_in_use() + SLACK
    part, least = int(CONVERSION * largest_part), int(CONVERSION * fewest_experts)
    rest = limit - used - one_pass - part
    if rest < least:
        raise InputError(
            f"a memory limit of {_mib(limit)} is too small: {_mib(used)} are in use before anything is loaded, the "
            f"largest part of the model takes {_mib(part)} while it is brought in, a few experts {_mib(least)} and one "
            f"sequence {_mib(one_pass)}; at least {_mib(limit - rest + least)} would do"
        )
    if experts is None or CONVERSION * experts > rest:
        experts = max(fewest_experts, min(all_experts, int(rest * _SHARE_OF_EXPERTS / CONVERSION)))
    return Room(experts, rest - int(CONVERSION * experts))


def return_freed_memory() -> None:
    """Have the allocator give what is freed back to the system at once (glibc; elsewhere nothing happens).

    Left alone it keeps freed blocks of up to 32 MiB for later, of which a limit knows nothing: under one of 2 GiB the
    peak was 365 MiB higher so, and the time the same (`benchmarks/streaming.py`).
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
