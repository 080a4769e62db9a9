"""What happens inside a layer's experts: each choice's hidden activations and output, before anything is mixed.

Whatever dispatches through transformers' `ExpertsInterface` keeps its experts in one form, which its own fast
implementations rely on: fused weights with their layout in flags, an activation, perhaps biases and a norm. So one
computation serves every family, and the layer's output, mixed from it, costs no second one.

Axes: T tokens, K experts per token, R experts of the call, N choices of these experts, I expert width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True)
class Inside:
    """The choices of a call, ordered by expert and, within one, by token.

    Attributes:
        token_N: int64, whose choice it is.
        weight_N: the gate weight.
        hidden_NI: what goes into the expert's last projection.
        output_NH: what comes out, unweighted.
        counts_R: how many choices each expert has.
    """

    token_N: torch.Tensor
    weight_N: torch.Tensor
    hidden_NI: torch.Tensor
    output_NH: torch.Tensor
    counts_R: list[int]

    def mixed(self, tokens: int) -> torch.Tensor:
        """What these experts put out for each token, `[T, H]`."""
        weighted_NH = self.output_NH * self.weight_N[:, None].to(self.output_NH.dtype)
        return self.output_NH.new_zeros(tokens, self.output_NH.shape[1]).index_add_(0, self.token_N, weighted_NH)

    def sum_by_expert(self, value_N: torch.Tensor) -> torch.Tensor:
        """`[R, ...]` float64: a value per choice, `[N, ...]`, summed over each expert's."""
        return torch.stack([part.sum(0, dtype=torch.float64) for part in value_N.split(self.counts_R)])

    def of(self, chosen_N: torch.Tensor) -> Inside:
        """Some of the choices, by a bool for each."""
        counts_R = [int(part.sum()) for part in chosen_N.split(self.counts_R)]
        return Inside(
            self.token_N[chosen_N],
            self.weight_N[chosen_N],
            self.hidden_NI[chosen_N],
            self.output_NH[chosen_N],
            counts_R,
        )


def look_inside(
    module: torch.nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor, first: int = 0
) -> Inside:
    """Run experts on the tokens that chose them.

    Args:
        module: the experts.
        index_TK: who was chosen, counted over all experts of the layer.
        first: the module's first expert in that counting; choices of experts that it does not hold are left out.
    """
    experts = cast(int, module.num_experts)
    chosen_N = index_TK.to(torch.int64).flatten() - first
    place_N = torch.where((chosen_N >= 0) & (chosen_N < experts))[0]
    place_N = place_N[chosen_N[place_N].argsort(stable=True)]
    token_N = place_N // index_TK.shape[1]
    counts_R = torch.bincount(chosen_N[place_N], minlength=experts).tolist()
    hidden, output = [], []
    for expert, token_n in enumerate(token_N.split(counts_R)):
        if len(token_n):
            hidden.append(hidden_of(module, expert, x_TH[token_n]))
            output.append(output_of(module, expert, hidden[-1]))
    width, size = (down_weight(module, 0).shape[1], x_TH.shape[1]) if not hidden else (0, 0)
    return Inside(
        token_N,
        weight_TK.flatten()[place_N],
        torch.cat(hidden) if hidden else x_TH.new_zeros(0, width),
        torch.cat(output) if output else x_TH.new_zeros(0, size),
        counts_R,
    )


def hidden_of(module: torch.nn.Module, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
    """What goes into an expert's last projection, `[N, I]`."""
    up_NI = _project(module, "gate_up_proj" if module.has_gate else "up_proj", expert, x_NH)
    apply = cast(Callable[[torch.Tensor], torch.Tensor], module._apply_gate if module.has_gate else module.act_fn)
    return apply(up_NI)


def output_of(module: torch.nn.Module, expert: int, hidden_NI: torch.Tensor) -> torch.Tensor:
    """What an expert makes of these, `[N, H]`."""
    output_NH = _project(module, "down_proj", expert, hidden_NI)
    if getattr(module, "has_post_expert_norm", False):
        output_NH = cast(torch.nn.Module, module.post_expert_norm)(output_NH)
    return output_NH


def down_weight(module: torch.nn.Module, expert: int) -> torch.Tensor:
    """An expert's last projection, `[H, I]`, sharing its memory."""
    return _weight(module, "down_proj", expert)


def _weight(module: torch.nn.Module, name: str, expert: int) -> torch.Tensor:
    weight = cast(torch.Tensor, getattr(module, name))[expert]
    return weight.T if module.is_transposed else weight


def _project(module: torch.nn.Module, name: str, expert: int, x_NH: torch.Tensor) -> torch.Tensor:
    weight = _weight(module, name, expert)
    bias = cast(torch.Tensor, getattr(module, f"{name}_bias"))[expert] if module.has_bias else None
    return torch.nn.functional.linear(x_NH.to(weight.dtype), weight, bias)
