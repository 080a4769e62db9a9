"""The one pass over the text: what every layer was given and gave, and what its MoE block did to some of the tokens.

Axes: t sampled tokens, H hidden size, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.condensing.condensed import Condensed, run_for_all
from moeprune.condensing.expert_search import nearest_experts
from moeprune.condensing.partial_runs import PartialRuns, Run
from moeprune.errors import InputError
from moeprune.moe_blocks import MoeBlock, block_of, find_block, hidden_states, take_apart

_CONSTANT = 1e-3
_AT_ONCE = 64  # tokens by which experts are compared before some drop out


@dataclass(frozen=True)
class Sample:
    """A block on some tokens, as the model ran it.

    Attributes:
        input_tH: what it was given.
        output_tH: what it gave.
    """

    input_tH: torch.Tensor
    output_tH: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """A layer that can be condensed.

    Attributes:
        block: its MoE block.
        sample: that on some tokens.
        shared_scale: what stands for the gate of its shared expert: its mean over these tokens.
        shared_error: what that costs: the norm of the error in the shared expert's output, of that output's norm.
    """

    block: MoeBlock
    sample: Sample
    shared_scale: float
    shared_error: float

    @torch.inference_mode()
    def condense(self, model: PreTrainedModel, weights: Sequence[float], count: int) -> Condensed:
        """With the routed experts that the search chooses.

        Args:
            weights: what each routed expert's output would be multiplied by; one of 0 is not chosen.
            count: how many are chosen.
        """
        given, gave = self.sample.input_tH.split(_AT_ONCE), self.sample.output_tH.split(_AT_ONCE)
        shared = Condensed(self.block, {}, self.shared_scale).forward_in(model)

        def weighted(expert: int, part: int) -> torch.Tensor:
            return run_for_all(model, self.block, {expert: weights[expert]}, given[part]).float()

        experts = [expert for expert, weight in enumerate(weights) if weight]
        chosen = nearest_experts(gave, [shared(x_tH) for x_tH in given], experts, weighted, count)
        return Condensed(self.block, {expert: weights[expert] for expert in chosen}, self.shared_scale)


def run_once(runs: PartialRuns, batches: Sequence[torch.Tensor], tokens: int) -> tuple[list[Run], dict[str, Sample]]:
    """Run the model on all batches, and keep what its MoE blocks do to some tokens, evenly spaced."""
    experts = list(experts_modules(runs.model))
    total = sum(ids_BS.numel() for ids_BS in batches)
    place_t = torch.arange(min(tokens, total)) * total // min(tokens, total)
    taken: dict[str, list[Sample]] = {name: [] for name in experts}
    originals, before = [], 0

    def taking(name: str, place_t: torch.Tensor) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given, gave = next(iter([*args, *kwargs.values()])), hidden_states(output)
            rows = (one.reshape(-1, one.shape[-1])[place_t.to(one.device)] for one in (given, gave))
            taken[name].append(Sample(*rows))

        return hook

    for batch, ids_BS in enumerate(batches):
        inside_t = place_t[(place_t >= before) & (place_t < before + ids_BS.numel())] - before
        originals.append(runs.whole(batch, {block_of(name): taking(name, inside_t) for name in experts}))
        before += ids_BS.numel()
    return originals, {
        name: Sample(torch.cat([one.input_tH for one in some]), torch.cat([one.output_tH for one in some]))
        for name, some in taken.items()
    }


def condensable(model: PreTrainedModel, samples: dict[str, Sample]) -> dict[str, Layer]:
    """The layers that can be condensed. Raises InputError where none can."""
    layers, reasons = {}, []
    for name, sample in samples.items():
        try:
            block = find_block(model, name)
            layers[name] = _layer(model, block, sample)
        except InputError as error:
            reasons.append(error)
    if not layers:
        raise reasons[0]
    return layers


def _layer(model: PreTrainedModel, block: MoeBlock, sample: Sample) -> Layer:
    parts = take_apart(model, block, sample.input_tH)
    if parts.scale_T is None or parts.shared_TH is None:
        return Layer(block, sample, 1.0, 0.0)
    scale = parts.scale_T.double().mean().item()
    if abs(scale - 1) < _CONSTANT and (parts.scale_T - scale).abs().max() < _CONSTANT:
        scale = 1.0
    off_T = (scale / parts.scale_T - 1).abs() * parts.shared_TH.float().norm(dim=-1)
    return Layer(block, sample, scale, (off_T.norm() / parts.shared_TH.float().norm()).item())
