"""CD-MoE as its authors run it: the whole model once for each candidate. Uses nothing of ours.

The dense layer is made from the parameters of the families here, by the names that they have in transformers.
Axes: T tokens, H hidden size, I width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


class Dense(torch.nn.Module):
    """One gated MLP, of the weighted sum of shared and routed experts."""

    def __init__(self, block: Any, weights: dict[int, float], shared_scale: float = 1.0) -> None:
        super().__init__()
        experts = block.experts
        assert not experts.is_transposed
        gates, ups, downs = [], [], []
        shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        if shared is not None:
            gates.append(shared.gate_proj.weight)
            ups.append(shared.up_proj.weight)
            downs.append(shared.down_proj.weight * shared_scale)
        for expert, weight in weights.items():
            gate, up = experts.gate_up_proj[expert].chunk(2)
            gates.append(gate)
            ups.append(up)
            downs.append(experts.down_proj[expert] * weight)
        self.gate_IH, self.up_IH, self.down_HI = torch.cat(gates), torch.cat(ups), torch.cat(downs, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ self.gate_IH.T) * (x @ self.up_IH.T)) @ self.down_HI.T


def with_dense(model: PreTrainedModel, layers: dict[str, tuple[dict[int, float], float]]) -> PreTrainedModel:
    """A copy in which the blocks of these experts modules are dense: their experts' weights, the shared one's scale."""
    changed = copy.deepcopy(model)
    for name, (weights, shared_scale) in layers.items():
        block = name.rpartition(".")[0]
        changed.set_submodule(block, Dense(changed.get_submodule(block), weights, shared_scale))
    return changed


def jensen_shannon(one_TH: torch.Tensor, other_TH: torch.Tensor) -> float:
    """Between softmaxes over H, mean over tokens, from its definition."""
    p_TH, q_TH = one_TH.double().softmax(-1), other_TH.double().softmax(-1)
    m_TH = (p_TH + q_TH) / 2
    return float((((p_TH * (p_TH / m_TH).log()).sum(-1) + (q_TH * (q_TH / m_TH).log()).sum(-1)) / 2).mean())


class Authors:
    """Searches by running the model; `passes` counts how often."""

    def __init__(self, model: PreTrainedModel, ids_BS: torch.Tensor, shared_scales: dict[str, float]) -> None:
        self.passes = 0
        self._model = model
        self._ids_BS = ids_BS
        self._scales = shared_scales

    def output(self, layers: dict[str, dict[int, float]], of: str = "") -> torch.Tensor:
        """The final hidden states of the model with these layers dense, or the output of the block `of`, `[T, H]`."""
        self.passes += 1
        changed = with_dense(self._model, {name: (some, self._scales[name]) for name, some in layers.items()})
        seen = []
        if of:
            changed.get_submodule(of).register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            final = changed.base_model(input_ids=self._ids_BS, use_cache=False).last_hidden_state
        out = seen[0] if of else final
        return out.reshape(-1, out.shape[-1])

    def experts(self, layer: str, gate_E: list[float], count: int) -> list[int]:
        block = layer.rpartition(".")[0]
        original_TH = self.output({}, block)
        chosen: list[int] = []
        for _ in range(count):
            distance = {
                expert: jensen_shannon(
                    original_TH, self.output({layer: {one: gate_E[one] for one in [*chosen, expert]}}, block)
                )
                for expert, weight in enumerate(gate_E)
                if expert not in chosen and weight
            }
            chosen.append(min(distance, key=distance.__getitem__))
        return chosen

    def layers(self, condensed: dict[str, dict[int, float]], count: int) -> list[str]:
        original_TH = self.output({})
        chosen: list[str] = []
        for _ in range(count):
            distance = {
                name: jensen_shannon(original_TH, self.output({one: condensed[one] for one in [*chosen, name]}))
                for name in condensed
                if name not in chosen
            }
            chosen.append(min(distance, key=distance.__getitem__))
        return chosen


def shared_scales(model: PreTrainedModel, ids_BS: torch.Tensor) -> dict[str, float]:
    """The mean over the tokens of what each block multiplies its shared expert with: a sigmoid, or nothing."""
    seen: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            gate = getattr(module, "shared_expert_gate", None)
            seen[name] = float(torch.sigmoid(gate(args[0])).mean()) if gate is not None else 1.0

        return take

    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        model.base_model(input_ids=ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


LOG_2 = math.log(2)
