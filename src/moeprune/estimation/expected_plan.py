"""A Plan of the size that a method will make, before there are Stats to decide on.

Which experts stay does not matter to the size. A method that spreads the ratio over the layers unevenly removes at
least as many experts in all as one that takes the ratio of each, which is what is planned here where the method does
not say more (`Method.foresee`).
"""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.budget import Budget, check_method, plan_within
from moeprune.checkpoint.loading import Checkpoint
from moeprune.estimation.anatomy import Anatomy
from moeprune.methods import check_ratio, check_room, find, parse_options
from moeprune.methods.base import Decision, keep_any
from moeprune.plan import Plan
from moeprune.statistics import LayerStats


def expected_plan(checkpoint: Checkpoint, anatomy: Anatomy, budget: Budget, method: str, options: dict) -> Plan:
    """Raises InputError for an unknown method or option, or a budget that cannot be kept."""
    groups = checkpoint.layout.groups
    layers = {name: LayerStats(layer.experts, layer.top_k, groups=groups) for name, layer in anatomy.layers.items()}

    def decide(ratio: float) -> Plan:
        return _plan(layers, ratio, method, options)

    if budget.ratio is not None:
        check_ratio(budget.ratio)
        return decide(budget.ratio)
    check_method(method)
    return plan_within(budget, decide, method, layers, checkpoint)


def _plan(layers: Mapping[str, LayerStats], ratio: float, method: str, options: dict) -> Plan:
    found = find(method)
    settings = parse_options(found, options)
    if found.removes == "experts":
        for name, layer in layers.items():
            check_room(ratio, name, layer.experts, layer.top_k, layer.groups)
    if found.foresee:
        decided = found.foresee(layers, ratio, settings)
    else:
        decided = Decision(keep_any(layers, ratio if found.removes == "experts" else 0.0))
    return Plan(
        method=method,
        options=settings.model_dump(),
        ratio=ratio,
        sparsity=decided.sparsity,
        recovery=decided.recovery,
        model="",
        data="",
        layers=decided.layers,
    )
