"""An original model with some experts masked out of its routers: what a pruned one must equal. Uses nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tiny
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class MaskedRouters(TorchFunctionMode):
    """While it is on, the logits of dropped experts are minus infinity, before the router makes anything of them."""

    def __init__(self, model: PreTrainedModel, keep: list[list[int]]) -> None:
        super().__init__()
        routers = tiny.router_weights(model)
        self.calls = 0
        self._dropped = {
            weight.data_ptr(): [expert for expert in range(len(weight)) if expert not in kept]
            for weight, kept in zip(routers.values(), keep, strict=True)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self._dropped:
            self.calls += 1
            out[..., self._dropped[args[1].data_ptr()]] = -torch.inf
        return out


def masked_logits(model: PreTrainedModel, keep: list[list[int]], ids_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), MaskedRouters(model, keep) as masked:
        logits = model(input_ids=ids_BS, use_cache=False).logits
    assert masked.calls == len(keep), "not every router was masked"
    return logits


def plain_logits(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids_BS, use_cache=False).logits


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def draws(seed: int, layers: int, counts: Iterable[int]) -> list[list[int]]:
    """For each layer a random choice of so many experts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        sorted(torch.randperm(tiny.EXPERTS, generator=generator)[:count].tolist())
        for count, _ in zip(counts, range(layers), strict=True)
    ]
