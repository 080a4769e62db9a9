"""Which layers to condense.

CD-MoE (arXiv 2412.00069, section 3.3): greedily, the layer that moves the model's final hidden states least, those
chosen before condensed already. A candidate is run on the text batch by batch, and only while what its divergence adds
up to is the least of all: no divergence is negative, so the first candidate to be done is the nearest, as if all had
been run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush

from moeprune.condensing.condensed import Condensed
from moeprune.condensing.divergence import divergence
from moeprune.condensing.partial_runs import PartialRuns, Run


def nearest_layers(
    runs: PartialRuns,
    originals: Sequence[Run],
    candidates: Mapping[str, Condensed],
    count: int,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Choose layers one by one.

    Args:
        originals: of the model as it is, one for each batch.
        candidates: experts module -> its layer, condensed.
        count: how many.
        on_layer: called with how many are chosen, and of how many.

    Returns:
        The names, in the order of their choice; among equals the one that comes first.
    """
    chosen: list[str] = []
    entering = [dict(run.entering) for run in originals]

    def run(name: str, batch: int) -> Run:
        layer = runs.layer_of(name)
        return runs.condensed(batch, [candidates[one] for one in (*chosen, name)], layer, entering[batch][layer])

    def moved(name: str, batch: int) -> float:
        return divergence(originals[batch].final_BSH, run(name, batch).final_BSH).double().sum().item()

    while len(chosen) < count:
        nearest = first_done([name for name in candidates if name not in chosen], len(originals), moved)
        for batch, of_batch in enumerate(entering):
            of_batch.update(run(nearest, batch).entering)
        chosen.append(nearest)
        on_layer(len(chosen), count)
    return chosen


def first_done(candidates: Sequence[str], parts: int, cost: Callable[[str, int], float]) -> str:
    """The candidate whose costs of all parts add up to the least, computing no more of them than that takes.

    Args:
        cost: of a candidate and a part; never negative.
    """
    costs = [(0.0, place, 0) for place in range(len(candidates))]
    while True:
        so_far, place, done = heappop(costs)
        if done == parts:
            return candidates[place]
        heappush(costs, (so_far + cost(candidates[place], done), place, done + 1))
