"""How large Stats are: what their collectors say of shapes, asked with tensors that take no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch

from moeprune.estimation.anatomy import Anatomy, MoeLayer
from moeprune.statistics.collectors import Collector, Seen, find

_COUNT_BYTES, _SUM_BYTES = 8, 16  # int64; the two limbs of an exact sum


def bytes_of_stats(anatomy: Anatomy, statistics: Iterable[str], groups: int) -> int:
    """Of the numbers in the file of all layers, its header aside. Raises InputError for an unknown statistic."""
    return sum(bytes_of_layer(layer, anatomy.hidden, statistics, groups) for layer in anatomy.layers.values())


def bytes_of_layer(layer: MoeLayer, hidden: int, statistics: Iterable[str], groups: int) -> int:
    """Of one layer's."""
    seen = _seen(layer, hidden, groups)
    return sum(_bytes(collector, seen) for collector in find(statistics).values())


def _bytes(collector: Collector, seen: Seen) -> int:
    return math.prod(collector.shape(seen)) * (_COUNT_BYTES if collector.counts else _SUM_BYTES)


def _seen(layer: MoeLayer, hidden: int, groups: int) -> Seen:
    """As much of what a collector is shown as shapes depend on."""
    call = SimpleNamespace(layer_experts=layer.experts, x_TH=torch.empty(1, hidden, device="meta"))
    choices = SimpleNamespace(hidden_NI=torch.empty(1, layer.width, device="meta"))
    return cast(Seen, cast(Any, SimpleNamespace(call=call, choices=choices, groups=groups)))
