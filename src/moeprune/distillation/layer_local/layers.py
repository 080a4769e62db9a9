"""The teacher's pass over all text, and at each layer the student's block brought in, trained and put away.

The teacher's layers are brought in once each, for all sequences. Nothing of one layer's training is needed for
another's, so any of them can be trained anywhere, and what each has learnt is kept as it is finished.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune.checkpoint.loading import default_device
from moeprune.distillation.experts import refuse_without_counterparts
from moeprune.distillation.layer_local import learnt
from moeprune.distillation.layer_local.job import Job
from moeprune.distillation.layer_local.learn import Outcome, learn, steps_of
from moeprune.distillation.layer_local.learnt import LayerLearnt
from moeprune.distillation.layer_local.lesson import Lesson
from moeprune.distillation.layer_local.noted import Memory, Noted
from moeprune.distillation.zeros import has_zeros
from moeprune.errors import InputError
from moeprune.moe_blocks import block_of
from moeprune.statistics.calibration import BATCH_TOKENS, make_batches
from moeprune.streaming.paging import PagedModel
from moeprune.streaming.room import memory_in_use, return_freed_memory
from moeprune.streaming.streamed import StreamedPass

NOTED_IN_MEMORY = 1 << 30
_SHARE_OF_LIMIT = 1 / 16  # of a memory limit, for what is noted of a layer
COPIES = 5  # of what learns: its gradients, two moments, the best so far, and itself


@dataclass(frozen=True)
class Trained:
    """A layer that has just been trained: how it went, and what that took.

    Attributes:
        tokens: that it was trained on, repetitions counted.
    """

    learnt: LayerLearnt
    tokens: int
    seconds: float


def train_layers(
    job: Job,
    directory: Path,
    *,
    memory_limit: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_layer: Callable[[Trained], None] = lambda trained: None,
) -> None:
    """Train the layers that have no file in a directory yet, and put their files there.

    Args:
        directory: what is in it is of the same job.
        memory_limit: bytes that the process may take in all.
        on_step: called with how many of all layers' steps are done, and of how many.
        on_layer: called after each layer.

    Raises:
        InputError: the objective cannot be had of this plan, the memory limit is too small, or the teacher's outputs
            are not finite.
    """
    if job.settings.objective.experts:
        refuse_without_counterparts(job.plan)
    missing = [layer for layer in job.learning if learnt.load(directory, layer) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        teacher = StreamedPass(
            job.teacher, memory_limit=memory_limit, scratch=Path(scratch), experts_bytes=learnt.load_room(directory)
        )
        layers = _Layers(job, missing, teacher, directory, Path(scratch), memory_limit, on_step, on_layer)
        teacher.blocks(layers.batches, layers)


class _Layers:
    """Watches the teacher's blocks (`streamed.BlockWatcher`) and trains the student's.

    Attributes:
        batches: what is to be run through the teacher.
    """

    def __init__(
        self,
        job: Job,
        layers: list[str],
        teacher: StreamedPass,
        directory: Path,
        scratch: Path,
        memory_limit: int | None,
        on_step: Callable[[int, int], None],
        on_layer: Callable[[Trained], None],
    ) -> None:
        self.layers = layers
        self._job, self._teacher, self._directory = job, teacher, directory
        self._scratch, self._limit = scratch, memory_limit
        self._on_step, self._on_layer = on_step, on_layer
        self._student = PagedModel(job.student, torch.float32, default_device())
        self._ids_BS = job.text.rows()
        sizes = [len(job.text.train_BS), len(job.text.held_out_BS)]
        self._train_rows, self._held_out_rows = torch.arange(len(self._ids_BS)).split(sizes)
        self._batch_blocks = max(1, BATCH_TOKENS // self._ids_BS.shape[1])
        self.batches = make_batches(self._ids_BS, None, self._batch_blocks)
        self._steps = steps_of(job.settings, len(job.text.train_BS))
        self._done = (len(job.learning) - len(layers)) * self._steps
        for layer in layers:  # now, and again when it comes to it and more is in use
            self._refuse_without_room(layer)
        self._expect_next()

    def given(self, layer: str, number: int, rows: slice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given.put(self._of_all(number, rows), (args, kwargs))

    def put_out(self, layer: str, number: int, rows: slice, output: Any) -> None:
        self._output.put(self._of_all(number, rows), output)

    def passed(self, layer: str) -> None:
        started = time.monotonic()
        self._refuse_without_room(layer)
        outcome, changed = self._train(layer)
        made = LayerLearnt(layer, outcome.before, outcome.after, outcome.curve, outcome.reason, list(changed))
        if self._limit is not None:
            learnt.save_room(self._directory, self._teacher.room.experts)
        learnt.save(self._directory, made, changed)
        self._expect_next()
        if self._limit is not None:
            return_freed_memory()
        if len(outcome.curve) < self._steps:
            self._tell(self._steps)
        self._done += self._steps
        tokens = outcome.seen * self._ids_BS.shape[1]
        self._on_layer(Trained(made, tokens, time.monotonic() - started))

    def _train(self, layer: str) -> tuple[Outcome, dict[str, torch.Tensor]]:
        """How it went, and what changed."""
        job, name, plan = self._job, block_of(layer), self._job.plan.layers[layer]
        with ExitStack() as stack:
            block = stack.enter_context(self._student.whole(name)).requires_grad_(False)
            teacher = None
            if job.settings.objective.experts and plan.condensed is None:
                teacher = stack.enter_context(self._teacher.experts(layer))
            parameters = {one: block.get_parameter(one.removeprefix(f"{name}.")) for one in job.learning[layer]}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            outcome = learn(
                Lesson(
                    layer,
                    self._student.model,
                    block,
                    self._given,
                    self._output,
                    len(self._ids_BS),
                    job.settings.objective,
                    teacher,
                    plan.keep,
                ),
                list(parameters.values()),
                self._train_rows,
                self._held_out_rows,
                job.settings,
                seed=_seed(job.settings.seed, layer),
                sparse=[one for name, one in parameters.items() if has_zeros(job.plan, layer, name, one)],
                on_step=self._tell,
            )
            if outcome.after < outcome.before:
                return outcome, {one: parameter.detach().cpu() for one, parameter in parameters.items()}
            return outcome, {}

    def _of_all(self, number: int, rows: slice) -> slice:
        """Rows of a batch, among all sequences."""
        first = number * self._batch_blocks
        return slice(first + rows.start, first + rows.stop)

    def _expect_next(self) -> None:
        """Forget what was noted of a layer."""
        sequences, tokens = self._ids_BS.shape
        limit = NOTED_IN_MEMORY if self._limit is None else int(_SHARE_OF_LIMIT * self._limit)
        memory = Memory(limit, self._scratch)
        self._given, self._output = Noted(sequences, tokens, memory), Noted(sequences, tokens, memory)

    def _tell(self, of_layer: int) -> None:
        self._on_step(self._done + of_layer, len(self._job.learning) * self._steps)

    def _refuse_without_room(self, layer: str) -> None:
        if self._limit is None:
            return
        model = self._student.model
        learning = sum(model.get_parameter(name).nbytes for name in self._job.learning[layer])
        block = sum(parameter.nbytes for parameter in model.get_submodule(block_of(layer)).parameters())
        needed = memory_in_use() + block + (COPIES - 1) * learning
        if needed > self._limit:
            raise InputError(
                f"a memory limit of {self._limit / (1 << 20):,.0f} MiB is too small to train {layer}, which takes at "
                f"least {needed / (1 << 20):,.0f} MiB; raise it, or train fewer parts of it"
            )


def _seed(seed: int, layer: str) -> int:
    """The same for a layer wherever it is trained."""
    return int.from_bytes(hashlib.sha256(f"{seed} {layer}".encode()).digest()[:6], "big")
