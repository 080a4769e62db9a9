"""The errors that a student is asked to make small, as formulas.

Those of a layer are shares of what was wanted, so that layers of any size weigh alike, and tokens have a say as in
`recovery.say`: a few whose outputs are huge are not all that is heard. Those of the whole model are in nats, and taken
some tokens at a time: what comes between logits and an error is several times as large as they are, where a vocabulary
is large, and is made again for the backward pass instead of kept.

Axes: T tokens, H hidden size, R experts, N choices of experts, ordered by expert; B sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

_LEAST = 1e-30
_TOKENS_AT_ONCE = 64


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


def divergence(
    logits_NV: torch.Tensor, top_NK: torch.Tensor, log_share_NK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The Kullback-Leibler divergence of the student's next tokens from the teacher's, in nats, times the square of the
    temperature, which leaves gradients their size (Hinton et al., arXiv 1503.02531, section 2). A scalar.

    The teacher's most probable tokens are compared one by one and all others as one, so that its whole probability
    counts: a bound from below that is reached where K is all of V.

    Args:
        logits_NV: the student's; N tokens, V of the vocabulary.
        top_NK: int64, the teacher's K most probable tokens.
        log_share_NK: the logarithms of their probabilities, at this temperature.
    """

    def of_some(logits_NV: torch.Tensor, top_NK: torch.Tensor, log_share_NK: torch.Tensor) -> torch.Tensor:
        scaled_NV = logits_NV.float() / temperature
        total_N1 = scaled_NV.logsumexp(-1, keepdim=True)
        share_NK = log_share_NK.float().exp()
        among_top_N = (share_NK * (log_share_NK.float() - scaled_NV.gather(-1, top_NK) + total_N1)).sum(-1)
        if top_NK.shape[-1] == logits_NV.shape[-1]:
            return among_top_N
        others_N = scaled_NV.scatter(-1, top_NK, -torch.inf).logsumexp(-1) - total_N1[..., 0]
        rest_N = (1 - share_NK.sum(-1)).clamp_min(_LEAST)
        return among_top_N + rest_N * (rest_N.log() - others_N)

    return _total(of_some, logits_NV, top_NK, log_share_NK) * (temperature**2 / len(logits_NV))


def cross_entropy(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    """Of each token given those before it, in nats, the mean over all but the first of each sequence. A scalar."""
    of_no_token = -1
    next_BS = torch.nn.functional.pad(ids_BS[:, 1:], (0, 1), value=of_no_token)

    def of_some(logits_NV: torch.Tensor, next_N: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_NV.float(), next_N, ignore_index=of_no_token, reduction="none")

    return _total(of_some, logits_BSV.flatten(0, 1), next_BS.flatten()) / ids_BS[:, 1:].numel()


def _total(error: Callable[..., torch.Tensor], *of_tokens: torch.Tensor) -> torch.Tensor:
    """Over tokens, of what `error` makes of some of them: a number each."""
    some_at_a_time = zip(*(rows.split(_TOKENS_AT_ONCE) for rows in of_tokens), strict=True)
    errors = [checkpoint(error, *some, use_reentrant=False, preserve_rng_state=False) for some in some_at_a_time]
    return torch.cat(errors).sum()


def _squares(out: torch.Tensor, wanted: torch.Tensor, say: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what is missed and of what was wanted, weighted, row by row."""
    wanted, weight = wanted.float(), say.square()
    return (out.float() - wanted).square().sum(1) * weight, wanted.square().sum(1) * weight
