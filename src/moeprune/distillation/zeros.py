"""Zeros of a sparse plan stay zero.

Whatever an optimizer makes of them (by momentum, by weight decay), after its step they are zero again, so no forward
pass ever sees anything else. Adam's moments are each weight's own, so the others learn as if the zeros were not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from moeprune.plan import Plan

_EXPERTS_AXES = 3  # of weights


class Zeros:
    """The weights of some parameters that are zero now.

    Of a parameter that is sharded over processes, each process looks after its own shard.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._zero = [(parameter, _here(parameter) == 0) for parameter in parameters]

    def keep(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, make them zero after each of its steps."""

        def after_step(_: torch.optim.Optimizer, __: Any, ___: Any) -> None:
            self.restore()

        optimizer.register_step_post_hook(after_step)

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, zero in self._zero:
            _here(parameter).masked_fill_(zero, 0)


def has_zeros(plan: Plan, layer: str, name: str, parameter: torch.Tensor) -> bool:
    """Whether the plan made some weights of a layer's parameter zero; zeros elsewhere, as of biases, may learn."""
    return plan.sparsity is not None and name.startswith(f"{layer}.") and parameter.dim() == _EXPERTS_AXES


def _here(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter that this process has, sharing their memory."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
