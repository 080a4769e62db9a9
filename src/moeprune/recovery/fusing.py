"""One expert made of several.

For the tokens of any of them, it shall put out what they put out together, per unit of their gate weights. Three ways
are tried: the first expert alone, the mean of all with neurons matched, and those neurons of all that together do it
best; each with its last projection as it is, and fitted by ridge least squares. Which is taken is decided on tokens
that no fit has seen: where experts began as one, their mean is best; where they did not, their neurons are.

Axes: T tokens of any member, M members, n neurons of all, I of one expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moeprune.recovery.neurons import Neurons, activations, choose, matched_mean, read
from moeprune.recovery.ridge import regularised, solve
from moeprune.statistics.observer import ExpertsCall

RIDGES = (0.01, 0.1, 1.0)  # fractions of the neurons' mean second moment
_RIDGES_OF_CHOICE = (0.01, 0.1)
_MOST_MEMBERS = 4  # whose neurons there is a choice from; the most used ones


@dataclass(frozen=True)
class _Tokens:
    """Inputs of the members, and, as each token has a say, the sums of their gate weights and of their outputs."""

    x_TH: torch.Tensor
    gate_T: torch.Tensor
    wanted_TH: torch.Tensor


def fuse(
    calls: Sequence[ExpertsCall],
    say: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    members: Sequence[int],
) -> Neurons | None:
    """Make one expert of several of a layer. None where no token chose any of them.

    Args:
        calls: of the original layer's experts, one for each batch.
        say: `[T]` for each batch, the roots of the tokens' weights (`say.roots`).
        held_out: bool `[T]` for each batch: tokens to decide on.
        members: the experts, that which stands for them first.
    """
    module = calls[0].module
    experts = [read(module, member) for member in members]
    told = [say_T * ~held_T for say_T, held_T in zip(say, held_out, strict=True)]
    kept_back = [say_T * held_T for say_T, held_T in zip(say, held_out, strict=True)]
    fitted, used_M = _tokens(calls, told, members, experts)
    unseen, _ = _tokens(calls, kept_back, members, experts)
    if not len(fitted.x_TH):
        return None
    share_M = (used_M / used_M.sum()).tolist()
    best, least = experts[0], float("inf")
    for candidate in _candidates(module, experts, share_M, fitted):
        neuron_TI = activations(module, candidate, unseen.x_TH) * unseen.gate_T[:, None]
        bias_TH = 0 if candidate.down_bias_H is None else unseen.gate_T[:, None] * candidate.down_bias_H
        error = float((unseen.wanted_TH - bias_TH - neuron_TI @ candidate.down_IH).square().sum())
        if error < least:
            best, least = candidate, error
    return best


def _candidates(
    module: torch.nn.Module, experts: list[Neurons], share_M: list[float], tokens: _Tokens
) -> Iterator[Neurons]:
    for made in (experts[0], matched_mean(experts, share_M)):
        yield made
        yield from _fitted(made, *_moments(module, made, tokens))
    most_used = sorted(range(len(experts)), key=lambda member: -share_M[member])[:_MOST_MEMBERS]
    everything = _together([experts[member] for member in most_used], [share_M[member] for member in most_used])
    moment_nn, target_nH = _moments(module, everything, tokens)
    for ridge in _RIDGES_OF_CHOICE:
        chosen = choose(regularised(moment_nn, ridge), target_nH, len(experts[0].down_IH))
        without_projection = replace(everything.of(chosen), down_IH=0 * experts[0].down_IH)
        yield from _fitted(without_projection, moment_nn[chosen][:, chosen], target_nH[chosen])


def _fitted(neurons: Neurons, moment_II: torch.Tensor, target_IH: torch.Tensor) -> Iterator[Neurons]:
    """With the last projection moved, more or less, to where it fits."""
    missing_IH = target_IH - moment_II @ neurons.down_IH
    for ridge in RIDGES:
        yield replace(neurons, down_IH=neurons.down_IH + solve(moment_II, missing_IH, ridge))


def _moments(module: torch.nn.Module, neurons: Neurons, tokens: _Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    neuron_Tn = activations(module, neurons, tokens.x_TH) * tokens.gate_T[:, None]
    bias_TH = 0 if neurons.down_bias_H is None else tokens.gate_T[:, None] * neurons.down_bias_H
    return neuron_Tn.T @ neuron_Tn, neuron_Tn.T @ (tokens.wanted_TH - bias_TH)


def _together(experts: list[Neurons], shares: list[float]) -> Neurons:
    """All their neurons side by side; biases of the output are their mean."""
    biases = [one.first_bias_IP for one in experts if one.first_bias_IP is not None]
    whole = sum(shares)
    down_biases = [
        share / whole * one.down_bias_H
        for share, one in zip(shares, experts, strict=True)
        if one.down_bias_H is not None
    ]
    return Neurons(
        torch.cat([one.first_IPH for one in experts]),
        torch.cat(biases) if biases else None,
        torch.cat([one.down_IH for one in experts]),
        torch.stack(down_biases).sum(0) if down_biases else None,
    )


def _tokens(
    calls: Sequence[ExpertsCall], say: Sequence[torch.Tensor], members: Sequence[int], experts: list[Neurons]
) -> tuple[_Tokens, torch.Tensor]:
    """The tokens of any member that have a say, and how much each member is used, `[M]`."""
    parts, used_M = [], torch.zeros(len(members), device=calls[0].x_TH.device)
    for call, say_T in zip(calls, say, strict=True):
        gate_TM = torch.stack(
            [((call.index_TK == member) * call.weight_TK).sum(1, dtype=torch.float32) for member in members], dim=1
        )
        rows = torch.where((say_T > 0) & (gate_TM != 0).any(1))[0]
        gate_TM, x_TH = gate_TM[rows] * say_T[rows, None], call.x_TH[rows].float()
        wanted_TH = torch.zeros_like(x_TH)
        for gate_T, neurons in zip(gate_TM.T, experts, strict=True):
            own = torch.where(gate_T != 0)[0]
            output_tH = activations(call.module, neurons, x_TH[own]) @ neurons.down_IH
            if neurons.down_bias_H is not None:
                output_tH = output_tH + neurons.down_bias_H
            wanted_TH[own] += gate_T[own, None] * output_tH
        used_M += gate_TM.sum(0)
        parts.append((x_TH, gate_TM.sum(1), wanted_TH))
    return _Tokens(*(torch.cat(values) for values in zip(*parts, strict=True))), used_M
