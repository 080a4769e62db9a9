"""How small a model is to become: by a share of its routed experts, by a share of its parameters, or by a size.

A method knows the first alone. The others are promises of what is written: the smallest ratio is looked for whose Plan,
carried out, keeps them. What it would make is known from the checkpoint's headers (`checkpoint.surgery.foresee`); no
weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import Self

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import Foreseen, foresee
from moeprune.errors import InputError
from moeprune.methods import check_ratio, find
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics import LayerStats, Stats
from moeprune.streaming.room import parse_bytes

_WITH_THE_PLAN = 1.01  # the checkpoint carries it, and how long it is depends on the method


@dataclass(frozen=True)
class Budget:
    """What is asked for, in one of three ways.

    Attributes:
        ratio: the fraction of routed experts to remove; rounded so that never more go.
        parameters_ratio: the fraction of all parameters, as they are stored, to remove; at least as much goes.
        size: bytes that all files of the pruned checkpoint may have together.
    """

    ratio: float | None = None
    parameters_ratio: float | None = None
    size: int | None = None

    @classmethod
    def of(cls, ratio: float | None, parameters_ratio: float | None, size: str | None) -> Self:
        """As a user gives it, a size as `parse_bytes` reads it. Neither an empty one nor 0 of the parameters is given.

        Raises:
            InputError: none or several are given, or one is out of range.
        """
        given = {"--ratio": ratio is not None, "--parameters-ratio": bool(parameters_ratio), "--size": bool(size)}
        if sum(given.values()) != 1:
            named = " and ".join(name for name, is_given in given.items() if is_given) or "none"
            raise InputError(f"how much goes is said by one of {', '.join(given)}; {named} of them given")
        for share in (ratio, parameters_ratio):
            if share is not None:
                check_ratio(share)
        return cls(ratio, parameters_ratio or None, parse_bytes(size) if size else None)

    def __str__(self) -> str:
        if self.size is not None:
            return f"at most {self.size:,} bytes"
        if self.parameters_ratio is not None:
            return f"without {self.parameters_ratio:.4g} of the parameters"
        return f"without {self.ratio:.4g} of the experts"

    def excess(self, made: Foreseen, original: Checkpoint) -> int:
        """By how much a checkpoint is larger than asked for, in bytes or parameters; at most 0 where it is not."""
        if self.size is not None:
            return made.bytes - self.size
        assert self.parameters_ratio is not None
        return made.parameters - floor((1 - self.parameters_ratio) * original.files.parameters + 1e-9)

    def nearest(self, made: Foreseen, original: Checkpoint) -> str:
        """What the user would have to ask for, instead, to get this, in words."""
        if self.size is not None:
            return f"--size {_in_units(ceil(made.bytes * _WITH_THE_PLAN))}"
        share = floor((1 - made.parameters / original.files.parameters) * 10_000) / 10_000
        return f"--parameters-ratio {share:g}"


def plan_for(
    budget: Budget, decide: Callable[[float], Plan], method: str, stats: Stats, source: Checkpoint | None
) -> Plan:
    """A Plan that keeps the promise, and removes as little more than that takes as the method's steps allow.

    Args:
        decide: from a ratio to a Plan.
        method: its name.
        stats: that it decides on.
        source: the model; for a ratio it is not needed.

    Raises:
        InputError: no allocation keeps the promise (the sentence says which can be kept), the method removes something
            else than experts, or the model is not given or not that of the Stats.
    """
    if budget.ratio is not None:
        return decide(budget.ratio)
    check_method(method)
    if source is None:
        raise InputError("how much a parameter or a byte is, the model says: give it, `--model M`")
    if stats.model != source.fingerprint:
        raise InputError(f"the Stats were not made from {source.files.address}; give the model that was calibrated")
    return plan_within(budget, decide, method, stats.layers, source)


def plan_within(
    budget: Budget, decide: Callable[[float], Plan], method: str, layers: Mapping[str, LayerStats], source: Checkpoint
) -> Plan:
    """The same from the layers' numbers of experts alone, for whatever `decide` makes of a ratio."""
    check_reachable(budget, layers, source)
    total = sum(layer.experts for layer in layers.values())
    most = total - sum(map(_least, layers.values()))
    whole, smallest = (budget.excess(foresee(source, plan), source) for plan in (_whole(layers), _smallest(layers)))
    per_expert = (whole - smallest) / max(1, most)
    # Headers are not quite as long for each expert: a hundredth of one is left for that.
    count = min(most, ceil(whole / per_expert - 0.01)) if whole > 0 else 0
    step = 0
    while True:
        plan = decide(count / total).model_copy(update={"budget": str(budget)})
        made = foresee(source, plan)
        excess = budget.excess(made, source)
        if excess <= 0:
            return plan
        if count == most:
            raise _unreachable(budget, made, source, f"at the largest ratio of {method}")
        # A method that takes the same number of each layer removes fewer than the ratio says until it reaches the next
        # whole number. Doubling finds that without passing the one after it.
        step = 2 * step or ceil(excess / per_expert)
        count = min(most, count + step)


def check_method(method: str) -> None:
    """Raises InputError where a method does not make a checkpoint smaller by removing experts."""
    if find(method).removes != "experts":
        raise InputError(
            f"{method} removes no experts but {find(method).removes}, and takes its ratio of these alone: --ratio"
        )


def check_reachable(budget: Budget, layers: Mapping[str, LayerStats], source: Checkpoint) -> None:
    """Raises InputError where no allocation of any method is small enough, naming what can be reached."""
    smallest = foresee(source, _smallest(layers))
    if budget.excess(smallest, source) > 0:
        raise _unreachable(budget, smallest, source, "with as few experts in each layer as can run for a token")


def _unreachable(budget: Budget, smallest: Foreseen, source: Checkpoint, when: str) -> InputError:
    return InputError(
        f"no allocation makes {source.files.address} {budget}: it still has {smallest.bytes:,} bytes and "
        f"{smallest.parameters:,} parameters {when}; the nearest that can be asked for is "
        f"{budget.nearest(smallest, source)}"
    )


def _least(layer: LayerStats) -> int:
    return layer.groups.least_kept(layer.top_k)


def _smallest(layers: Mapping[str, LayerStats]) -> Plan:
    return _of_size({name: _least(layer) for name, layer in layers.items()}, layers)


def _whole(layers: Mapping[str, LayerStats]) -> Plan:
    return _of_size({name: layer.experts for name, layer in layers.items()}, layers)


def _of_size(kept: Mapping[str, int], layers: Mapping[str, LayerStats]) -> Plan:
    """A Plan that keeps so many experts; which they are does not matter to the size."""
    planned = {
        name: LayerPlan(experts=layer.experts, top_k=layer.top_k, keep=list(range(kept[name])))
        for name, layer in layers.items()
    }
    return Plan(method="", options={}, ratio=0, model="", data="", layers=planned)


def _in_units(size: int) -> str:
    """A size for `parse_bytes`, never less than it is."""
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_each:
            return f"{ceil(size / bytes_each * 100) / 100:.2f}{unit}"
    return f"{size}B"
