"""How large a layer's outputs usually are: what errors are shares of.

`losses` measures each batch by its own tokens. A training whose batches are cut into pieces, by accumulation or among
processes, cannot: each piece would have another measure, and their mean would depend on how many there are. Here the
measure is taken once, of the teacher, so that an error is a mean over tokens, however they are grouped.

Axes: N rows (tokens, or choices of experts), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeprune.recovery.say import weights

_LEAST = 1e-30


@dataclass(frozen=True)
class Size:
    """Of one layer's outputs.

    Attributes:
        usual: the median of their squared norms; a row whose output is larger has less to say (`recovery.say`).
        wanted: the mean squared norm, so weighted.
    """

    usual: float
    wanted: float

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> Size:
        """From some rows, `[N, H]` each."""
        square_N = torch.cat([part_NH.float().square().sum(1) for part_NH in parts])
        usual = square_N.median().clamp_min(_LEAST)
        return cls(float(usual), float((square_N * weights(square_N, usual)).mean().clamp_min(_LEAST)))

    def missed(
        self, out_NH: torch.Tensor, wanted_NH: torch.Tensor, counts_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`mean_n (say_n |out_n - wanted_n|)^2 / wanted`, a scalar.

        Args:
            counts_N: bool; False is a row that there is nothing to compare of, and that misses nothing.
        """
        wanted_NH = wanted_NH.float()
        weight_N = weights(wanted_NH.square().sum(1), self.usual)
        missed_N = (out_NH.float() - wanted_NH).square().sum(1) * weight_N
        if counts_N is not None:
            missed_N = missed_N.masked_fill(~counts_N, 0)
        return missed_N.mean() / self.wanted
