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
    """`probe_output` [G, E, H]: each expert's outputs on the mean-pooled inputs of the blocks, summed per group.

    A block's tokens are averaged into one input, which all experts of the layer get, routed to or not (C-Prune,
    section 3).
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def collect(self, call: ExpertsCall, into: LayerStats, group_B: torch.Tensor) -> None:
        pooled_BH = call.x_TH.view(len(group_B), -1, call.x_TH.shape[-1]).mean(dim=1)
        output_BEH = call.every_expert(pooled_BH).to(torch.float64)
        total = into.sums.setdefault("probe_output", ExactSum.zeros(self.groups, *output_BEH.shape[1:]))
        for group, output_EH in zip(group_B.tolist(), output_BEH.cpu(), strict=True):
            ExactSum(total.limbs[:, group]).add_(output_EH)  # a view: adds to the total in place
