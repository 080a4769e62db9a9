"""A condensed layer: its shared expert and some routed ones run for every token, each times a constant.

Axes: B sequences, S tokens of a sequence, T tokens, K chosen experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.moe_blocks import MoeBlock


@dataclass(frozen=True)
class Condensed:
    """What runs in a condensed layer.

    Attributes:
        block: the MoE block as it was.
        weights: routed expert -> what its output is multiplied by.
        shared_scale: what the shared expert's output is multiplied by.
    """

    block: MoeBlock
    weights: Mapping[int, float]
    shared_scale: float = 1.0

    def forward_in(self, model: PreTrainedModel) -> Callable[..., torch.Tensor]:
        """What the layer's block computes in place of its own forward pass, with the model's own experts."""
        block = model.get_submodule(self.block.name)
        shared = block.get_submodule(self.block.shared) if self.block.shared else None

        def forward(x_BSH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
            out_TH = self.shared_scale * shared(x_TH) if shared else torch.zeros_like(x_TH)
            if self.weights:
                out_TH = out_TH + run_for_all(model, self.block, self.weights, x_TH)
            return out_TH.view_as(x_BSH)

        return forward


def run_for_all(
    model: PreTrainedModel, block: MoeBlock, weights: Mapping[int, float], x_TH: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of some routed experts' outputs, all on each token, `[T, H]`."""
    index_K = torch.tensor(list(weights), device=x_TH.device)
    weight_K = torch.tensor(list(weights.values()), device=x_TH.device)
    experts = model.get_submodule(block.experts)
    return experts(x_TH, index_K.expand(len(x_TH), -1), weight_K.expand(len(x_TH), -1)).to(x_TH.dtype)


@contextmanager
def answering(module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Have a module compute something else, inside the block."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
