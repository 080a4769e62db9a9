"""Sums that do not depend on the order of adding.

Floating-point addition is not associative, so two machines that share the calibration data would disagree with one that
has it all. Each number added here is first rounded to a multiple of 2^-60 and then summed as an integer of two 64-bit
limbs:

    value = high * 2^-12 + low * 2^-60,    -2^47 <= low < 2^47

Integer addition is exact and the range of `low` makes the representation unique, so any split and any order give the
same bits.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

_HIGH_UNIT = 2.0**-12
_LOW_UNIT = 2.0**-60
_LOW_BITS = 48
_LARGEST = 2.0**50  # of any sum; above it the high limb could overflow
_LARGEST_HIGH = 1 << 62  # the same in units of the high limb
_LARGEST_LOW = 2.0  # of a value that fits into 2^61 of the low limb's units


class ExactSum:
    """A tensor of exact sums.

    `limbs` has the shape `[2, *shape]` (high, low) and the dtype int64; it is what is stored in a file.
    """

    def __init__(self, limbs: torch.Tensor) -> None:
        if limbs.dtype != torch.int64 or limbs.ndim < 1 or limbs.shape[0] != 2:
            raise ValueError(f"limbs must be int64 of shape [2, ...], not {limbs.dtype} {tuple(limbs.shape)}")
        self.limbs = limbs

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str = "cpu") -> ExactSum:
        return cls(torch.zeros(2, *shape, dtype=torch.int64, device=device))

    @classmethod
    def zeros_in_file(cls, file: Path, *shape: int) -> ExactSum:
        """In a new file that is mapped: the system writes out what is not in use, so that it need not fit in memory."""
        size = 2 * math.prod(shape)
        return cls(torch.from_file(str(file), shared=True, size=size, dtype=torch.int64).view(2, *shape))

    @property
    def shape(self) -> torch.Size:
        return self.limbs.shape[1:]

    def __getitem__(self, index: tuple[int | slice, ...]) -> ExactSum:
        """A part, which shares its memory with the whole."""
        return ExactSum(self.limbs[(slice(None), *index)])

    def add_(self, values: torch.Tensor) -> ExactSum:
        """Add a tensor of the same shape, in place.

        Raises:
            OverflowError: a value is not finite, or the sum leaves the range of +-2^50.
        """
        values = values.to(torch.float64)
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest <= _LARGEST:  # NaN is not either
            raise OverflowError("a value to be added is not finite, or not within +-2^50")
        if largest <= _LARGEST_LOW:  # nearly always; the same limbs as below, in fewer steps
            return self._add_limbs(None, (values / _LOW_UNIT).round_().to(torch.int64))
        high = torch.round(values / _HIGH_UNIT)
        low = torch.round((values - high * _HIGH_UNIT) / _LOW_UNIT)
        return self._add_limbs(high.to(torch.int64), low.to(torch.int64))

    def merge_(self, other: ExactSum) -> ExactSum:
        """Add another sum of the same shape, in place."""
        return self._add_limbs(other.limbs[0], other.limbs[1])

    def _add_limbs(self, high: torch.Tensor | None, low: torch.Tensor) -> ExactSum:
        """Add limbs, of which the low one can be up to 2^62."""
        total_high, total_low = self.limbs[0], self.limbs[1]
        total_low += low
        carry = (total_low + (1 << (_LOW_BITS - 1))) >> _LOW_BITS
        total_low -= carry << _LOW_BITS
        total_high += carry if high is None else carry + high
        # Two sums within the range cannot wrap round unnoticed: 2^62 + 2^62 is the smallest integer, which is below.
        if total_high.numel() and max(map(abs, map(int, torch.aminmax(total_high)))) > _LARGEST_HIGH:
            raise OverflowError("a sum left the range of +-2^50")
        return self

    def value(self) -> torch.Tensor:
        """The sums as float64, each rounded once."""
        return self.limbs[0].to(torch.float64) * _HIGH_UNIT + self.limbs[1].to(torch.float64) * _LOW_UNIT
