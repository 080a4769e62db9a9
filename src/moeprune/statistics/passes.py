"""How the tokens are run through the model; `calibration` knows what is taken down.

Axes: B sequences of a batch, S tokens of a sequence with its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.fitting import Fitting
from moeprune.statistics.observer import ExpertsCall, observe


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together.

    Attributes:
        ids_BS: int64 token ids.
        mask_BS: bool; False is padding, which stands to the right of a sequence's tokens.
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids_BS)

    def rows(self, rows: slice) -> Batch:
        """Some of its sequences."""
        return Batch(self.ids_BS[rows], self.mask_BS[rows])


# The number of the batch, which of its rows, and a call whose tokens are those rows', one row after another, padding
# included.
Watch = Callable[[int, slice, ExpertsCall], None]


class ForwardPass(Protocol):
    """Runs sequences through a model.

    Attributes:
        layers: names of the experts modules, in the order of the model.
    """

    @property
    def layers(self) -> list[str]: ...

    def __call__(
        self, batches: Sequence[Batch], watch: Watch, on_progress: Callable[[int, int], None], *, inside: bool = False
    ) -> None:
        """Show each row of each batch to `watch` once for each expert of each layer, in whatever order.

        Args:
            batches: what is run.
            watch: a batch can come in several parts, for example where memory does not suffice for the whole.
            on_progress: called with how much is done, and of how much.
            inside: `watch` will look at `ExpertsCall.inside`.
        """


class InMemoryPass:
    """Batch after batch through a model that is in memory, on its device and in evaluation mode."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = list(experts_modules(model))
        self._model = model

    @torch.inference_mode()
    def __call__(
        self, batches: Sequence[Batch], watch: Watch, on_progress: Callable[[int, int], None], *, inside: bool = False
    ) -> None:
        """Raises InputError where memory does not suffice for a single sequence."""
        fitting = Fitting("calibrating on")
        for number, batch in enumerate(batches):
            fitting.run(len(batch), partial(self._run, batch, partial(watch, number), set(), inside))
            on_progress(number + 1, len(batches))

    def _run(
        self,
        batch: Batch,
        watch: Callable[[slice, ExpertsCall], None],
        shown: set[tuple[str, int]],
        inside: bool,
        rows: slice,
    ) -> None:
        """`shown` are the layers and rows that `watch` has seen of this batch, before memory ran out further up."""
        before = frozenset(shown)

        def show_once(call: ExpertsCall) -> None:
            # Rows that are run again lie within a slice that was shown to a layer as a whole, or not at all.
            if (call.layer, rows.start) not in before:
                watch(rows, call)
                shown.update((call.layer, row) for row in range(rows.start, rows.stop))

        part, device = batch.rows(rows), self._model.device
        mask_BS = None if part.mask_BS.all() else part.mask_BS.to(device)
        with observe(self._model, show_once, inside=inside):
            # The logits of all tokens are the largest tensor of a pass, and nobody looks at them.
            self._model.base_model(input_ids=part.ids_BS.to(device), attention_mask=mask_BS, use_cache=False)
