"""What the needs are computed from, and the few amounts that several steps share.

Axes in formulas: T tokens that are computed together, S tokens of a block, K experts per token, E experts, H hidden
size, I expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.anatomy import Anatomy
from moeprune.estimation.machines import Machine
from moeprune.estimation.statistics_size import bytes_of_stats
from moeprune.estimation.work import Work
from moeprune.methods import find, statistics_of_run
from moeprune.plan import Plan
from moeprune.statistics.calibration import GROUPS
from moeprune.streaming.room import CONVERSION, SLACK, bytes_of_pass

FLOAT32 = 4


@dataclass(frozen=True)
class Case:
    """One run that is to be estimated.

    Attributes:
        original, pruned: the model, and what the plan makes of it.
        plan: that the run carries out, or one of its size.
        is_here: whether the original's files need not be brought to a pod's disk to be loaded as a whole.
    """

    original: Anatomy
    pruned: Anatomy
    plan: Plan
    work: Work
    machine: Machine
    is_here: bool

    @property
    def item(self) -> int:
        """Bytes of a number of a loaded model."""
        return self.machine.item

    @property
    def statistics(self) -> list[str]:
        """That the run collects."""
        return statistics_of_run([self.work.method, *self.work.baselines])

    @property
    def stats_bytes(self) -> int:
        return bytes_of_stats(self.original, self.statistics, GROUPS)

    @property
    def tries(self) -> bool:
        """Whether a method must have the model in memory to decide."""
        return any(find(method).tries for method in (self.work.method, *self.work.baselines))

    @property
    def brought(self) -> Term:
        """The original's files, where a step that loads it as a whole must bring them to its disk first."""
        return Term("the original, brought here", 0 if self.is_here else self.original.bytes_on_disk)


def weights(model: Anatomy, item: int, what: str) -> Term:
    """A model in memory."""
    return Term(what, model.parameters * item)


def converting(model: Anatomy, item: int) -> Term:
    """While a layer's experts are fused on loading, those that they are made of are there, too."""
    return Term("experts of a layer, while they are fused", (CONVERSION - 1) * model.largest.routed * item)


def on_its_way(case: Case, model: Anatomy) -> Amount:
    """A model that goes to a single GPU is in the pod's memory first."""
    return Amount.of(weights(model, case.item, "the model, on its way to a GPU"), converting(model, case.item))


def one_pass(model: Anatomy, tokens: int, item: int) -> Term:
    """The forward pass of so many tokens, through the layer where that takes most."""
    largest = max(
        bytes_of_pass(tokens, hidden=model.hidden, width=layer.width, top_k=layer.top_k, item=item)
        for layer in model.layers.values()
    )
    return Term(f"a pass of {tokens:,} tokens", largest, Basis.ASSUMED)


def forward(model: Anatomy, tokens: int, block_tokens: int, *, head: bool = False) -> float:
    """Operations: two for each parameter that a token is multiplied with, and the scores of attention."""
    per_token = 2.0 * model.active + (2.0 * model.head if head else 0)
    scores = 2.0 * model.blocks * model.attention * block_tokens  # half of them are of tokens to come
    return tokens * (per_token + scores)


def least_limit(model: Anatomy, item: int, tokens: int, fewest_experts: int, libraries: int) -> int:
    """As little memory as streaming can do with (`streaming.room.share_out`)."""
    expert = max(layer.per_expert for layer in model.layers.values()) * item
    part = model.largest_part * item
    return int(libraries + SLACK + one_pass(model, tokens, item).value + CONVERSION * (part + fewest_experts * expert))
