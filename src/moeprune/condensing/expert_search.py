"""Which routed experts a condensed layer needs beside the shared one.

CD-MoE (arXiv 2412.00069, section 3.2): greedily, the expert that brings the layer's output nearest to what it was. The
experts race over parts of the tokens; one is run on no more of them than its races need.
Axes: t tokens of a part, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from moeprune.condensing.divergence import divergence
from moeprune.condensing.race import nearest


def nearest_experts(
    original: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    experts: Sequence[int],
    weighted: Callable[[int, int], torch.Tensor],
    count: int,
) -> list[int]:
    """Choose experts one by one.

    Args:
        original: what the layer puts out for each part of the tokens, `[t, H]`.
        start: what stays of it in any case.
        experts: to choose of.
        weighted: of an expert and a part, its output times its weight in the condensed layer, `[t, H]`. Not asked for
            the same twice.
        count: how many, or all if there are fewer.

    Returns:
        The experts, in the order of their choice; among equals the one that comes first.
    """
    chosen: list[int] = []
    put_out = cache(weighted)

    def distance(expert: int, part: int) -> torch.Tensor:
        of_chosen = (put_out(one, part) for one in [*chosen, expert])
        return divergence(original[part], sum(of_chosen, start[part].float()))

    while len(chosen) < min(count, len(experts)):
        left = [expert for expert in experts if expert not in chosen]
        chosen.append(nearest(left, len(original), distance))
    return chosen
