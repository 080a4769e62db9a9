"""The one observer: it stands at the door through which transformers calls the experts of every family.

It is registered once in transformers' `ExpertsInterface`. While it is on, each call of a model's experts comes to us.
`observe` computes what the experts always do, by the implementation that the model had, and shows the call;
`intercept` leaves the computing to whoever intercepts.

Axes: T tokens of a batch, S tokens of a block, B blocks, K experts per token, E experts, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeprune.checkpoint.layout import expert_count, experts_modules
from moeprune.statistics.inside import Inside, look_inside

ExpertsForward = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NAME = "moeprune_observer"


@dataclass(frozen=True)
class ExpertsCall:
    """One call of one layer's experts, or of a range of them.

    Attributes:
        layer: name of the experts module.
        module: that module; where the call shows a range of the experts, one that holds only these.
        x_TH: inputs.
        index_TK: who runs for each token, counted over all experts of the layer.
        weight_TK: their gate weights, as the model mixes with them.
        forward: the model's own implementation, to run the module's experts on other inputs.
        layer_experts: how many routed experts the layer has.
        experts: those that the module holds. The calls of one layer on one batch together show each expert once.
    """

    layer: str
    module: torch.nn.Module
    x_TH: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    forward: ExpertsForward
    layer_experts: int
    experts: range

    @cached_property
    def inside(self) -> Inside:
        """The choices of the call's experts, run one by one."""
        return look_inside(self.module, self.x_TH, self.index_TK, self.weight_TK, self.experts.start)

    def run(self) -> torch.Tensor:
        """What the call's experts put out, `[T, H]`, mixed from `inside`."""
        return self.inside.mixed(len(self.x_TH)).to(self.x_TH.dtype)

    def every_expert(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Run each of the module's R experts on each of N inputs, unweighted: `[N, R, H]`."""
        inputs, experts = len(x_NH), len(self.experts)
        index = torch.arange(experts, device=x_NH.device).repeat(inputs)[:, None].to(self.index_TK.dtype)
        ones = torch.ones(index.shape, dtype=self.weight_TK.dtype, device=x_NH.device)
        output_QH = self.forward(self.module, x_NH.repeat_interleave(experts, dim=0), index, ones)
        return output_QH.view(inputs, experts, output_QH.shape[-1])


Watcher = Callable[[ExpertsCall], None]
Interceptor = Callable[[ExpertsCall], torch.Tensor]


@dataclass(frozen=True)
class _Intercepted:
    layer: str
    forward: ExpertsForward
    interceptor: Interceptor


_intercepted: WeakKeyDictionary[torch.nn.Module, _Intercepted] = WeakKeyDictionary()


def _intercepted_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    known = _intercepted[module]
    count = expert_count(module)
    return known.interceptor(
        ExpertsCall(known.layer, module, hidden_states, top_k_index, top_k_weights, known.forward, count, range(count))
    )


ALL_EXPERTS_FUNCTIONS.register(_NAME, _intercepted_forward)


@contextmanager
def observe(model: PreTrainedModel, watcher: Watcher, *, inside: bool = False) -> Iterator[None]:
    """Show every call of the model's experts to the watcher, inside the block.

    Args:
        inside: the watcher will look at `ExpertsCall.inside`; the layer's output is then made of that.
    """

    def run_and_show(call: ExpertsCall) -> torch.Tensor:
        out = call.run() if inside else call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK)
        watcher(call)
        return out

    with intercept(model, run_and_show):
        yield


@contextmanager
def intercept(model: PreTrainedModel, interceptor: Interceptor) -> Iterator[None]:
    """Have the interceptor answer every call of the model's experts, inside the block."""
    modules = experts_modules(model)
    configs = {name: cast(PretrainedConfig, module.config) for name, module in modules.items()}
    before = {name: config._experts_implementation for name, config in configs.items()}
    for name, module in modules.items():
        # The decorator of the interface wraps the eager implementation, which every family has.
        eager = inspect.unwrap(type(module).forward)
        forward = ALL_EXPERTS_FUNCTIONS.get_interface(before[name], eager)
        _intercepted[module] = _Intercepted(name, forward, interceptor)
    for config in configs.values():
        config._experts_implementation = _NAME
    try:
        yield
    finally:
        for name, module in modules.items():
            configs[name]._experts_implementation = before[name]
            del _intercepted[module]
