"""naee: drop those experts of a layer that, left out together, change its output least.

NAEE (arXiv 2402.14800, section 3.2) compares the layer's output with and without a set of experts. Where the set `S`
goes, the layer's output lacks `sum over i in S of g_i(t) f_i(x_t)`, so that the squared error over all tokens is

    sum over i, j in S of O[i, j],      O[i, j] = sum over t of g_i(t) g_j(t) <f_i(x_t), f_j(x_t)>

and every set is judged from one matrix per layer (`overlap`). The paper runs the layer again for each set, and there
the router gives the tokens of those that went to other experts. That second routing is left out here: it would need
the outputs of experts that the tokens did not choose, on every token and for every set. What is compared is therefore
what goes, and not what comes in its place.

As in the paper, all sets are tried where they are few. Where they are many, experts go one by one, each time the one
whose going adds least to the error, and then any that went changes places with any that stayed as long as that helps.

Axes: E experts of the layer, C sets of experts that could go.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice, product
from math import comb
from typing import Any

import numpy as np
from pydantic import Field

from moeprune.methods.base import Decision, Evidence, Method, Options, count_of, keep, keep_all_but
from moeprune.router_groups import RouterGroups
from moeprune.statistics import LayerStats

_CHOICES_AT_ONCE = 4096
_WORTH_A_SWAP = 1e-9  # of the layer's whole output; less is rounding, and could go on for ever

Array = np.ndarray[Any, Any]


class NaeeOptions(Options):
    exact_up_to: int = Field(
        20_000, ge=0, description="try all sets of experts of a layer where there are no more than this; else search"
    )


def decide(evidence: Evidence, ratio: float, options: NaeeOptions) -> Decision:
    layers = {}
    for name, layer in evidence.stats.layers.items():
        overlap_EE = layer.sum("overlap").numpy()
        count = count_of(ratio, layer.experts, layer.groups)
        drop = _least_missed(overlap_EE, count, layer, options.exact_up_to)
        alone_E = overlap_EE.diagonal().tolist()
        layers[name] = keep(keep_all_but(drop, layer.experts), layer).model_copy(update={"scores": alone_E})
    return Decision(layers, score="squared error of the layer's output without it alone")


def _least_missed(overlap_EE: Array, count: int, layer: LayerStats, exact_up_to: int) -> list[int]:
    groups, experts = layer.groups, layer.experts
    if comb(experts // groups.count, count // groups.count) ** groups.count <= exact_up_to:
        return exact(overlap_EE, count, groups)
    return search(overlap_EE, count, groups)


def exact(overlap_EE: Array, count: int, groups: RouterGroups) -> list[int]:
    """Of all sets of `count` experts, as many of each of the router's groups, the one that is missed least."""
    best: list[int] = []
    least = np.inf
    sets = _sets(len(overlap_EE), count, groups)
    while some := list(islice(sets, _CHOICES_AT_ONCE)):
        gone_CE = np.zeros((len(some), len(overlap_EE)))
        np.put_along_axis(gone_CE, np.array(some, dtype=np.int64).reshape(len(some), count), 1, axis=1)
        error_C = ((gone_CE @ overlap_EE) * gone_CE).sum(1)
        if error_C.min() < least:
            best, least = some[int(error_C.argmin())], error_C.min()
    return list(best)


def search(overlap_EE: Array, count: int, groups: RouterGroups) -> list[int]:
    """A set of `count` experts, as many of each of the router's groups, of which no exchange is missed less."""
    experts = len(overlap_EE)
    group_E = np.arange(experts) * groups.count // experts
    own_E = overlap_EE.diagonal()
    gone_E = np.zeros(experts, dtype=bool)
    shared_E = np.zeros(experts)  # with those that go
    left = [count // groups.count] * groups.count
    for _ in range(count):
        added_E = np.where(gone_E | (np.array(left)[group_E] == 0), np.inf, own_E + 2 * shared_E)
        expert = int(added_E.argmin())
        gone_E[expert] = True
        shared_E += overlap_EE[expert]
        left[group_E[expert]] -= 1

    enough = _WORTH_A_SWAP * np.abs(overlap_EE).sum()
    may_swap_EE = group_E[:, None] == group_E[None, :]
    while True:
        # `back` returns and `out` goes in its place.
        back, out = gone_E[:, None], ~gone_E[None, :]
        without_E = own_E - 2 * shared_E
        change_EE = without_E[:, None] + (own_E + 2 * shared_E)[None, :] - 2 * overlap_EE
        change_EE = np.where(back & out & may_swap_EE, change_EE, np.inf)
        if change_EE.size == 0 or change_EE.min() >= -enough:
            return np.flatnonzero(gone_E).tolist()
        returns, goes = np.unravel_index(int(change_EE.argmin()), change_EE.shape)
        gone_E[returns], gone_E[goes] = False, True
        shared_E += overlap_EE[goes] - overlap_EE[returns]


def _sets(experts: int, count: int, groups: RouterGroups) -> Iterator[list[int]]:
    """All sets of `count` experts with as many of each group."""
    size = experts // groups.count
    of_each = [
        list(combinations(range(group * size, (group + 1) * size), count // groups.count))
        for group in range(groups.count)
    ]
    for parts in product(*of_each):
        yield [expert for part in parts for expert in part]


METHOD = Method(
    "naee",
    "drop the experts that, left out together, change a layer's output least (NAEE, arXiv 2402.14800)",
    decide,
    NaeeOptions,
    statistics=frozenset({"overlap"}),
)
