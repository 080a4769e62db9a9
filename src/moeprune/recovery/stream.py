"""All forward passes of a data set through one model, stopped together at each layer's experts.

What the experts are given is then known for the whole data set before any of it goes on, so that the weights can be
changed there and everything that follows sees the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from moeprune.statistics.observer import ExpertsCall, intercept
from moeprune.statistics.passes import Batch
from moeprune.streaming.lanes import Lane, stop_at


class Stream:
    """The passes; made by `streaming`.

    Attributes:
        calls: one of the layer's experts for each batch; none before the first layer.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.calls: list[ExpertsCall] = []
        self._lanes: list[Lane[ExpertsCall]] = [Lane(partial(_run, model, batch)) for batch in batches]

    def forget_what_was_inside(self) -> None:
        """To be called where the weights of this layer have changed."""
        self.calls = [replace(call) for call in self.calls]

    def go_to(self, layer: str) -> None:
        """Let every pass run to this layer, which must be the next. The experts that it stands at answer first."""
        answers: list[ExpertsCall | None] = [*self.calls] or [None] * len(self._lanes)
        self.calls = []
        for place, lane in enumerate(self._lanes):
            call, answers[place] = answers[place], None  # what is inside a call is large; one at a time is freed
            lane.go_on(call.run() if call else None)
            if lane.door is None or lane.door.layer != layer:
                raise RuntimeError(f"the passes came to {lane.door and lane.door.layer}, not to {layer}")
            self.calls.append(lane.door)

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


def _run(model: PreTrainedModel, batch: Batch) -> None:
    mask_BS = None if batch.mask_BS.all() else batch.mask_BS.to(model.device)
    model.base_model(input_ids=batch.ids_BS.to(model.device), attention_mask=mask_BS, use_cache=False)
