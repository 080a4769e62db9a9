"""Which routed experts a condensed layer needs beside the shared one.

CD-MoE (arXiv 2412.00069, section 3.2): greedily, the expert that brings the layer's output nearest to what it was.
Axes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeprune.condensing.divergence import divergence


def nearest_experts(
    original_TH: torch.Tensor, start_TH: torch.Tensor, weighted: Mapping[int, torch.Tensor], count: int
) -> list[int]:
    """Choose experts one by one.

    Args:
        original_TH: what the layer puts out.
        start_TH: what stays of it in any case.
        weighted: expert -> its output for every token, `[T, H]`, times its weight in the condensed layer.
        count: how many, or all if there are fewer.

    Returns:
        The experts, in the order of their choice; among equals the one that comes first.
    """
    chosen: list[int] = []
    sum_TH = start_TH.float()
    while len(chosen) < min(count, len(weighted)):
        left = [expert for expert in weighted if expert not in chosen]
        distance = {one: divergence(original_TH, sum_TH + weighted[one]).double().mean().item() for one in left}
        chosen.append(min(left, key=distance.__getitem__))
        sum_TH = sum_TH + weighted[chosen[-1]]
    return chosen
