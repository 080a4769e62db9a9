"""A student's block, and what the teacher's was given and put out: what the student still gets wrong.

Axes: N sequences in all, b of them in a step, S tokens of each, T = b S, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from moeprune.distillation.experts import learning_inside, teachers_error
from moeprune.distillation.layer_local.noted import Noted
from moeprune.distillation.losses import block_error
from moeprune.distillation.objective import Objective
from moeprune.errors import InputError
from moeprune.moe_blocks import hidden_states
from moeprune.recovery.say import roots
from moeprune.statistics.observer import ExpertsCall, intercept

AT_ONCE = 16  # sequences, where all are looked at


class Lesson:
    """One layer's."""

    def __init__(
        self,
        layer: str,
        model: PreTrainedModel,
        block: torch.nn.Module,
        given: Noted,
        output: Noted,
        sequences: int,
        objective: Objective,
        teacher: torch.nn.Module | None = None,
        keep: list[int] | None = None,
    ) -> None:
        """
        Args:
            layer: its name, for messages.
            model: the student, of which only the block needs to be in memory.
            block: its block, in float32.
            given: the arguments of the teacher's block, a tuple and a dict.
            output: what it returned.
            sequences: how many.
            teacher, keep: the teacher's experts and which of them the student's are, for the objective `experts`.
        """
        self._model, self._block = model, block
        self._given, self._output = given, output
        self._objective = objective
        self._teacher, self._keep = teacher, keep
        self._device = next(block.parameters()).device
        everything = [self._wanted(rows) for rows in torch.arange(sequences).split(AT_ONCE)]
        say = torch.cat(roots(everything, [torch.ones(len(part), dtype=torch.bool) for part in everything]))
        self._say_NS = say.view(sequences, -1)
        if not say.isfinite().all():
            raise InputError(f"in {layer} the original's outputs are not finite; nothing can be learnt from them")
        self._experts_errors: list[torch.Tensor] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block, errors can be had."""
        with intercept(self._model, self._run_experts):
            yield

    def error(self, rows: torch.Tensor) -> torch.Tensor:
        """The objective on some sequences, with gradients."""
        args, kwargs = tree_map(self._as_here, self._given.get(rows))
        self._experts_errors.clear()
        out_TH = _tokens(self._block(*args, **kwargs))
        say_T = self._say_NS[rows].flatten().to(self._device)
        total = out_TH.new_zeros(())
        if self._objective.block:
            total = total + self._objective.block * block_error(out_TH, self._wanted(rows).to(self._device), say_T)
        for error in self._experts_errors:
            total = total + self._objective.experts * error
        return total

    @torch.no_grad()
    def mean_error(self, rows: torch.Tensor) -> float:
        """The same over many sequences, some at a time."""
        parts = rows.split(AT_ONCE)
        return sum(float(self.error(part)) * len(part) for part in parts) / len(rows)

    def _run_experts(self, call: ExpertsCall) -> torch.Tensor:
        inside = learning_inside(call)
        if self._objective.experts and self._teacher is not None and self._keep is not None:
            self._experts_errors.append(teachers_error(call, inside, self._teacher, self._keep))
        return inside.mixed(len(call.x_TH)).to(call.x_TH.dtype)

    def _wanted(self, rows: torch.Tensor) -> torch.Tensor:
        return _tokens(self._output.get(rows))

    def _as_here(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._device, torch.float32 if value.is_floating_point() else None)


def _tokens(output: torch.Tensor | Sequence[Any]) -> torch.Tensor:
    """Of whatever sequences: `[T, H]`."""
    hidden = hidden_states(output)
    return hidden.reshape(-1, hidden.shape[-1])
