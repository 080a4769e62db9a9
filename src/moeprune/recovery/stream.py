"""All forward passes of a data set through one model, stopped together at each layer's experts.

What each layer is given is then known for the whole data set, and so is what a block of another model makes of the
same: neither has to hold more than one layer's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from moeprune.moe_blocks import block_of
from moeprune.statistics.observer import ExpertsCall, intercept
from moeprune.statistics.passes import Batch
from moeprune.streaming.lanes import Lane, stop_at


@dataclass(frozen=True)
class Given:
    """The arguments of a block's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """The passes; made by `streaming`.

    Attributes:
        calls: one of the layer's experts for each batch; none before the first layer.
        given: to the layer's block, for each batch.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.calls: list[ExpertsCall] = []
        self.given: list[Given] = []
        self._lanes: list[Lane[ExpertsCall]] = [Lane(partial(_run, model, batch)) for batch in batches]
        self._model = model

    def go_to(self, layer: str) -> None:
        """Let every pass run to this layer, which must be the next."""
        answers: list[ExpertsCall | None] = [*self.calls] or [None] * len(self._lanes)
        self.calls, self.given = [], []
        block = self._model.get_submodule(block_of(layer))
        hook = block.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            for place, lane in enumerate(self._lanes):
                call, answers[place] = answers[place], None  # what is inside a call is large; one at a time is freed
                lane.go_on(call.run() if call else None)
                if lane.door is None or lane.door.layer != layer:
                    raise RuntimeError(f"the passes came to {lane.door and lane.door.layer}, not to {layer}")
                self.calls.append(lane.door)
        finally:
            hook.remove()

    def _note(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given.append(Given(args, kwargs))

    def end(self) -> None:
        for lane in self._lanes:
            lane.end()


@contextmanager
def streaming(model: PreTrainedModel, batches: Sequence[Batch]) -> Iterator[Stream]:
    """The passes of these batches through a model in memory, ended at the end of the block."""
    stream = Stream(model, batches)
    with intercept(model, stop_at):
        try:
            yield stream
        finally:
            stream.end()


def calls_of(model: PreTrainedModel, layer: str, given: Sequence[Given]) -> list[ExpertsCall]:
    """How a model's block calls its experts when it is given this, once for each."""
    block = model.get_submodule(block_of(layer))
    dtype = next(block.parameters()).dtype
    calls: list[ExpertsCall] = []

    def note(call: ExpertsCall) -> torch.Tensor:
        calls.append(call)
        return torch.zeros_like(call.x_TH)  # what they put out is not looked at

    def as_here(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with intercept(model, note):
        for one in given:
            block(*tree_map(as_here, one.args), **tree_map(as_here, one.kwargs))
    return calls


def _run(model: PreTrainedModel, batch: Batch) -> None:
    mask_BS = None if batch.mask_BS.all() else batch.mask_BS.to(model.device)
    model.base_model(input_ids=batch.ids_BS.to(model.device), attention_mask=mask_BS, use_cache=False)
