"""What every method is: from Stats (and Clusters) to the experts that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from moeprune.clusters import Clusters
from moeprune.statistics import Stats

Keep = dict[str, list[int]]


class Options(BaseModel):
    """A method's options: their names, defaults and, in each field's description, what they mean."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Evidence:
    """What a method decides on.

    Attributes:
        stats: of the model on the calibration data.
        clusters: of its experts; there for a method that `uses_clusters`.
    """

    stats: Stats
    clusters: Clusters | None = None


@dataclass(frozen=True)
class Method:
    """A way to decide.

    Attributes:
        name: as the user writes it.
        summary: one line for the help.
        decide: `(evidence, ratio, options) -> indices of the experts that stay, by layer`.
        options: the type of its options.
        uses_clusters: whether the evidence must hold Clusters.
        statistics: what the Stats must hold, by the names that `statistics.collectors` registers.
    """

    name: str
    summary: str
    decide: Callable[[Evidence, float, Any], Keep]
    options: type[Options] = Options
    uses_clusters: bool = False
    statistics: frozenset[str] = frozenset()


def count_of(ratio: float, experts: int) -> int:
    """The whole number of experts that a ratio removes, never more than it says. A rounding error does not cost one."""
    return int(ratio * experts + 1e-9)


def keep_all_but(drop: list[int], experts: int) -> list[int]:
    """The experts that stay, ascending."""
    gone = set(drop)
    return [expert for expert in range(experts) if expert not in gone]
