"""What is taken down at each call of the experts. A collector is a few lines; a method names the statistics that it
needs.

Axes as in `observer`; G is the number of groups that blocks fall into by their content.
"""

from __future__ import annotations

from typing import Protocol

import torch

from moeprune.statistics.exact import ExactSum
from moeprune.statistics.observer import ExpertsCall
from moeprune.statistics.stats import LayerStats


class Collector(Protocol):
    """Adds what one call shows to a layer's statistics."""

    def collect(self, call: ExpertsCall, into: LayerStats, group_B: torch.Tensor) -> None:
        """`group_B` is the group of each block; the call's tokens are those of the blocks, one block after another."""


class Usage:
    """`routed_tokens` [E]: tokens that each expert receives; `gate` [E]: the sum of its gate weights over them."""

    def collect(self, call: ExpertsCall, into: LayerStats, group_B: torch.Tensor) -> None:
        index = call.index_TK.reshape(-1).to(torch.int64)
        routed = torch.bincount(index, minlength=into.experts)
        into.counts["routed_tokens"] = into.counts.get("routed_tokens", 0) + routed.cpu()
        gate = torch.zeros(into.experts, dtype=torch.float64, device=index.device)
        gate.index_add_(0, index, call.weight_TK.reshape(-1).to(torch.float64))
        into.sums.setdefault("gate", ExactSum.zeros(into.experts)).add_(gate.cpu())


class Probes:
    """What the experts say to the mean-pooled inputs of the blocks, summed over the blocks of a group.

    A block's tokens are averaged into one input, which all experts of the layer get, routed to or not (C-Prune,
    section 3).

    `probe_output` [G, E, H]: their outputs.
    `probe_contribution` [G, E, H]: their outputs, each times the expert's mean gate weight over the tokens of the block,
    so what it adds to the block's output there; nothing, where it is not routed to.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def collect(self, call: ExpertsCall, into: LayerStats, group_B: torch.Tensor) -> None:
        blocks = len(group_B)
        pooled_BH = call.x_TH.view(blocks, -1, call.x_TH.shape[-1]).mean(dim=1)
        output_BEH = call.every_expert(pooled_BH).to(torch.float64)
        gate_BE = torch.zeros(blocks, into.experts, dtype=torch.float64, device=output_BEH.device)
        gate_BE.scatter_add_(1, call.index_TK.view(blocks, -1).long(), call.weight_TK.view(blocks, -1).double())
        gate_BE /= len(call.x_TH) / blocks
        self._add("probe_output", output_BEH, into, group_B)
        self._add("probe_contribution", gate_BE[:, :, None] * output_BEH, into, group_B)

    def _add(self, name: str, values_BEH: torch.Tensor, into: LayerStats, group_B: torch.Tensor) -> None:
        total = into.sums.setdefault(name, ExactSum.zeros(self.groups, *values_BEH.shape[1:]))
        for group, values_EH in zip(group_B.tolist(), values_BEH.cpu(), strict=True):
            ExactSum(total.limbs[:, group]).add_(values_EH)  # a view: adds to the total in place
