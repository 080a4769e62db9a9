"""From a row, a ratio and a draw to a cell: calibrate, decide, carry out, measure."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.evaluation.measure import BATCH_BLOCKS, measure
from moeprune.methods import find, make_plan, statistics_for
from moeprune.methods.base import Trial
from moeprune.plan import Plan, Recovery
from moeprune.recovery import recover_checkpoint
from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps.trial import BLOCKS
from moeprune.texts import Blocks
from quality_table.cells import Cell, Key, Original
from quality_table.rows import Row
from quality_table.texts import MIXTURE, Drawn, Texts

_TIMED_BATCHES = 2  # of the original beside each cell: enough for a rate, a small part of the cell's own time


class Bench:
    """One model, and what is done to it.

    Args:
        checkpoint: the original.
        texts: what it is calibrated and judged on.
        state: a directory for Stats, and for checkpoints while they are measured.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Texts, state: Path) -> None:
        self.checkpoint = checkpoint
        self.texts = texts
        self._stats = state / "stats"
        self._scratch = state

    def key(self, row: Row, ratio: float, drawn: Drawn) -> Key:
        return Key(
            model=self.checkpoint.fingerprint,
            held={blocks.name: blocks.fingerprint for blocks in self.texts.judged(drawn.on)},
            on=drawn.on,
            draw=drawn.seed,
            data=drawn.fingerprint,
            method=row.method,
            options=row.options_for(drawn.seed),
            recovered=row.recovered,
            ratio=ratio,
        )

    @property
    def original_name(self) -> str:
        """Another for each model and set of held-out texts."""
        parts = [self.checkpoint.fingerprint, *(blocks.fingerprint for blocks in self.texts.judged(MIXTURE))]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]

    def original(self) -> Original:
        """Measure the model itself on all held-out texts."""
        files = self.checkpoint.files
        measured = measure(self.checkpoint, self.texts.judged(MIXTURE))
        return Original(
            parameters=files.parameters,
            bytes_on_disk=files.bytes_on_disk,
            tokens_per_second=measured.tokens_per_second,
            quality=measured.quality,
        )

    def lacks_stats(self, drawn: Drawn, methods: Iterable[str]) -> bool:
        """Whether a calibration lies between this draw and what these methods decide."""
        path = self._stats_path(drawn)
        return not path.is_file() or not set(statistics_for(methods)) <= _held(Stats.load(path))

    def stats(self, drawn: Drawn, methods: Iterable[str]) -> Stats:
        """What these methods need of a draw, collected in one pass for all of them, and kept."""
        path, needed = self._stats_path(drawn), set(statistics_for(methods))
        if path.is_file():
            known = Stats.load(path)
            if needed <= _held(known):
                return known
            needed |= _held(known)
        made = calibrate(
            InMemoryPass(self._model),
            self.checkpoint.fingerprint,
            drawn.ids_BS,
            statistics=needed,
            source=drawn.address,
            router_groups=self.checkpoint.layout.groups,
        )
        made.save(path)
        return made

    def cell(self, row: Row, ratio: float, drawn: Drawn, stats: Stats) -> tuple[Cell, Plan]:
        """Raises InputError: the method cannot decide so on this model, or what it made cannot be run."""
        plan, decide_seconds = self._decide(row, ratio, drawn, stats)
        with tempfile.TemporaryDirectory(prefix="candidate-", dir=self._scratch) as scratch:
            made_of, carry_out_seconds = self._carry_out(plan, stats, drawn, Path(scratch))
            beside = self._speed_of_original() if self._is_timed(drawn) else None
            measured = measure(made_of, self.texts.judged(drawn.on))
            parameters, bytes_on_disk = made_of.files.parameters, made_of.files.bytes_on_disk
        made = Cell(
            key=self.key(row, ratio, drawn),
            removed=plan.removed,
            decide_seconds=decide_seconds,
            carry_out_seconds=carry_out_seconds,
            parameters=parameters,
            bytes_on_disk=bytes_on_disk,
            tokens_per_second=measured.tokens_per_second,
            original_tokens_per_second=beside,
            quality=measured.quality,
        )
        return made, plan

    def _decide(self, row: Row, ratio: float, drawn: Drawn, stats: Stats) -> tuple[Plan, float]:
        # Loading the model is not deciding.
        trial = Trial(self._model, drawn.some(BLOCKS)) if find(row.method).tries else None
        started = time.perf_counter()
        options = row.options_for(drawn.seed)
        plan = make_plan(row.method, ratio, stats, options=options, trial=(lambda: trial) if trial else None)
        took = time.perf_counter() - started
        if row.recovered and plan.recovery is None:
            plan = plan.model_copy(update={"recovery": Recovery(router=False)})
        return plan, took

    def _carry_out(self, plan: Plan, stats: Stats, drawn: Drawn, scratch: Path) -> tuple[Checkpoint, float]:
        """From a Plan to the checkpoint that is measured, all that the Plan says done to it; and how long that took."""
        teacher = self._model if plan.recovery else None  # loading it is not carrying out
        started = time.perf_counter()
        made = apply(self.checkpoint, plan, scratch / "cut", stats=stats)
        if teacher:
            recover_checkpoint(self.checkpoint, teacher, made, plan, drawn.ids_BS, None, scratch / "recovered")
            made = Checkpoint(scratch / "recovered", self.checkpoint.trust_remote_code)
        return made, time.perf_counter() - started

    @staticmethod
    def _is_timed(drawn: Drawn) -> bool:
        """The other draws make checkpoints of the same shapes."""
        return drawn.on == MIXTURE and drawn.seed == 0

    def _speed_of_original(self) -> float:
        """Measured as the candidates are, on the first of the same text: what else the machine does slows both."""
        first, count = self.texts.judged(MIXTURE)[0], _TIMED_BATCHES * BATCH_BLOCKS
        some: Blocks = replace(first, ids_BS=first.ids_BS[:count])
        return measure(self.checkpoint, [some]).tokens_per_second

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self.checkpoint.load()

    def _stats_path(self, drawn: Drawn) -> Path:
        return self._stats / f"{self.checkpoint.fingerprint[:12]}-{drawn.fingerprint[:16]}.safetensors"


def _held(stats: Stats) -> set[str]:
    return {name for layer in stats.layers.values() for name in [*layer.counts, *layer.sums]}
