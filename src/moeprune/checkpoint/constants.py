"""Constants in place of experts: the mean outputs of those that go, for the router to go on choosing.

The checkpoint carries them as one tensor a layer, beside the experts that stay; the modelling file adds them.
Axes: C constants of a layer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import build_without_weights
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.modelling import CONSTANTS_NAME
from moeprune.checkpoint.pieces import PlannedTensor, Values
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.checkpoint.unsupported import QUANTISED_CONSTANTS, quantisation, refusal
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics import LayerStats, Stats
from moeprune.statistics.inside import down_weight

_STATISTICS = ("output", "routed_tokens")


def check(source: Checkpoint, plan: Plan, stats: Stats | None) -> None:
    """Raise InputError where a plan puts constants into a model that cannot hold any, or the Stats do not have them.

    Args:
        stats: None where they are not at hand yet.
    """
    with_constants = {name: layer for name, layer in plan.layers.items() if layer.constant}
    if not with_constants:
        return
    for name, layer in with_constants.items():
        if not layer.keep:
            raise InputError(f"of {name} only constants would be left; keep at least one expert")
    if method := quantisation(source.config):
        raise refusal(source.config, QUANTISED_CONSTANTS.format(method=method))
    for seen in stats.layers.values() if stats else ():
        if lacking := [name for name in _STATISTICS if name not in seen.counts and name not in seen.sums]:
            raise InputError(
                f"these Stats do not hold {', '.join(lacking)}, of which the plan's constants are made; calibrate "
                "again with `moeprune calibrate --for mone`"
            )


def rows(layer: LayerPlan) -> list[int]:
    """In which rows of the pruned router the constants are."""
    return [row for row, expert in enumerate(layer.choosable) if expert in layer.constant]


def mean_outputs(layer: LayerStats, experts: list[int]) -> torch.Tensor:
    """`[C, H]` float64: each expert's output, averaged over the tokens that chose it; 0 where none did."""
    tokens_C = layer.count("routed_tokens")[experts].clamp(min=1)
    return layer.sum("output")[experts] / tokens_C[:, None]


def planned(source: Checkpoint, plan: Plan, stats: Stats | None) -> Iterator[PlannedTensor]:
    """The tensors of constants, layer after layer.

    Args:
        stats: needed when the tensors are written, not before.
    """
    with_constants = {name: layer for name, layer in plan.layers.items() if layer.constant}
    if not with_constants:
        return
    model = build_without_weights(source.config)
    for name, layer in with_constants.items():
        stored, like = _stored(source, model, name)
        dtype, hidden = source.files.dtype(like), len(down_weight(model.get_submodule(name), 0))
        make = partial(_values, stats, name, layer.constant, dtype)
        shape = (len(layer.constant), hidden)
        yield PlannedTensor(
            stored, source.files.entries[like].dtype, shape, (Values(shape[0] * shape[1] * dtype.itemsize, make),)
        )


def _values(stats: Stats | None, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
    assert stats is not None
    return mean_outputs(stats.layers[name], experts).to(dtype)


def _stored(source: Checkpoint, model: PreTrainedModel, layer: str) -> tuple[str, str]:
    """Under which name this checkpoint stores the constants of a layer, and a tensor of the layer's experts."""
    own = [name for name in source.layout.layers[layer].parameters if name.startswith(f"{layer}.")]
    experts = {name: model.get_parameter(name) for name in own}
    constants = {f"{layer}.{CONSTANTS_NAME}": torch.empty(0, device="meta")}
    for names, of_experts in zip(stored_ways(model, constants), stored_ways(model, experts), strict=True):
        if of_experts.keys() <= source.files.entries.keys():
            return next(iter(names)), next(iter(of_experts))
    raise InputError(f"{source.files.address} does not store the experts of {layer} in any way that is known")
