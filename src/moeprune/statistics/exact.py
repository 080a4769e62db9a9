"""Sums that do not depend on the order of adding.

Floating-point addition is not associative, so two machines that share the calibration data would disagree with one that
has it all. Each number added here is first rounded to a multiple of 2^-60 and then summed as an integer of two 64-bit
limbs:

    value = high * 2^-12 + low * 2^-60,    -2^47 <= low < 2^47

Integer addition is exact and the range of `low` makes the representation unique, so any split and any order give the
same bits.
"""

from __future__ import annotations

import torch

_HIGH_UNIT = 2.0**-12
_LOW_UNIT = 2.0**-60
_LOW_BITS = 48
_LARGEST = 2.0**50  # of any sum; above it the high limb could overflow
_LARGEST_HIGH = 1 << 62  # the same in units of the high limb


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

    @property
    def shape(self) -> torch.Size:
        return self.limbs.shape[1:]

    def add_(self, values: torch.Tensor) -> ExactSum:
        """Add a tensor of the same shape, in place.

        Raises:
            OverflowError: a value is not finite, or the sum leaves the range of +-2^50.
        """
        values = values.to(torch.float64)
        if not (values.abs() <= _LARGEST).all():  # NaN is not either
            raise OverflowError("a value to be added is not finite, or not within +-2^50")
        high = torch.round(values / _HIGH_UNIT)
        low = torch.round((values - high * _HIGH_UNIT) / _LOW_UNIT)
        return self._add_limbs(torch.stack([high, low]).to(torch.int64))

    def merge_(self, other: ExactSum) -> ExactSum:
        """Add another sum of the same shape, in place."""
        return self._add_limbs(other.limbs)

    def _add_limbs(self, limbs: torch.Tensor) -> ExactSum:
        self.limbs += limbs
        carry = (self.limbs[1] + (1 << (_LOW_BITS - 1))) >> _LOW_BITS
        self.limbs[0] += carry
        self.limbs[1] -= carry << _LOW_BITS
        # Two sums within the range cannot wrap round unnoticed: 2^62 + 2^62 is the smallest integer, which is below.
        if ((self.limbs[0] > _LARGEST_HIGH) | (self.limbs[0] < -_LARGEST_HIGH)).any():
            raise OverflowError("a sum left the range of +-2^50")
        return self

    def value(self) -> torch.Tensor:
        """The sums as float64, each rounded once."""
        return self.limbs[0].to(torch.float64) * _HIGH_UNIT + self.limbs[1].to(torch.float64) * _LOW_UNIT
