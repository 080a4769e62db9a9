"""The nearest of many candidates, without measuring all of them on all of the text.

A race (Maron and Moore, "Hoeffding Races", NIPS 1993): the candidates are measured part after part of the text, and
one that is clearly further than the nearest so far drops out. Both are measured on the same tokens, so that what is
compared is the difference on each token; clear is a mean difference of some standard errors. What is left in the end is
measured on all of the text, and then the least counts, however little it is the least by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

STANDARD_ERRORS = 3.0  # of a difference that is hardly chance
_FEWEST_TOKENS = 30  # for a standard error that means anything
_FEWEST_PARTS = 2  # tokens of one part are alike

T = TypeVar("T")


def spread_order(parts: int) -> list[int]:
    """Numbers of the parts in an order of which every beginning is spread over all: neighbours in a text are alike."""
    golden = (5**0.5 - 1) / 2
    return sorted(range(parts), key=lambda part: (part * golden) % 1)


def nearest(candidates: Sequence[T], parts: int, cost: Callable[[T, int], torch.Tensor]) -> T:
    """The candidate whose mean cost is the least.

    Args:
        parts: of the text.
        cost: of a candidate and a part, for each of its tokens, `[t]`.

    Returns:
        Among equals the one that comes first.
    """
    left = list(range(len(candidates)))
    costs: dict[int, torch.Tensor] = {place: torch.empty(0, dtype=torch.float64) for place in left}
    for done, part in enumerate(spread_order(parts), start=1):
        for place in left:
            costs[place] = torch.cat([costs[place], cost(candidates[place], part).double().cpu()])
        leader = min(left, key=lambda place: costs[place].mean())
        if done >= _FEWEST_PARTS:
            left = [place for place in left if not _is_further(costs[place], costs[leader])]
        if len(left) == 1:
            break
    return candidates[leader]


def _is_further(one_T: torch.Tensor, other_T: torch.Tensor) -> bool:
    """Clearly."""
    difference_T = one_T - other_T
    if len(difference_T) < _FEWEST_TOKENS:
        return False
    error = difference_T.std() / len(difference_T) ** 0.5
    return bool(difference_T.mean() > STANDARD_ERRORS * error)
