"""What every method is: from Stats (and Clusters) to the experts that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from moeprune.clusters import Clusters
from moeprune.router_groups import NO_GROUPS, RouterGroups
from moeprune.statistics import LayerStats, Stats

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


def count_of(ratio: float, experts: int, groups: RouterGroups = NO_GROUPS) -> int:
    """The whole number of experts that a ratio removes, the same of each of the router's groups.

    Never more than the ratio says; a rounding error does not cost one.
    """
    return groups.whole(int(ratio * experts + 1e-9))


def keep_last(order: Iterable[int], ratio: float, layer: LayerStats) -> list[int]:
    """The experts of a layer that stay where a ratio of them goes, those first that come first in the order."""
    count = count_of(ratio, layer.experts, layer.groups)
    return keep_all_but(layer.groups.take(order, count, layer.experts), layer.experts)


def keep_all_but(drop: list[int], experts: int) -> list[int]:
    """The experts that stay, ascending."""
    gone = set(drop)
    return [expert for expert in range(experts) if expert not in gone]
