"""What is taken down at each call of the experts. A collector is a few lines, registered by the statistic it makes; a
method names the statistics that it needs.

Axes: B sequences, S tokens of a sequence with its padding, T = B * S, K experts per token, E experts of the layer, R
experts that the call shows (all, or a range of them), H hidden size, G groups that sequences fall into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from moeprune.errors import InputError
from moeprune.statistics.inside import Inside
from moeprune.statistics.observer import ExpertsCall

Index = tuple[int | slice, ...]
_TOKENS_AT_ONCE = 2048
STAND_IN_SHARE = 0.1  # of what the chosen experts cost, how much every expert on a sample of the tokens may


@dataclass(frozen=True)
class Seen:
    """A call of a layer's experts, and what calibration knows of the sequences in it.

    Attributes:
        call: its tokens are those of the sequences, one sequence after another, padding included.
        mask_BS: bool; False is padding, which must not count.
        group_B: the group of each sequence.
        groups: how many groups there are.
    """

    call: ExpertsCall
    mask_BS: torch.Tensor
    group_B: torch.Tensor
    groups: int

    @property
    def shown(self) -> slice:
        """The experts that the call shows, as a slice of all."""
        return slice(self.call.experts.start, self.call.experts.stop)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.mask_BS.all())

    @cached_property
    def choices(self) -> Inside:
        """What happened inside the experts, without padding and without choices that weigh nothing."""
        inside = self.call.inside
        counts_N = inside.weight_N != 0
        if self.padded:
            counts_N &= self._mask[inside.token_N, 0]
        return inside if counts_N.all() else inside.of(counts_N)

    @cached_property
    def _mask(self) -> torch.Tensor:
        """`[T, 1]`, where the tokens are."""
        return self.mask_BS.to(self.call.x_TH.device).view(-1, 1)

    def by_expert(self, value_TK: torch.Tensor) -> torch.Tensor:
        """`[T, R]`: a value per chosen expert, laid out by experts; 0 where an expert was not chosen, or for padding.

        Nothing is added to a place twice, so that the result is the same on any device.
        """
        if self.padded:
            value_TK = value_TK * self._mask
        # What some families choose beyond the experts, to run nothing, lands in one more column.
        index_TK = self.call.index_TK.to(torch.int64).clamp(max=self.call.layer_experts)
        value_TE = torch.zeros(len(value_TK), self.call.layer_experts + 1, dtype=value_TK.dtype, device=value_TK.device)
        return value_TE.scatter_add_(1, index_TK, value_TK)[:, self.shown]

    def mean_inputs(self) -> torch.Tensor:
        """`[B, H]`: the mean of each sequence's inputs, over its tokens."""
        x_BSH = self.call.x_TH.view(*self.mask_BS.shape, -1)
        tokens: int | torch.Tensor = x_BSH.shape[1]
        if self.padded:
            mask_BS1 = self._mask.view(*self.mask_BS.shape, 1)
            x_BSH, tokens = x_BSH.where(mask_BS1, 0), mask_BS1.sum(1)
        return (x_BSH.sum(1, dtype=torch.float32) / tokens).to(x_BSH.dtype)


@dataclass(frozen=True)
class Collector:
    """How a statistic is made.

    Attributes:
        shape: of the statistic, from what the first call shows.
        part: the part of it that a call adds to.
        values: what the call adds there. They must not depend on the order in which threads add.
        counts: whether it holds whole numbers.
        inside: whether it looks at what happens inside the experts.
        compares: whether it compares experts, and so needs all of a layer at once.
    """

    shape: Callable[[Seen], tuple[int, ...]]
    part: Callable[[Seen], Index]
    values: Callable[[Seen], torch.Tensor]
    counts: bool = False
    inside: bool = False
    compares: bool = False


def _routed_tokens(seen: Seen) -> torch.Tensor:
    # A choice that weighs nothing is none: some families put it in place of skipping the experts.
    return seen.by_expert((seen.call.weight_TK != 0).to(torch.int32)).sum(0, dtype=torch.int64)


def _gate(seen: Seen) -> torch.Tensor:
    return seen.by_expert(seen.call.weight_TK.float()).sum(0, dtype=torch.float64)


def _probe_output(seen: Seen) -> torch.Tensor:
    output_BRH = seen.call.every_expert(seen.mean_inputs())
    sum_GRH = torch.zeros(seen.groups, *output_BRH.shape[1:], dtype=torch.float64, device=output_BRH.device)
    groups = seen.group_B.tolist()
    for group in set(groups):
        sum_GRH[group] = output_BRH[[group == other for other in groups]].sum(0, dtype=torch.float64)
    return sum_GRH


def _gated_norm(seen: Seen) -> torch.Tensor:
    inside = seen.choices
    norm_N = inside.output_NH.float().norm(dim=-1) * inside.weight_N.float()
    return inside.sum_by_expert(norm_N)


def _output(seen: Seen) -> torch.Tensor:
    return seen.choices.sum_by_expert(seen.choices.output_NH.float())


def _output_square(seen: Seen) -> torch.Tensor:
    return seen.choices.sum_by_expert(seen.choices.output_NH.float().square().sum(-1))


def _input_square(seen: Seen) -> torch.Tensor:
    inside = seen.choices
    return inside.sum_by_expert(seen.call.x_TH[inside.token_N].float().square())


def _gated_input_square(seen: Seen) -> torch.Tensor:
    inside = seen.choices
    gated_NH = seen.call.x_TH[inside.token_N].float() * inside.weight_N[:, None].float()
    return inside.sum_by_expert(gated_NH.square())


def _hidden_square(seen: Seen) -> torch.Tensor:
    return seen.choices.sum_by_expert(seen.choices.hidden_NI.float().square())


def _gated_hidden_square(seen: Seen) -> torch.Tensor:
    inside = seen.choices
    return inside.sum_by_expert((inside.hidden_NI.float() * inside.weight_N[:, None].float()).square())


def _overlap(seen: Seen) -> torch.Tensor:
    inside, experts = seen.choices, seen.call.layer_experts
    _all_in_memory(seen.call)
    expert_N = torch.repeat_interleave(
        torch.arange(experts, device=inside.token_N.device), torch.tensor(inside.counts_R, device=inside.token_N.device)
    )
    order_N = inside.token_N.argsort(stable=True)
    gated_NH = inside.output_NH.float() * inside.weight_N[:, None].float()
    overlap_EE = torch.zeros(experts, experts, dtype=torch.float64, device=gated_NH.device)
    per_token = torch.bincount(inside.token_N, minlength=1)
    for chosen in per_token.unique().tolist():  # nearly always one number: experts per token
        if not chosen:
            continue
        place_TK = order_N[(per_token[inside.token_N[order_N]] == chosen)].view(-1, chosen)
        for place_tK in place_TK.split(_TOKENS_AT_ONCE):
            gated_tKH, expert_tK = gated_NH[place_tK], expert_N[place_tK]
            product_tKK = (gated_tKH @ gated_tKH.mT).double()
            overlap_EE.index_put_(
                (expert_tK[:, :, None].expand_as(product_tKK), expert_tK[:, None, :].expand_as(product_tKK)),
                product_tKK,
                accumulate=True,
            )
    return overlap_EE


def _stand_in(seen: Seen) -> torch.Tensor:
    """Of a sample of the tokens, evenly from each sequence: every expert runs on it, which is what this costs."""
    call = seen.call
    _all_in_memory(call)
    step = math.ceil(call.layer_experts / (STAND_IN_SHARE * call.index_TK.shape[-1]))
    place_BS = seen.mask_BS.cumsum(1) - 1
    first_B1 = seen.mask_BS.sum(1, keepdim=True).clamp(max=step) // 2  # so that short sequences have a say, too
    sample_n = (seen.mask_BS & (place_BS % step == first_B1)).flatten().nonzero()[:, 0].to(call.x_TH.device)
    index_nK, weight_nK = call.index_TK[sample_n].to(torch.int64), call.weight_TK[sample_n].double()
    output_nEH = call.every_expert(call.x_TH[sample_n]).float()
    there_nK = index_nK < call.layer_experts
    own_nK = index_nK.clamp(max=call.layer_experts - 1)
    square_nE = output_nEH.square().sum(-1)
    own_nKH = output_nEH.gather(1, own_nK[:, :, None].expand(-1, -1, output_nEH.shape[-1]))
    square_nK = square_nE.gather(1, own_nK)
    loss_nKE = (square_nK[:, :, None] + square_nE[:, None] - 2 * own_nKH @ output_nEH.mT).clamp_(min=0).double()
    loss_nKE.scatter_(2, own_nK[:, :, None], square_nK[:, :, None].double())
    loss_nKE *= (weight_nK.square() * there_nK)[:, :, None]
    loss_EE = torch.zeros(call.layer_experts, call.layer_experts, dtype=torch.float64, device=call.x_TH.device)
    return loss_EE.index_add_(0, own_nK.flatten(), loss_nKE.flatten(0, 1))


def _all_in_memory(call: ExpertsCall) -> None:
    if len(call.experts) < call.layer_experts:
        raise InputError(
            "experts are compared with each other (stand_in, overlap), which needs all of a layer in memory at once; "
            "give a larger --memory-limit, or calibrate for a method that compares none (--for c-prune)"
        )


def _per_expert(seen: Seen) -> tuple[int, ...]:
    return (seen.call.layer_experts,)


def _per_input(seen: Seen) -> tuple[int, ...]:
    return (seen.call.layer_experts, seen.call.x_TH.shape[-1])


def _per_hidden(seen: Seen) -> tuple[int, ...]:
    return (seen.call.layer_experts, seen.choices.hidden_NI.shape[-1])


def _shown(seen: Seen) -> Index:
    return (seen.shown,)


COLLECTORS = {
    # Tokens that each expert receives.
    "routed_tokens": Collector(_per_expert, _shown, _routed_tokens, counts=True),
    # The sum of its gate weights over them.
    "gate": Collector(_per_expert, _shown, _gate),
    # Each expert's outputs on the mean inputs of the sequences, routed to it or not, summed per group (C-Prune,
    # section 3).
    "probe_output": Collector(
        lambda seen: (seen.groups, seen.call.layer_experts, seen.call.x_TH.shape[-1]),
        lambda seen: (slice(None), seen.shown),
        _probe_output,
    ),
    # The norm of each expert's output times its gate weight, over its tokens (REAP, arXiv 2510.13999, section 4).
    "gated_norm": Collector(_per_expert, _shown, _gated_norm, inside=True),
    # Each expert's outputs over its tokens, unweighted, and their squared norms.
    "output": Collector(_per_input, _shown, _output, inside=True),
    "output_square": Collector(_per_expert, _shown, _output_square, inside=True),
    # The squares of what goes into each expert's projections, by feature: its first (input) and its last (hidden), as
    # they are (Wanda, arXiv 2306.11695) and times the gate weight (MoE-Pruner, arXiv 2410.12013, section 3).
    "input_square": Collector(_per_input, _shown, _input_square, inside=True),
    "hidden_square": Collector(_per_hidden, _shown, _hidden_square, inside=True),
    "gated_input_square": Collector(_per_input, _shown, _gated_input_square, inside=True),
    "gated_hidden_square": Collector(_per_hidden, _shown, _gated_hidden_square, inside=True),
    # The inner products of the experts' weighted outputs for the same token: `1' overlap 1` over the experts that go is
    # the squared error of leaving them out (NAEE, arXiv 2402.14800, section 3.2, without a second routing).
    "overlap": Collector(
        lambda seen: (seen.call.layer_experts, seen.call.layer_experts),
        lambda seen: (slice(None), slice(None)),
        _overlap,
        inside=True,
        compares=True,
    ),
    # What is lost where one expert stands in for another on tokens that chose that: in row i, column j, the sum of
    # g_i^2 |f_i - f_j|^2; on the diagonal, g_i^2 |f_i|^2, where nothing stands in.
    "stand_in": Collector(
        lambda seen: (seen.call.layer_experts, seen.call.layer_experts),
        lambda seen: (slice(None), slice(None)),
        _stand_in,
        compares=True,
    ),
}

OUTSIDE = tuple(name for name, one in COLLECTORS.items() if not (one.inside or one.compares))


def find(statistics: Iterable[str]) -> dict[str, Collector]:
    """The collectors of statistics, each once. Raises InputError for one that nobody collects."""
    wanted = sorted(set(statistics))
    if unknown := [name for name in wanted if name not in COLLECTORS]:
        raise InputError(f"unknown statistics: {', '.join(unknown)}; known: {', '.join(sorted(COLLECTORS))}")
    return {name: COLLECTORS[name] for name in wanted}
