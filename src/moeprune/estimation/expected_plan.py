"""A Plan of the size that a method will make, before there are Stats to decide on.

Which experts stay does not matter to the size, so the first do. A method that spreads the ratio over the layers
unevenly removes at least as many experts in all as one that takes the ratio of each, which is what is planned here.
"""

from __future__ import annotations

from moeprune.budget import Budget, check_method, plan_within
from moeprune.checkpoint.loading import Checkpoint
from moeprune.estimation.anatomy import Anatomy
from moeprune.methods import check_ratio, check_room, find, parse_options
from moeprune.methods.base import count_of
from moeprune.plan import LayerPlan, Plan, Recovery
from moeprune.router_groups import RouterGroups
from moeprune.statistics import LayerStats

_ROUTED_OF_CONDENSED = 6  # experts that CD-MoE keeps of a layer, at most, where the method does not say


def expected_plan(checkpoint: Checkpoint, anatomy: Anatomy, budget: Budget, method: str, options: dict) -> Plan:
    """Raises InputError for an unknown method or option, or a budget that cannot be kept."""
    groups = checkpoint.layout.groups

    def decide(ratio: float) -> Plan:
        return _plan(anatomy, groups, ratio, method, options)

    if budget.ratio is not None:
        check_ratio(budget.ratio)
        return decide(budget.ratio)
    check_method(method)
    layers = {name: LayerStats(layer.experts, layer.top_k, groups=groups) for name, layer in anatomy.layers.items()}
    return plan_within(budget, decide, method, layers, checkpoint)


def _plan(anatomy: Anatomy, groups: RouterGroups, ratio: float, method: str, options: dict) -> Plan:
    found = find(method)
    settings = parse_options(found, options)
    condensed = count_of(ratio, len(anatomy.layers)) if found.removes == "layers" else 0
    layers = {}
    for place, (name, layer) in enumerate(anatomy.layers.items()):
        if place >= len(anatomy.layers) - condensed:
            routed = 0 if getattr(settings, "variant", "") == "S" else getattr(settings, "routed", _ROUTED_OF_CONDENSED)
            keep = list(range(min(routed, layer.experts)))
            weights = dict.fromkeys(keep, 1.0)
            layers[name] = LayerPlan(experts=layer.experts, top_k=layer.top_k, keep=keep, condensed=weights)
            continue
        gone = 0
        if found.removes == "experts":
            check_room(ratio, name, layer.experts, layer.top_k, groups)
            gone = count_of(ratio, layer.experts, groups)
        keep = _first_of_each_group(layer.experts, gone, groups)
        left = sorted(set(range(layer.experts)) - set(keep)) if method == "mone" else []
        layers[name] = LayerPlan(experts=layer.experts, top_k=layer.top_k, keep=keep, constant=left)
    recovers = bool(getattr(settings, "recover", False))
    return Plan(
        method=method,
        options=settings.model_dump(),
        ratio=ratio,
        recovery=Recovery() if recovers else None,
        model="",
        data="",
        layers=layers,
    )


def _first_of_each_group(experts: int, gone: int, groups: RouterGroups) -> list[int]:
    drop = set(groups.take(reversed(range(experts)), gone, experts))
    return [expert for expert in range(experts) if expert not in drop]
