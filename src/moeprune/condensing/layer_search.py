"""Which layers to condense.

CD-MoE (arXiv 2412.00069, section 3.3): greedily, the layer that moves the model's final hidden states least, those
chosen before condensed already. The candidates race over the batches of text, each run from its layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moeprune.condensing.condensed import Condensed
from moeprune.condensing.divergence import divergence
from moeprune.condensing.partial_runs import PartialRuns, Run
from moeprune.condensing.race import nearest


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
    search = _Search(runs, candidates, [_Batch(run, dict(run.entering)) for run in originals])
    while len(search.chosen) < count:
        left = [name for name in candidates if name not in search.chosen]
        search.chosen.append(nearest(left, len(originals), search.moved))
        on_layer(len(search.chosen), count)
    return search.chosen


@dataclass
class _Batch:
    """A batch of text.

    Attributes:
        original: the model's run on it.
        entering: number of each layer -> what it is given with the first `known` of the chosen layers condensed.
    """

    original: Run
    entering: dict[int, torch.Tensor]
    known: int = 0


class _Search:
    def __init__(self, runs: PartialRuns, candidates: Mapping[str, Condensed], batches: list[_Batch]) -> None:
        self.chosen: list[str] = []
        self._runs, self._candidates, self._batches = runs, candidates, batches

    def moved(self, name: str, batch: int) -> torch.Tensor:
        """By how much a candidate moves each token of a batch."""
        self._condense_chosen(batch)
        run = self._run(batch, [*self.chosen, name], self._runs.layer_of(name))
        return divergence(self._batches[batch].original.final_BSH, run.final_BSH).flatten()

    def _condense_chosen(self, batch: int) -> None:
        """What comes of the winner of a race that ended early is not known of all batches; of some it is not asked."""
        it = self._batches[batch]
        if new := self.chosen[it.known :]:
            run = self._run(batch, self.chosen, min(map(self._runs.layer_of, new)))
            it.entering.update(run.entering)
            it.known = len(self.chosen)

    def _run(self, batch: int, names: Sequence[str], first: int) -> Run:
        condensed = [self._candidates[name] for name in names]
        return self._runs.condensed(batch, condensed, first, self._batches[batch].entering[first])
