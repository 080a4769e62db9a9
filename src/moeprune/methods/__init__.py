"""What to cut. One short file per method; to add one, write the file and name it here, or let a package of yours bring
it (`registry`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from moeprune.clustering import make_clusters
from moeprune.clusters import Clusters
from moeprune.errors import InputError
from moeprune.methods import (
    c_prune,
    cd_moe,
    contribution,
    frequency,
    fuse,
    fuse_by_need,
    hc_smoe,
    magnitude,
    moe_pruner,
    mone,
    naee,
    random,
    reap,
    wanda,
)
from moeprune.methods.base import Decision, Evidence, Method, Trial, count_of
from moeprune.methods.registry import Registry
from moeprune.plan import Plan
from moeprune.router_groups import RouterGroups
from moeprune.statistics import Stats
from moeprune.statistics.collectors import OUTSIDE
from moeprune.validation import complaint

_OF_EXPERTS = (fuse, fuse_by_need, c_prune, reap, contribution, naee, hc_smoe, mone, frequency, random)
_OF_WEIGHTS = (moe_pruner, wanda, magnitude)
_OF_LAYERS = (cd_moe,)
METHODS = Registry(module.METHOD for module in (*_OF_EXPERTS, *_OF_WEIGHTS, *_OF_LAYERS))
DEFAULT = "fuse"
BASELINES = ("reap", "frequency")  # what a result is held against where nothing else is said


def make_plan(
    method: str,
    ratio: float,
    stats: Stats,
    clusters: Clusters | None = None,
    options: dict[str, Any] | None = None,
    trial: Callable[[], Trial] | None = None,
) -> Plan:
    """Decide what stays.

    Args:
        method: one of `METHODS`.
        ratio: fraction to remove, in [0, 1), of the routed experts or of what else the method `removes`.
        stats: of the model on the calibration data.
        clusters: made from these Stats; a method that uses clusters makes them itself where there are none.
        options: the method's own options by name.
        trial: loads the model and some text, for a method that tries.

    Raises:
        InputError: unknown method or option, a ratio outside its range or one that leaves a layer fewer experts than
            run for a token, Stats that lack what the method needs, Clusters that were made from other Stats, no model
            for a method that tries, or a method that removes fewer experts than were asked for.
    """
    chosen = find(method)
    check_ratio(ratio)
    settings = parse_options(chosen, options or {})
    _check_statistics(chosen, stats)
    if chosen.removes == "experts":
        for name, layer in stats.layers.items():
            check_room(ratio, name, layer.experts, layer.top_k, layer.groups)
    if chosen.tries and trial is None:
        raise InputError(f"{method} tries what it decides: give it the model and text, `--model M --data D`")
    if clusters and (clusters.model, clusters.data) != (stats.model, stats.data):
        raise InputError("the Clusters were not made from these Stats; make them again with `moeprune cluster`")
    if chosen.uses_clusters and clusters is None:
        clusters = make_clusters(stats)
    evidence = Evidence(stats, clusters, trial() if chosen.tries and trial else None)
    decided = chosen.decide(evidence, ratio, settings)
    if chosen.removes == "experts":
        _check_removed(method, ratio, stats, decided)
    return Plan(
        method=method,
        options=settings.model_dump(),
        ratio=ratio,
        score=decided.score,
        sparsity=decided.sparsity,
        recovery=decided.recovery,
        model=stats.model,
        data=stats.data,
        layers=decided.layers,
    )


def find(name: str) -> Method:
    """Raises InputError for an unknown method, naming the known ones, and for another package's that cannot be used."""
    return METHODS.find(name)


def statistics_for(methods: Iterable[str]) -> list[str]:
    """What calibration must collect for these methods, sorted. Raises InputError for an unknown method."""
    return sorted(frozenset().union(*(find(name).statistics for name in methods)))


def statistics_of_run(methods: Iterable[str]) -> list[str]:
    """These, and what costs little: clusters are shown whatever decides, and the next run finds it done. Sorted."""
    return sorted({*statistics_for(methods), *OUTSIDE})


def _check_removed(method: str, ratio: float, stats: Stats, decided: Decision) -> None:
    """Raise InputError where fewer experts go than if each layer lost the ratio's whole number."""
    layers = stats.layers.values()
    asked = sum(count_of(ratio, layer.experts, layer.groups) for layer in layers)
    gone = sum(len(layer.drop) for layer in decided.layers.values())
    if gone < asked:
        total = sum(layer.experts for layer in layers)
        raise InputError(
            f"{method}, with these options, removes only {gone} of the {total} experts of this model, where {ratio:g} "
            f"of them, {asked}, were to go; the largest ratio that it reaches is {gone / total:.4g}"
        )


def _check_statistics(method: Method, stats: Stats) -> None:
    for layer in stats.layers.values():
        if lacking := sorted(method.statistics - layer.counts.keys() - layer.sums.keys()):
            raise InputError(
                f"these Stats do not hold {', '.join(lacking)}, which {method.name} needs; calibrate again with "
                f"`moeprune calibrate --for {method.name}`"
            )


def check_ratio(ratio: float) -> None:
    """Raises InputError where a ratio of experts to remove is outside [0, 1)."""
    if not 0 <= ratio < 1:
        raise InputError(f"the ratio of experts to remove must be at least 0 and below 1, not {ratio:g}")


def check_room(ratio: float, layer: str, experts: int, top_k: int, groups: RouterGroups) -> None:
    """Raises InputError where a ratio leaves a layer fewer experts than run for a token."""
    least = groups.least_kept(top_k)
    if experts - count_of(ratio, experts, groups) < least:
        raise InputError(
            f"removing {ratio:g} of the {experts} experts of {layer} leaves fewer than the {top_k} that run for each "
            f"token{_from(groups)}; the largest ratio for this model is {1 - least / experts:g}"
        )


def _from(groups: RouterGroups) -> str:
    return f", taken from {groups.chosen} of {groups.count} equal groups" if groups.count > 1 else ""


def parse_options(method: Method, options: dict[str, Any]) -> Any:
    """Raises InputError for an option that the method does not have, or a value that it cannot take."""
    try:
        return method.options.model_validate(options)
    except ValidationError as error:
        where, wrong = complaint(error)
        known = ", ".join(method.options.model_fields) or "none"
        raise InputError(f"option {where} of {method.name}: {wrong}; its options: {known}") from error
