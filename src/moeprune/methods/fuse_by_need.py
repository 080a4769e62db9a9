"""fuse-by-need: as fuse, but layers on which the model's answers depend more keep more of their experts.

How much a layer matters is measured: with its experts answered for as fuse would have it, and all other layers whole,
the model's next-token probabilities move by `m` (`sensitivity`). With k experts it is then taken to need

    need(k) = m * (lost(k) / lost(u))^2

where `lost` is fuse's sum over the layer, and u its share of the budget. The square stands for recovery, which makes up
for the more the less is lost. Experts go where they take away most need, one layer's as the next.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moeprune.methods.base import Decision, Evidence, Method
from moeprune.methods.fuse import FuseOptions, decided, foresee, fused, groups_of, kept_of
from moeprune.methods.medoids import lost_by_count
from moeprune.methods.sensitivity import moved_by
from moeprune.statistics import LayerStats

_RECOVERY = 2


def decide(evidence: Evidence, ratio: float, options: FuseOptions) -> Decision:
    assert evidence.trial is not None
    layers = evidence.stats.layers
    even = {name: fused(layer, kept_of(layer, ratio)) for name, layer in layers.items()}
    moved = moved_by(evidence.trial, {name: answers(plan.stands_for, plan.experts) for name, plan in even.items()})
    needs = {name: need(layer, len(even[name].keep), moved[name]) for name, layer in layers.items()}
    counts = share_out(needs, layers, sum(len(plan.keep) for plan in even.values()))
    return decided({name: fused(layer, counts[name]) for name, layer in layers.items()}, options)


def answers(stands_for: Mapping[int, list[int]], experts: int) -> list[int]:
    """Who answers for each expert, itself where it stays."""
    of = {gone: stays for stays, those in stands_for.items() for gone in those}
    return [of.get(expert, expert) for expert in range(experts)]


def need(layer: LayerStats, even: int, moved: float) -> np.ndarray[Any, Any]:
    """What a layer is taken to need with so many experts, `[E + 1]`; infinite with fewer than can run for a token, and,
    where the model does not move, with fewer than an even share.

    Args:
        even: how many it would have if all layers lost the same.
        moved: by how much the model then moves.
    """
    loss_EE, groups = groups_of(layer)
    lost_E = np.full(layer.experts + 1, np.inf)
    lost_E[:: len(groups)] = np.sum([lost_by_count(loss_EE[group, group]) for group in groups], axis=0)
    lost_E[: layer.groups.least_kept(layer.top_k)] = np.inf
    can_E = np.isfinite(lost_E)
    if not moved or not lost_E[even]:  # nothing is known of how much it would be to lose more than that
        return np.where(can_E & (lost_E <= lost_E[even]), 0.0, np.inf)
    lost_E[can_E] = moved * (lost_E[can_E] / lost_E[even]) ** _RECOVERY
    return lost_E


def share_out(
    needs: Mapping[str, np.ndarray[Any, Any]], layers: Mapping[str, LayerStats], whole: int
) -> dict[str, int]:
    """How many experts each layer keeps of so many in all: more go, always, where each of them takes away most need;
    where none would, to the layer that has fewest."""
    counts = {name: int(np.isfinite(need_E).argmax()) for name, need_E in needs.items()}
    while True:
        left = whole - sum(counts.values())
        offers = {
            name: _most_for_each(need_E[counts[name] :], left, layers[name].groups.count)
            for name, need_E in needs.items()
        }
        name = max(offers, key=lambda name: (offers[name].each, -counts[name]))
        if not offers[name].more:
            return counts
        counts[name] += offers[name].more


class _Offer(NamedTuple):
    """So many more experts, and how much need each of them takes away."""

    more: int
    each: float


def _most_for_each(need_E: np.ndarray[Any, Any], left: int, step: int) -> _Offer:
    """The best offer of at most so many, a multiple of the step; none more where no more are to be had."""
    more = np.arange(step, min(left, len(need_E) - 1) + 1, step)
    if not len(more):
        return _Offer(0, -np.inf)
    taken_away = (need_E[0] - need_E[more]) / more
    best = int(taken_away.argmax())
    return _Offer(int(more[best]), float(taken_away[best]))


METHOD = Method(
    "fuse-by-need",
    "as fuse, with more experts in the layers that the model's answers depend on more",
    decide,
    FuseOptions,
    tries=True,
    statistics=frozenset({"stand_in"}),
    foresee=foresee,
)
