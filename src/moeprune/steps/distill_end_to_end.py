"""distill, end to end: teacher and pruned student -> student trained as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moeprune import places, tracking
from moeprune.atomic import refuse_to_overwrite
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.end_to_end.distilling import Assignment, Elsewhere, distill_whole
from moeprune.distillation.end_to_end.job import Training
from moeprune.distillation.end_to_end.telling import Event, Listener
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.distillation.objective import Objective
from moeprune.distillation.parts import default_parts, parse_parts
from moeprune.errors import InputError
from moeprune.progress import Advance, note, progress
from moeprune.steps import machine
from moeprune.steps.distillation_inputs import read_fitting
from moeprune.tracking import TrackedRun

OBJECTIVE = "logits=1"
_LABELS = {"teacher": "teacher", "train": "distill"}


def distill_end_to_end(
    teacher: str,
    student: str,
    plan: str,
    data: str,
    out: str,
    *,
    objective: str = OBJECTIVE,
    train: str = "",
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    work: str | None = None,
    elsewhere: Elsewhere | None = None,
    trust_remote_code: bool = False,
    **training: Any,
) -> Outcome:
    """Train the pruned model as a whole and put the best of it at `out`. See `distillation.end_to_end`.

    Interrupted in whatever way, the same call goes on after the last state that was kept.

    Args:
        objective: what the student is asked for (`Objective.parse`).
        train: what learns (`parts.parse_parts`); by default what the plan left of experts and routers.
        work: directory in which states are kept on the way; by default beside `out`, or where those elsewhere reach it.
        elsewhere: who trains in place of this machine.
        training: options of `Training`.

    Raises:
        InputError: plan, teacher, student and tokenizers do not fit together, nothing can be learnt as asked for, or
            training diverged before anything got better.
        ServiceError: those elsewhere cannot be had, or the processes ended without a result.
    """
    machine.quieten()
    if work and places.is_remote(work):
        raise InputError(f"states of a whole model are kept in a directory, not at {work}; name one with `--work`")
    how, asks = Training.of(**training), Objective.parse(objective)
    chosen = parse_parts(train) if train else None
    if elsewhere and how.processes > 1:
        raise InputError("`processes` is for one machine; those elsewhere say themselves how many they are")
    params = {
        "how": "end-to-end",
        "teacher": places.origin(teacher),
        "data": data,
        "block_tokens": block_tokens,
        "max_blocks": max_blocks,
        "objective": str(asks),
        "train": train or "default",
        **how.model_dump(),
        **(elsewhere.told if elsewhere else {}),
    }
    with (
        tracking.step("distill", params | machine.describe()) as run,
        places.output(out) as path,
        places.local_file(plan) as plan_path,
        places.local_model(teacher) as teacher_directory,
        places.local_model(student) as student_directory,
    ):
        refuse_to_overwrite(path)
        original = Checkpoint(teacher_directory, trust_remote_code)
        pruned = Checkpoint(student_directory, trust_remote_code)
        decided, text = read_fitting(
            run,
            original,
            pruned,
            plan_path,
            data,
            block_tokens=block_tokens,
            max_blocks=max_blocks,
            text_field=text_field,
        )
        parts = chosen or default_parts(decided)
        started = time.monotonic()
        with _listening(run) as listener:
            outcome = distill_whole(
                Assignment(original, pruned, decided, text, asks, parts, how),
                path,
                listener=listener,
                elsewhere=elsewhere,
                work=Path(work) if work else None,
            )
        seconds = time.monotonic() - started
        run.metrics({"seconds": seconds, "held_out_loss_before": outcome.before, "held_out_loss_after": outcome.after})
        _warn(outcome, path)
        return outcome


@contextmanager
def _listening(run: TrackedRun) -> Iterator[Listener]:
    """Who shows the user, and tells the run, what a training says of itself."""
    with ExitStack() as stack:
        bars: dict[str, Advance] = {}

        def listen(event: Event) -> None:
            if event.total:
                if event.doing not in bars:
                    stack.close()
                    bars[event.doing] = stack.enter_context(progress(_LABELS[event.doing]))
                bars[event.doing](event.done, event.total)
            if event.metrics:
                run.metrics(event.metrics, event.step)
            if event.note:
                note(event.note)

        yield listen


def _warn(outcome: Outcome, path: Path) -> None:
    if outcome.reason:
        note(f"training ended early: {outcome.reason}")
    if not outcome.better:
        lowest = min(loss for step, loss in outcome.held_out.items() if step)
        note(
            f"the loss on text held out got no better ({outcome.before:.4f} before, {lowest:.4f} at best after it); "
            f"{path} is the pruned model, unchanged. A lower learning rate, more text or other parts may help"
        )
