"""An original model with some experts masked out of its routers: what a pruned one must equal. Uses nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tiny
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

_ROUTER = re.compile(r"\.(gate|router)\.")
CHOICE_BIAS = re.compile(r"correction_bias|balancing_bias|expert_bias")


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold all experts of a layer: those with weights of three axes."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".experts") and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    }


class MaskedRouters(TorchFunctionMode):
    """While it is on, the logits of dropped experts are minus infinity, before the router makes anything of them."""

    def __init__(self, model: PreTrainedModel, keep: list[list[int]]) -> None:
        super().__init__()
        self.calls = 0
        self._dropped: dict[int, list[int]] = {}
        self._biases: list[tuple[torch.Tensor, list[int]]] = []
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for (name, experts), kept in zip(experts_modules(model).items(), keep, strict=True):
            number = next(parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3)
            dropped = sorted(set(range(number)) - set(kept))
            layer = next(re.finditer(r"^.*?layers\.\d+\.", name))[0]
            for own, tensor in tensors.items():
                if not own.startswith(layer) or own.startswith(name):
                    continue
                if CHOICE_BIAS.search(own):
                    self._biases.append((tensor, dropped))
                elif _ROUTER.search(own) and tensor.dim() == 2 and number <= tensor.shape[0] <= number + 1:
                    self._dropped[tensor.data_ptr()] = dropped
        assert len(self._dropped) == len(keep), "not every router was found"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self._dropped:
            self.calls += 1
            out[..., self._dropped[args[1].data_ptr()]] = -torch.inf
        return out

    @contextmanager
    def no_bias_for_the_dropped(self) -> Iterator[None]:
        """What a router adds to the scores, only to choose by them, cannot bring a dropped expert back."""
        before = [bias.clone() for bias, _ in self._biases]
        for bias, dropped in self._biases:
            bias[..., dropped] = -torch.inf
        yield
        for (bias, _), values in zip(self._biases, before, strict=True):
            bias.copy_(values)


def masked_logits(model: PreTrainedModel, keep: list[list[int]], ids_BS: torch.Tensor) -> torch.Tensor:
    masked = MaskedRouters(model, keep)
    with torch.no_grad(), masked.no_bias_for_the_dropped(), masked:
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
