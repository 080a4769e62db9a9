"""Experts that learn, and what the teacher's own make of the same tokens.

Axes: T tokens, K experts per token, N choices of experts, E experts, H hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from moeprune.checkpoint.layout import expert_count
from moeprune.distillation.losses import experts_error
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.recovery.say import roots
from moeprune.statistics.inside import Inside, look_inside
from moeprune.statistics.observer import ExpertsCall


def learning_inside(call: ExpertsCall) -> Inside:
    """`ExpertsCall.inside` with gradients, at a cost that does not grow with the number of experts.

    The gradient of one expert's part of a fused weight is a whole weight of zeros but for that part; of all parts taken
    at once it is made only once.
    """
    return look_inside(cast(torch.nn.Module, _Unbound(call.module)), call.x_TH, call.index_TK, call.weight_TK)


class _Unbound:
    """An experts module whose fused weights and biases have been taken apart."""

    def __init__(self, module: torch.nn.Module) -> None:
        experts = expert_count(module)
        self._module = module
        self._parts = {
            name: parameter.unbind(0)
            for name, parameter in module.named_parameters(recurse=False)
            if len(parameter) == experts
        }

    def __getattr__(self, name: str) -> Any:
        return self._parts[name] if name in self._parts else getattr(self._module, name)


def teachers_error(call: ExpertsCall, inside: Inside, teacher: torch.nn.Module, keep: list[int]) -> torch.Tensor:
    """How far each expert of the student is from the teacher's own, on the tokens that it receives (`experts_error`).

    Args:
        call, inside: of the student's experts.
        teacher: the teacher's experts module.
        keep: which of the teacher's the student's are (`LayerPlan.keep`).
    """
    nobody = expert_count(teacher)
    own_E = torch.full((len(keep) + 1,), nobody, device=call.index_TK.device)
    own_E[: len(keep)] = torch.tensor(keep)
    index_TK = own_E[call.index_TK.clamp(max=len(keep))]  # past the experts are constants, and the choice of none
    dtype = next(teacher.parameters()).dtype
    with torch.no_grad():
        wanted_NH = look_inside(teacher, call.x_TH.to(dtype), index_TK, call.weight_TK).output_NH.float()
    (say_N,) = roots([wanted_NH], [torch.ones(len(wanted_NH), dtype=torch.bool, device=wanted_NH.device)])
    return experts_error(inside.output_NH, wanted_NH, say_N, inside.counts_R)


def refuse_without_counterparts(plan: Plan) -> None:
    """Raise InputError where experts that stay are not meant to be as the teacher's are."""
    if any(layer.merged or layer.stands_for for layer in plan.layers.values()):
        raise InputError(
            "the objective `experts` holds each expert against the teacher's own, and this plan makes one expert of "
            "several; use the objective `block`"
        )
    if len(plan.condensed) == len(plan.layers):
        raise InputError("the objective `experts` needs routed experts, and this plan leaves none; use `block`")
