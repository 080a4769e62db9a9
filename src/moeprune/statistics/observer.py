"""The one observer: it sees the experts of every family at the door through which transformers calls them.

It is registered once in transformers' `ExpertsInterface`. While it is on, each call of a watched experts module still
computes what it always does, by the implementation that the model had, and then passes by the collectors.

Axes: T tokens of a batch, S tokens of a block, B blocks, K experts per token, E experts, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeprune.checkpoint.layout import expert_count, experts_modules

ExpertsForward = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NAME = "moeprune_observer"


@dataclass(frozen=True)
class ExpertsCall:
    """One call of one layer's experts.

    Attributes:
        layer: name of the experts module.
        module: that module.
        x_TH: inputs.
        index_TK: who runs for each token.
        weight_TK: their gate weights, as the model mixes with them.
        forward: the model's own implementation, to run experts on other inputs.
    """

    layer: str
    module: torch.nn.Module
    x_TH: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    forward: ExpertsForward

    def every_expert(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Run each of the E experts on each of N inputs, unweighted: `[N, E, H]`."""
        inputs, experts = len(x_NH), expert_count(self.module)
        index = torch.arange(experts, device=x_NH.device).repeat(inputs)[:, None].to(self.index_TK.dtype)
        ones = torch.ones(index.shape, dtype=self.weight_TK.dtype, device=x_NH.device)
        return self.forward(self.module, x_NH.repeat_interleave(experts, dim=0), index, ones).view(inputs, experts, -1)


Watcher = Callable[[ExpertsCall], None]


@dataclass(frozen=True)
class _Watched:
    layer: str
    forward: ExpertsForward
    watcher: Watcher


_watched: WeakKeyDictionary[torch.nn.Module, _Watched] = WeakKeyDictionary()


def _observed_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    watched = _watched[module]
    out = watched.forward(module, hidden_states, top_k_index, top_k_weights)
    call = ExpertsCall(watched.layer, module, hidden_states, top_k_index, top_k_weights, watched.forward)
    watched.watcher(call)
    return out


ALL_EXPERTS_FUNCTIONS.register(_NAME, _observed_forward)


@contextmanager
def observe(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """Show every call of the model's experts to the watcher, inside the block."""
    modules = experts_modules(model)
    configs = {name: cast(PretrainedConfig, module.config) for name, module in modules.items()}
    before = {name: config._experts_implementation for name, config in configs.items()}
    for name, module in modules.items():
        # The decorator of the interface wraps the eager implementation, which every family has.
        eager = inspect.unwrap(type(module).forward)
        _watched[module] = _Watched(name, ALL_EXPERTS_FUNCTIONS.get_interface(before[name], eager), watcher)
    for config in configs.values():
        config._experts_implementation = _NAME
    try:
        yield
    finally:
        for name, module in modules.items():
            configs[name]._experts_implementation = before[name]
            del _watched[module]
