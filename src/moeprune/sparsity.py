"""Which weights inside an expert become zero: in each output row of a projection, those of the lowest score.

The score of the weight from feature `j` to output `o` is `|W[o, j]| * sqrt(energy[j])`: how much leaving it out can
move the output. The energy of a feature is the sum of its squares over the tokens that the expert receives:

- `moe-pruner`: each times its gate weight first, as the expert's output will be (arXiv 2410.12013, section 3);
- `wanda`: as it is (arXiv 2306.11695, section 3);
- `magnitude`: the same for all features, so that only the weight itself counts. So, too, for an expert that received no
  tokens, whatever the score.

Axes: O outputs of a projection, I features that go into it; R rows, M weights that are compared with each other.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch

Score = Literal["moe-pruner", "wanda", "magnitude"]
Feature = Literal["input", "hidden"]  # what goes into an expert's first projections, and into its last

ENERGY: dict[Score, dict[Feature, str]] = {  # score -> the statistics that hold the energies
    "moe-pruner": {"input": "gated_input_square", "hidden": "gated_hidden_square"},
    "wanda": {"input": "input_square", "hidden": "hidden_square"},
    "magnitude": {},
}


def parse_pattern(pattern: str) -> tuple[int, int] | Fraction:
    """`2:4` as two of four, `0.5` as that fraction of a row. Raises ValueError, with a sentence, for anything else."""
    zeros, colon, of = pattern.partition(":")
    try:
        if colon and 0 < int(zeros) < int(of):
            return int(zeros), int(of)
        if not colon and 0 <= Fraction(pattern) < 1:
            return Fraction(pattern)
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(
        f"{pattern!r} is no pattern of zeros: give a fraction of each row from 0 to below 1, such as 0.5, or N:M for N "
        "zeros in every M weights, such as 2:4"
    )


def compared(pattern: str, features: int) -> tuple[int, int]:
    """How many become zero of how many weights that are compared with each other, in rows of so many features.

    Raises:
        ValueError: M of a pattern N:M does not divide the row.
    """
    parsed = parse_pattern(pattern)
    if isinstance(parsed, Fraction):
        return int(parsed * features), features
    if features % parsed[1]:
        raise ValueError(f"rows of {features} weights cannot be divided into groups of {parsed[1]}, as {pattern} asks")
    return parsed


def zeros(weight_OI: torch.Tensor, energy_I: torch.Tensor | None, pattern: str) -> torch.Tensor:
    """Which weights become zero, `[O, I]` bool.

    Exactly as many as the pattern says; among equals, the first.

    Args:
        energy_I: of the features; None, or all 0, to rank by magnitude.

    Raises:
        ValueError: the pattern does not fit the row.
    """
    count, of = compared(pattern, weight_OI.shape[1])
    score_OI = weight_OI.abs().to(torch.float32)
    if energy_I is not None and energy_I.any():
        score_OI = score_OI * energy_I.sqrt().to(torch.float32)
    return _lowest(score_OI.reshape(-1, of), count).view_as(weight_OI)


def _lowest(score_RM: torch.Tensor, count: int) -> torch.Tensor:
    if not count:
        return torch.zeros_like(score_RM, dtype=torch.bool)
    threshold_R1 = score_RM.kthvalue(count, dim=1, keepdim=True).values
    below_RM, level_RM = score_RM < threshold_R1, score_RM == threshold_R1
    wanted_R1 = count - below_RM.sum(1, keepdim=True)
    return below_RM | (level_RM & (level_RM.cumsum(1) <= wanted_R1))
