"""The errors that a student is asked to make small, as formulas.

All are shares of what was wanted, so that layers of any size weigh alike, and tokens have a say as in `recovery.say`:
a few whose outputs are huge are not all that is heard.

Axes: T tokens, H hidden size, R experts, N choices of experts, ordered by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LEAST = 1e-30


def block_error(out_TH: torch.Tensor, wanted_TH: torch.Tensor, say_T: torch.Tensor) -> torch.Tensor:
    """`sum_t (say_t |out_t - wanted_t|)^2 / sum_t (say_t |wanted_t|)^2`, a scalar.

    Args:
        say_T: the roots of the tokens' weights (`recovery.say.roots`).
    """
    missed_T, wanted_T = _squares(out_TH, wanted_TH, say_T)
    return missed_T.sum() / wanted_T.sum().clamp_min(_LEAST)


def experts_error(
    out_NH: torch.Tensor, wanted_NH: torch.Tensor, say_N: torch.Tensor, counts_R: Sequence[int]
) -> torch.Tensor:
    """Each expert's share that is missed, as of a block, on the tokens it receives; the mean over experts that receive
    any (MoE-Pruner, arXiv 2410.12013, section 3.3, there in absolute squares). A scalar.

    Args:
        out_NH: what the student's experts put out, unweighted.
        wanted_NH: what the teacher's own make of the same tokens.
        say_N: as of a block's tokens, for each choice.
        counts_R: how many of the choices are each expert's.
    """
    counts = torch.tensor(counts_R, device=out_NH.device)
    expert_N = torch.repeat_interleave(torch.arange(len(counts), device=out_NH.device), counts)
    missed_R, wanted_R = (
        square_N.new_zeros(len(counts)).index_add(0, expert_N, square_N)
        for square_N in _squares(out_NH, wanted_NH, say_N)
    )
    return (missed_R / wanted_R.clamp_min(_LEAST)).sum() / (counts > 0).sum().clamp_min(1)


def _squares(out: torch.Tensor, wanted: torch.Tensor, say: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what is missed and of what was wanted, weighted, row by row."""
    wanted, weight = wanted.float(), say.square()
    return (out.float() - wanted).square().sum(1) * weight, wanted.square().sum(1) * weight
