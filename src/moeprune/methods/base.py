"""What every method is: from Stats (and what else it asks for) to what becomes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from moeprune.clusters import Clusters
from moeprune.plan import LayerPlan, Recovery, Sparsity
from moeprune.router_groups import NO_GROUPS, RouterGroups
from moeprune.statistics import LayerStats, Stats


class Options(BaseModel):
    """A method's options: their names, defaults and, in each field's description, what they mean."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Evidence:
    """What a method decides on.

    Attributes:
        stats: of the model on the calibration data.
        clusters: of its experts; there for a method that `uses_clusters`.
        trial: the model itself and some of the text; there for a method that `tries`.
    """

    stats: Stats
    clusters: Clusters | None = None
    trial: Trial | None = None


@dataclass(frozen=True)
class Trial:
    """The model on some of the calibration text, for methods that must see more than sums.

    Attributes:
        model: in memory, on its device, in evaluation mode.
        ids_BS: int64 token ids, `[blocks, tokens per block]`.
    """

    model: PreTrainedModel
    ids_BS: torch.Tensor


@dataclass(frozen=True)
class Decision:
    """What a method decides: the parts of a Plan that are its own. See `Plan`."""

    layers: dict[str, LayerPlan]
    score: str = ""
    sparsity: Sparsity | None = None
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Method:
    """A way to decide.

    Attributes:
        name: as the user writes it.
        summary: one line for the help.
        decide: `(evidence, ratio, options) -> Decision`.
        options: the type of its options.
        uses_clusters: whether the evidence must hold Clusters.
        tries: whether the evidence must hold a Trial.
        removes: what the ratio is a fraction of.
        statistics: what the Stats must hold, by the names that `statistics.collectors` registers.
        foresee: `(layers, ratio, options) -> Decision` of the size that `decide` will make, from the layers' numbers of
            experts alone, for `moeprune estimate`; None where it drops experts and does nothing else to them, or none.
    """

    name: str
    summary: str
    decide: Callable[[Evidence, float, Any], Decision]
    options: type[Options] = Options
    uses_clusters: bool = False
    tries: bool = False
    removes: Literal["experts", "weights", "layers"] = "experts"
    statistics: frozenset[str] = frozenset()
    foresee: Callable[[Mapping[str, LayerStats], float, Any], Decision] | None = None


def count_of(ratio: float, experts: int, groups: RouterGroups = NO_GROUPS) -> int:
    """The whole number of experts that a ratio removes, the same of each of the router's groups.

    Never more than the ratio says; a rounding error does not cost one.
    """
    return groups.whole(int(ratio * experts + 1e-9))


def keep_best(score_E: Sequence[float], ratio: float, layer: LayerStats) -> LayerPlan:
    """A layer that loses a ratio of its experts, those of the lowest scores; among equals, those of lower index."""
    ascending = sorted(range(layer.experts), key=score_E.__getitem__)
    return keep_last(ascending, ratio, layer).model_copy(update={"scores": list(score_E)})


def keep_last(order: Iterable[int], ratio: float, layer: LayerStats) -> LayerPlan:
    """A layer that loses a ratio of its experts, those first that come first in the order."""
    count = count_of(ratio, layer.experts, layer.groups)
    drop = layer.groups.take(order, count, layer.experts)
    return keep(keep_all_but(drop, layer.experts), layer)


def keep_any(layers: Mapping[str, LayerStats], ratio: float) -> dict[str, LayerPlan]:
    """Layers that lose a ratio of their experts, whichever those are: enough to know how large what stays is."""
    return {name: keep_last(reversed(range(layer.experts)), ratio, layer) for name, layer in layers.items()}


def keep(experts: list[int], layer: LayerStats) -> LayerPlan:
    """A layer in which these experts stay, and nothing else changes."""
    return LayerPlan(experts=layer.experts, top_k=layer.top_k, keep=experts)


def keep_all_but(drop: list[int], experts: int) -> list[int]:
    """The experts that stay, ascending."""
    gone = set(drop)
    return [expert for expert in range(experts) if expert not in gone]
