"""What the teacher has to say of a batch: its most probable next tokens, and how far a student's layers are from its.

Axes: B sequences of S tokens, T = B * S; K most probable tokens, V of the vocabulary; C choices of experts per token;
H hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.distillation.end_to_end.inner import Inner, run_choices
from moeprune.distillation.end_to_end.sizes import Size
from moeprune.distillation.objective import Objective
from moeprune.moe_blocks import block_of, hidden_states
from moeprune.plan import Plan
from moeprune.statistics.observer import ExpertsCall, intercept


@dataclass(frozen=True)
class Top:
    """The teacher's most probable next tokens.

    Attributes:
        index_BSK: int32.
        log_share_BSK: the logarithms of their probabilities, at the objective's temperature.
    """

    index_BSK: torch.Tensor
    log_share_BSK: torch.Tensor

    @classmethod
    def of(cls, logits_BSV: torch.Tensor, objective: Objective) -> Top:
        scaled_BSV = logits_BSV.float() / objective.temperature
        top = scaled_BSV.topk(min(objective.teacher_top, logits_BSV.shape[-1]), dim=-1)
        return cls(top.indices.to(torch.int32), top.values - scaled_BSV.logsumexp(-1, keepdim=True))


@dataclass(frozen=True)
class Taught:
    """Of one batch: the errors of the student's layers by their names in the objective, and what follows the tokens."""

    errors: dict[str, torch.Tensor]
    top: Top | None


class Teacher:
    """The original in memory, which only infers."""

    def __init__(self, model: PreTrainedModel, objective: Objective, plan: Plan) -> None:
        self._model, self._objective = model, objective
        self._layers = list(plan.layers)
        self._keep = {name: torch.tensor(layer.keep or [0]) for name, layer in plan.layers.items()}
        self._sizes: dict[tuple[str, str], Size] = {}

    @torch.no_grad()
    def measure(self, ids_BS: torch.Tensor) -> None:
        """See how large the layers' outputs are; once, before the first batch."""
        seen: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)

        def see_experts(call: ExpertsCall) -> torch.Tensor:
            out_TCH = run_choices(call, call.index_TK)
            there_TC = call.index_TK < call.layer_experts
            seen["experts", call.layer].append(out_TCH[there_TC])
            return call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK)

        def see_block(name: str, _: torch.nn.Module, __: Any, output: Any) -> None:
            seen["block", name].append(hidden_states(output).flatten(0, -2))

        with self._watched(see_experts, see_block):
            for id_S in ids_BS:
                run(self._model, id_S[None], logits=False)
        self._sizes = {key: Size.of(parts) for key, parts in seen.items()}

    def teach(self, ids_BS: torch.Tensor, inner: Inner) -> Taught:
        """Run a batch beside what the student has just made of it.

        Each expert's output is held against that of the teacher's own, for the tokens that chose it in the student and
        what the teacher's layer is given of them.
        """
        found: dict[str, list[torch.Tensor]] = {"experts": [], "block": []}

        def compare_experts(call: ExpertsCall) -> torch.Tensor:
            if student := inner.experts.get(call.layer):
                keep = self._keep[call.layer].to(student.index_TK.device)
                wanted_TCH = run_choices(call, keep[student.index_TK.to(torch.int64).clamp(max=len(keep) - 1)])
                with torch.enable_grad():
                    found["experts"].append(
                        self._sizes["experts", call.layer].missed(
                            student.out_TKH.flatten(0, 1), wanted_TCH.flatten(0, 1), student.there_TK.flatten()
                        )
                    )
            return call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK)

        def compare_block(name: str, _: torch.nn.Module, __: Any, output: Any) -> None:
            with torch.enable_grad():
                wanted_TH = hidden_states(output).flatten(0, -2)
                found["block"].append(self._sizes["block", name].missed(inner.blocks[name], wanted_TH))

        with torch.no_grad(), self._watched(compare_experts, compare_block):
            logits_BSV = run(self._model, ids_BS, logits=bool(self._objective.logits))
        errors = {name: torch.stack(parts).mean() for name, parts in found.items() if parts}
        return Taught(errors, Top.of(logits_BSV, self._objective) if self._objective.logits else None)

    def _watched(self, on_experts: Any, on_block: Any) -> ExitStack:
        stack = ExitStack()
        if self._objective.experts:
            stack.enter_context(intercept(self._model, on_experts))
        for name in self._layers if self._objective.block else ():
            block = self._model.get_submodule(block_of(name))
            stack.callback(block.register_forward_hook(partial(on_block, name)).remove)
        return stack


def run(model: torch.nn.Module, ids_BS: torch.Tensor, *, logits: bool) -> torch.Tensor:
    """The logits of all tokens, or of the last of each sequence only: `[B, S or 1, V]`.

    The whole model is called for it, even where nobody looks at logits: sharded, it gathers its weights when it is.
    """
    return model(input_ids=ids_BS, use_cache=False, **({} if logits else {"logits_to_keep": 1})).logits
