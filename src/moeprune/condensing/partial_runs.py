"""A model run from one of its layers on, from what enters that layer.

Nothing is known of a family but that its layers are in one list and pass hidden states on: the layers before do so
without computing anything. Where a family's layers pass on more than that, which is tried, the model is run as a whole.

Axes: B sequences of a batch, S tokens of a sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.condensing.condensed import Condensed, answering

_CLOSE = 1e-3


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        final_BSH: the hidden states after the last layer and norm.
        entering: number of each layer that was run -> the hidden states that it was given.
    """

    final_BSH: torch.Tensor
    entering: dict[int, torch.Tensor]


class PartialRuns:
    """Runs a model on batches of text from any of its layers on.

    Attributes:
        passes: the work done so far, in passes of all text through the whole model.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> None:
        """`batches` are token ids `[B, S]`."""
        self.model = model
        self.passes = 0.0
        self._batches = batches
        self._layers, self._prefix = _layers_of(model)
        self._can_begin_late = True

    def layer_of(self, experts: str) -> int:
        """The number of the layer that an experts module is in."""
        return int(experts.removeprefix(self._prefix).split(".")[0])

    @torch.inference_mode()
    def whole(self, batch: int, watching: Mapping[str, Callable[..., None]]) -> Run:
        """Run the model as it is; `watching`: forward hooks, with keywords, by the name of their module."""
        with ExitStack() as stack:
            for name, hook in watching.items():
                handle = self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            return self._run(batch)

    @torch.inference_mode()
    def try_to_begin_late(self, batch: int, run: Run) -> None:
        """See, from a run of a batch through the whole model, whether one from a layer on gives the same."""
        first = max(run.entering)
        try:
            with self._before(first, run.entering[first]):
                final_BSH = self._run(batch, first).final_BSH
        except Exception:  # the layers may miss what is not passed on in any way they like
            self._can_begin_late = False
            return
        self._can_begin_late = bool((final_BSH - run.final_BSH).norm() <= _CLOSE * run.final_BSH.norm())

    @torch.inference_mode()
    def condensed(self, batch: int, layers: Sequence[Condensed], first: int, entering_BSH: torch.Tensor) -> Run:
        """Run the model with some layers condensed, from the layer of the number `first` on."""
        first = first if self._can_begin_late else 0
        with ExitStack() as stack:
            for layer in layers:
                module = self.model.get_submodule(layer.block.name)
                stack.enter_context(answering(module, layer.forward_in(self.model)))
            stack.enter_context(self._before(first, entering_BSH))
            return self._run(batch, first)

    def _run(self, batch: int, first: int = 0) -> Run:
        entering: dict[int, torch.Tensor] = {}

        def watch(number: int) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                entering[number] = args[0] if args else kwargs["hidden_states"]

            return hook

        ids_BS = self._batches[batch].to(self.model.device)
        with ExitStack() as stack:
            for number in range(first, len(self._layers)):
                handle = self._layers[number].register_forward_pre_hook(watch(number), with_kwargs=True)
                stack.callback(handle.remove)
            final_BSH = self.model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        share_of_text = ids_BS.numel() / sum(ids_BS.numel() for ids_BS in self._batches)
        self.passes += share_of_text * (len(self._layers) - first) / len(self._layers)
        return Run(final_BSH, entering)

    def _before(self, first: int, entering_BSH: torch.Tensor) -> ExitStack:
        """While it is entered, the layers before the `first` compute nothing and pass on what is to enter that."""
        stack = ExitStack()
        for layer in list(self._layers)[:first]:
            stack.enter_context(answering(layer, lambda *_, **__: entering_BSH))
        return stack


def _layers_of(model: PreTrainedModel) -> tuple[torch.nn.ModuleList, str]:
    """The list that holds all experts modules, and how the names in it begin."""
    experts = list(experts_modules(model))
    return next(
        (module, f"{name}.")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and all(one.startswith(f"{name}.") for one in experts)
    )
