"""What a student's layers put out on the way: taken down as it runs, to be compared with the teacher's.

The watch stands for the whole training: a backward pass that computes activations again comes by here, too, and must
find what the forward pass found.

Axes: T tokens of a batch, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import expert_count
from moeprune.distillation.end_to_end.lora import plain_name
from moeprune.moe_blocks import block_of, hidden_states
from moeprune.statistics.observer import ExpertsCall, intercept


@dataclass(frozen=True)
class Choices:
    """What one layer's experts made of a batch.

    Attributes:
        index_TK: who ran for each token, counted over the student's own experts.
        there_TK: bool; False where the choice was none of the experts (but a constant).
        out_TKH: what each put out, unweighted.
    """

    index_TK: torch.Tensor
    there_TK: torch.Tensor
    out_TKH: torch.Tensor


@dataclass
class Inner:
    """Of the pass that came last: name of the experts module -> its experts' and its block's outputs."""

    experts: dict[str, Choices] = field(default_factory=dict)
    blocks: dict[str, torch.Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        self.experts.clear()
        self.blocks.clear()


@contextmanager
def watching(student: PreTrainedModel, layers: list[str], *, experts: bool, blocks: bool) -> Iterator[Inner]:
    """Take down what the layers put out, in every pass inside the block; `forget` between two.

    Args:
        layers: names of the teacher's experts modules; in the student, some may be dense.
        experts, blocks: what is wanted.
    """
    inner = Inner()
    with ExitStack() as stack:
        if experts:
            stack.enter_context(intercept(student, partial(_run, inner)))
        for name in layers if blocks else ():
            block = student.get_submodule(block_of(name))
            stack.callback(block.register_forward_hook(partial(_keep_output, inner, name)).remove)
        yield inner


def run_choices(call: ExpertsCall, index_TK: torch.Tensor) -> torch.Tensor:
    """What the call's experts make of its inputs for other choices than its own, unweighted: `[T, K, H]`."""
    choices_Q1 = index_TK.reshape(-1, 1)
    ones_Q1 = torch.ones(choices_Q1.shape, dtype=call.weight_TK.dtype, device=choices_Q1.device)
    out_QH = call.forward(call.module, call.x_TH.repeat_interleave(index_TK.shape[1], dim=0), choices_Q1, ones_Q1)
    return out_QH.view(*index_TK.shape, -1)


def _run(inner: Inner, call: ExpertsCall) -> torch.Tensor:
    there_TK = call.index_TK < expert_count(call.module)
    out_TKH = run_choices(call, call.index_TK).masked_fill(~there_TK[..., None], 0)
    # A pass that is repeated for the backward pass finds its first outputs here, which belong to the loss.
    inner.experts.setdefault(plain_name(call.layer), Choices(call.index_TK, there_TK, out_TKH))
    return (out_TKH * call.weight_TK[..., None]).sum(1).to(call.x_TH.dtype)


def _keep_output(inner: Inner, name: str, _: torch.nn.Module, __: Any, output: Any) -> None:
    inner.blocks.setdefault(name, hidden_states(output).flatten(0, -2))
