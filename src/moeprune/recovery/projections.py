"""The last projections of a layer's experts, fitted to what the original layer puts out.

Ridge least squares, expert after expert, each on what the others leave (block Gauss-Seidel), so that memory is bounded
by one expert's neurons. How far an expert moves from what it was is decided on tokens that the fit has not seen.

Axes: T tokens, E experts, n choices of one expert, I expert width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeprune.recovery.ridge import solve
from moeprune.statistics.inside import down_weight
from moeprune.statistics.observer import ExpertsCall

RIDGES = (0.01, 0.1, 1.0, 10.0)  # fractions of the neurons' mean second moment
_SWEEPS = 2


@torch.no_grad()
def fit(
    calls: Sequence[ExpertsCall],
    wanted: Sequence[torch.Tensor],
    say: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
) -> tuple[float, float]:
    """Change the module's weights, in place.

    Args:
        calls: of the pruned layer's experts, one for each batch.
        wanted: what the original's put out for the same tokens, `[T, H]` for each batch.
        say: `[T]` for each batch, the roots of the tokens' weights (`say.roots`).
        held_out: bool `[T]` for each batch: tokens to decide on.

    Returns:
        The share of what was wanted that is missed, in weighted squares, on the tokens held out: before and after.
    """
    module, inside = calls[0].module, [call.inside for call in calls]
    missing = [
        (want_TH.float() - within.mixed(len(want_TH)).float()) * say_T[:, None]
        for want_TH, within, say_T in zip(wanted, inside, say, strict=True)
    ]
    total = _held_out_error(
        [want_TH.float() * say_T[:, None] for want_TH, say_T in zip(wanted, say, strict=True)], held_out
    )
    before = _held_out_error(missing, held_out)
    starts = [torch.tensor([0, *within.counts_R]).cumsum(0).tolist() for within in inside]
    for _ in range(_SWEEPS):
        for expert in range(len(inside[0].counts_R)):
            choices = [slice(start[expert], start[expert + 1]) for start in starts]
            token = [within.token_N[part] for within, part in zip(inside, choices, strict=True)]
            neuron = [
                within.hidden_NI[part].float() * (within.weight_N[part].float() * say_T[token_n])[:, None]
                for within, part, token_n, say_T in zip(inside, choices, token, say, strict=True)
            ]
            neuron_nI = torch.cat(neuron)
            missing_nH = torch.cat([miss_TH[token_n] for miss_TH, token_n in zip(missing, token, strict=True)])
            held_n = torch.cat([held_T[token_n] for held_T, token_n in zip(held_out, token, strict=True)])
            change_HI = _best_change(neuron_nI, missing_nH, held_n)
            if change_HI is None:
                continue
            weight_HI = down_weight(module, expert)
            weight_HI.add_(change_HI.to(weight_HI))
            for miss_TH, token_n, neuron_mI in zip(missing, token, neuron, strict=True):
                miss_TH.index_add_(0, token_n, neuron_mI @ change_HI.T, alpha=-1)
    return before / max(total, 1e-30), _held_out_error(missing, held_out) / max(total, 1e-30)


def _held_out_error(missing: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor]) -> float:
    return sum(float(miss_TH[held_T].square().sum()) for miss_TH, held_T in zip(missing, held_out, strict=True))


def _best_change(neuron_nI: torch.Tensor, missing_nH: torch.Tensor, held_n: torch.Tensor) -> torch.Tensor | None:
    """`[H, I]`: what to add to a projection; None where nothing helps on the tokens that are held out."""
    fitted_nI, unseen_nI, unseen_nH = neuron_nI[~held_n], neuron_nI[held_n], missing_nH[held_n]
    moment_II, target_IH = fitted_nI.T @ fitted_nI, fitted_nI.T @ missing_nH[~held_n]
    best, least = None, unseen_nH.square().sum()
    for ridge in RIDGES:
        change_IH = solve(moment_II, target_IH, ridge)
        error = (unseen_nH - unseen_nI @ change_IH).square().sum()
        if error < least:
            best, least = change_IH.T, error
    return best
