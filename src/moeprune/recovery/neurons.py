"""The neurons of an expert: reading, choosing, matching and writing them, in whatever form a family keeps its experts.

A neuron is one feature of what goes into an expert's last projection: its rows of the first projection (one, or two
where there is a gate), and its column of the last.

Axes: I neurons of an expert, n neurons to choose from, P rows of a neuron (1 or 2), H hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from scipy.optimize import linear_sum_assignment

from moeprune.statistics.inside import down_weight

_AT_ONCE = 1 / 8  # of the neurons that are left, how many go before the others are weighed again


@dataclass(frozen=True)
class Neurons:
    """An expert as its neurons, float32.

    Attributes:
        first_IPH: rows of the first projection.
        first_bias_IP: and their biases, where the family has any.
        down_IH: columns of the last.
        down_bias_H: and its bias.
    """

    first_IPH: torch.Tensor
    first_bias_IP: torch.Tensor | None
    down_IH: torch.Tensor
    down_bias_H: torch.Tensor | None

    def of(self, chosen: torch.Tensor) -> Neurons:
        """Some of them."""
        bias_IP = None if self.first_bias_IP is None else self.first_bias_IP[chosen]
        return Neurons(self.first_IPH[chosen], bias_IP, self.down_IH[chosen], self.down_bias_H)


@torch.no_grad()
def read(module: torch.nn.Module, expert: int) -> Neurons:
    """The neurons of one of a module's experts; copies."""
    name = _first_name(module)
    first = _copy(getattr(module, name)[expert])
    return Neurons(
        _by_neuron(module, first.T if module.is_transposed else first),
        _by_neuron(module, _copy(getattr(module, f"{name}_bias")[expert])) if module.has_bias else None,
        _copy(down_weight(module, expert)).T,
        _copy(cast(torch.Tensor, module.down_proj_bias)[expert]) if module.has_bias else None,
    )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32, copy=True)


@torch.no_grad()
def write(module: torch.nn.Module, expert: int, neurons: Neurons) -> None:
    """Make one of a module's experts of these neurons, as many as it has."""
    name = _first_name(module)
    first_RH = _as_rows(module, neurons.first_IPH)
    cast(torch.Tensor, getattr(module, name))[expert].copy_(first_RH.T if module.is_transposed else first_RH)
    down_weight(module, expert).copy_(neurons.down_IH.T)
    if neurons.first_bias_IP is not None and neurons.down_bias_H is not None:
        cast(torch.Tensor, getattr(module, f"{name}_bias"))[expert].copy_(_as_rows(module, neurons.first_bias_IP))
        cast(torch.Tensor, module.down_proj_bias)[expert].copy_(neurons.down_bias_H)


def activations(module: torch.nn.Module, neurons: Neurons, x_TH: torch.Tensor) -> torch.Tensor:
    """What such neurons make of these inputs in an expert of this module, `[T, I]`."""
    bias_R = None if neurons.first_bias_IP is None else _as_rows(module, neurons.first_bias_IP)
    rows_TR = torch.nn.functional.linear(x_TH.float(), _as_rows(module, neurons.first_IPH), bias_R)
    apply = cast(Callable[[torch.Tensor], torch.Tensor], module._apply_gate if module.has_gate else module.act_fn)
    return apply(rows_TR)


def choose(moment_nn: torch.Tensor, target_nH: torch.Tensor, keep: int) -> torch.Tensor:
    """The neurons that together give a target best, ascending, `[keep]`.

    Backward elimination: the neuron goes whose loss, once the others have made up for it by least squares, is least,
    `|w_n|^2 / [A^-1]_nn` (optimal brain surgeon, Hassibi and Stork 1993, equation 5, for a whole column).

    Args:
        moment_nn: A, the neurons' second moments, regularised.
        target_nH: their moments with the target.
    """
    left = torch.arange(len(moment_nn), device=moment_nn.device)
    while len(left) > keep:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment_nn[left][:, left].double()))
        loss = (inverse @ target_nH[left].double()).square().sum(1) / inverse.diagonal()
        gone = min(len(left) - keep, max(1, int(len(left) * _AT_ONCE)))
        left = left[loss.argsort(stable=True)[gone:].sort().values]
    return left


def matched_mean(experts: list[Neurons], shares: list[float]) -> Neurons:
    """The weighted mean of experts, neuron by neuron, each matched to the first expert's that it resembles most.

    Which neuron is which does not matter to an expert, so it may differ between experts that compute alike. What is
    matched is the cosine of all weights of a neuron (as in git re-basin, arXiv 2209.04836, section 3.2).
    """
    first = experts[0]
    orders = [torch.arange(len(first.down_IH))] + [_matched(first, other) for other in experts[1:]]
    aligned = [expert.of(order) for expert, order in zip(experts, orders, strict=True)]

    def mean(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [share * value for share, value in zip(shares, values, strict=True) if value is not None]
        return torch.stack(present).sum(0) if present else None

    first_IPH, down_IH = mean([one.first_IPH for one in aligned]), mean([one.down_IH for one in aligned])
    assert first_IPH is not None
    assert down_IH is not None
    return Neurons(
        first_IPH,
        mean([one.first_bias_IP for one in aligned]),
        down_IH,
        mean([one.down_bias_H for one in aligned]),
    )


def _matched(one: Neurons, other: Neurons) -> torch.Tensor:
    """Which of the other's neurons stands where, `[I]`."""
    cosine_II = _directions(one) @ _directions(other).T
    _, columns = linear_sum_assignment(cosine_II.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(one.down_IH.device)


def _directions(neurons: Neurons) -> torch.Tensor:
    parts = [*neurons.first_IPH.unbind(1), neurons.down_IH]
    return torch.cat([torch.nn.functional.normalize(part_IH, dim=1) for part_IH in parts], dim=1)


def _first_name(module: torch.nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _by_neuron(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """`[I * P, ...]` in the module's order -> `[I, P, ...]`."""
    if not module.has_gate:
        return rows[:, None]
    if module.is_concatenated:
        return rows.unflatten(0, (2, -1)).transpose(0, 1)
    return rows.unflatten(0, (-1, 2))


def _as_rows(module: torch.nn.Module, by_neuron: torch.Tensor) -> torch.Tensor:
    """The other way round."""
    if module.has_gate and module.is_concatenated:
        by_neuron = by_neuron.transpose(0, 1)
    return by_neuron.flatten(0, 1)
