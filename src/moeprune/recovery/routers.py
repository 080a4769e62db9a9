"""Routers of fewer experts: each row learns how much the most wanted of its expert and those it stands in for was.

A router chooses by rank: an expert shall be chosen where one of those it stands for would have been, so its logit is
the largest of theirs. Not the logarithm of the sum of their exponentials, which would be their softmax together: where
a router's logits differ little, that adds log 2 to every expert that stands for two, and no other is ever chosen. What
the largest adds to the expert's own logit is fitted to the router's inputs by least squares.

Axes: T tokens, E experts, K experts that stay, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moeprune.checkpoint.layout import LayerLayout
from moeprune.recovery.ridge import solve

_RIDGE = 1e-3  # a fraction of the mean second moment of the inputs


@dataclass
class Watched:
    """What a layer's router was given and what it made of that, batch after batch: `[T, H]` and `[T, E]`."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class Routers(TorchFunctionMode):
    """While it is on, notes what the linear maps of routers are given and give."""

    def __init__(self, model: torch.nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self.seen: dict[str, Watched] = {layer: Watched() for layer in names}
        self._layers = {model.get_parameter(name).data_ptr(): layer for layer, name in names.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and (layer := self._layers.get(args[1].data_ptr())):
            self.seen[layer].inputs.append(args[0].detach().flatten(0, -2))
            self.seen[layer].logits.append(out.detach().flatten(0, -2))
        return out


def names_of(layers: dict[str, LayerLayout]) -> dict[str, str]:
    """Layer -> its router's weight, where it has one that is a matrix with a row for each expert."""
    found = {}
    for layer, layout in layers.items():
        outside = [name for name, axis in layout.parameters.items() if not name.startswith(f"{layer}.") and axis == 0]
        weights = [name for name in outside if name.endswith("weight")]
        if len(weights) == 1:
            found[layer] = weights[0]
    return found


def change(
    watched: Watched, counts: Sequence[torch.Tensor], groups: Sequence[Sequence[int]], *, bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What to add to the rows, and to the biases where the router has them, of experts that stand for several.

    What is fitted is how much more than the expert itself the most wanted was: one that stands for itself keeps its
    row, whatever the router makes of its logits.

    Args:
        counts: bool `[T]` for each batch; False is padding.
        groups: for each expert that stays, itself and then the others it stands for.

    Returns:
        `[K, H]` and `[K]` or None, float32.
    """
    first = [members[0] for members in groups]
    size = watched.inputs[0].shape[1] + bias
    moment, target = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, len(groups)).double()
    for x_TH, logits_TE, counts_T in zip(watched.inputs, watched.logits, counts, strict=True):
        x_TH, logits_TE = x_TH[counts_T].float(), logits_TE[counts_T].float()
        if bias:
            x_TH = torch.cat([x_TH, torch.ones_like(x_TH[:, :1])], dim=1)
        most_TK = torch.stack([logits_TE[:, list(members)].amax(1) for members in groups], dim=1)
        moment += (x_TH.T @ x_TH).double().cpu()
        target += (x_TH.T @ (most_TK - logits_TE[:, first])).double().cpu()
    change_KH = solve(moment, target, _RIDGE).T.float()
    return (change_KH[:, :-1], change_KH[:, -1]) if bias else (change_KH, None)
