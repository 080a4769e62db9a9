"""recover: the original and what a plan left of it -> the same experts, fitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from moeprune import places, tracking
from moeprune.atomic import refuse_to_overwrite
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import check_fits
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.progress import progress
from moeprune.recovery import Recovered, recover_checkpoint
from moeprune.steps import machine
from moeprune.texts import Blocks, read_blocks
from moeprune.tracking import TrackedRun

BLOCKS = 128


def recover(
    model: str,
    pruned: str,
    plan: str,
    data: str,
    out: str,
    *,
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = BLOCKS,
    trust_remote_code: bool = False,
) -> Recovered:
    """Fit what a plan left of a model and put the result at `out`. See `recovery.recover`.

    Raises:
        InputError: the plan was not made for the model, the pruned one is not what it makes of it, or it asks for no
            recovery.
    """
    params = {"model": places.origin(model), "data": data, "block_tokens": block_tokens, "max_blocks": max_blocks}
    with (
        tracking.step("recover", params | machine.describe()) as run,
        places.output(out) as path,
        places.local_file(plan) as plan_path,
        places.local_model(pruned) as pruned_directory,
        recovering(
            model,
            data,
            text_field=text_field,
            block_tokens=block_tokens,
            max_blocks=max_blocks,
            trust_remote_code=trust_remote_code,
        ) as recovery,
    ):
        refuse_to_overwrite(path)
        decided, cut = Plan.load(plan_path), Checkpoint(pruned_directory, trust_remote_code)
        if decided.recovery is None:
            raise InputError(f"{plan} asks for no recovery; make one with `moeprune plan make --recover`")
        check_fits(recovery.original, decided)
        if cut.experts_per_layer != decided.experts_per_layer:
            raise InputError(f"{pruned} does not keep the experts that {plan} says; apply that plan to {model} first")
        return recovery(run, cut, decided, path)


class Recovery:
    """The original and its text, loaded when the first checkpoint is recovered; made by `recovering`."""

    def __init__(self, stack: ExitStack, model: str, read: Callable[[Checkpoint], Blocks], trust: bool) -> None:
        self._stack, self._model, self._read, self._trust = stack, model, read, trust

    @cached_property
    def original(self) -> Checkpoint:
        return Checkpoint(self._stack.enter_context(places.local_model(self._model)), self._trust)

    @cached_property
    def _blocks(self) -> Blocks:
        return self._read(self.original)

    @cached_property
    def _teacher(self) -> PreTrainedModel:
        machine.quieten()
        return self.original.load()

    def __call__(self, run: TrackedRun, cut: Checkpoint, plan: Plan, out: Path, label: str = "recover") -> Recovered:
        """Write the recovered checkpoint into a directory of this machine, and tell the run of it."""
        blocks, teacher = self._blocks, self._teacher
        run.dataset(blocks.name, blocks.address, blocks.fingerprint, "recovery", blocks.tokens)
        started = time.monotonic()
        with progress(label) as on_layer:
            recovered = recover_checkpoint(
                self.original, teacher, cut, plan, blocks.ids_BS, blocks.mask_BS, out, on_layer=on_layer
            )
        run.metrics({"recovery_seconds": time.monotonic() - started})
        for layer, name in enumerate(recovered.error_before):
            run.metrics(
                {
                    "layer_error_before_recovery_share": recovered.error_before[name],
                    "layer_error_after_recovery_share": recovered.error_after[name],
                },
                layer,
            )
        return recovered


@contextmanager
def recovering(
    model: str, data: str, *, text_field: str, block_tokens: int, max_blocks: int, trust_remote_code: bool
) -> Iterator[Recovery]:
    """Recovery on some text of what is left of a model. Nothing is read before the first."""

    def read(original: Checkpoint) -> Blocks:
        return read_blocks(
            data, original.tokenizer(), block_tokens=block_tokens, max_blocks=max_blocks, text_field=text_field
        )

    with ExitStack() as stack:
        yield Recovery(stack, model, read, trust_remote_code)
