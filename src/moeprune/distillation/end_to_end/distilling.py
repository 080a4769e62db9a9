"""From a pruned checkpoint to the one that a training makes of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from moeprune.atomic import build_beside, work_towards
from moeprune.checkpoint.identity import close_fingerprint
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.rewriting import rewrite
from moeprune.distillation.end_to_end.job import Job, Training
from moeprune.distillation.end_to_end.keeping import Keeping, put_back
from moeprune.distillation.end_to_end.lora import merge_lora, plain_name, refuse_without_peft
from moeprune.distillation.end_to_end.processes import train_in_processes
from moeprune.distillation.end_to_end.telling import Listener
from moeprune.distillation.end_to_end.training import Outcome, choose_what_learns, train
from moeprune.distillation.experts import refuse_without_counterparts
from moeprune.distillation.objective import Objective
from moeprune.distillation.parts import trainable
from moeprune.distillation.text import Text
from moeprune.plan import Plan

_VERSION = 1  # another for every change of what a training makes; what another release has begun is then begun anew


class Elsewhere(Protocol):
    """Who does a job in place of this machine."""

    @property
    def processes(self) -> int:
        """In how many processes."""

    @property
    def work(self) -> Path:
        """A directory that they reach as this process does."""

    @property
    def told(self) -> dict[str, Any]:
        """What those who read of the run want to know of them, by name."""

    def __call__(self, job: Job, listener: Listener) -> Outcome: ...


@dataclass(frozen=True)
class Assignment:
    """What is to be trained, and how.

    Attributes:
        plan: that made the student of the teacher (`checks.check_pair`).
        parts: what learns (`distillation.parts`).
    """

    teacher: Checkpoint
    student: Checkpoint
    plan: Plan
    text: Text
    objective: Objective
    parts: frozenset[str]
    training: Training

    def refuse_what_cannot_be(self, processes: int) -> None:
        """Raise InputError for what would only be found out when the models are in memory."""
        self.training.refuse_uneven_shares(len(self.text.train_BS), processes)
        if self.objective.experts:
            refuse_without_counterparts(self.plan)
        if "lora" in self.parts:
            refuse_without_peft()
        if of_model := self.parts - {"lora"}:
            names = [name for name, _ in self.student.without_weights().named_parameters()]
            trainable(of_model, self.plan, self.teacher.layout, names)

    def name(self, processes: int) -> str:
        """A digest of all that the outcome depends on but the machine."""
        told = [
            _VERSION,
            self.teacher.fingerprint,
            close_fingerprint(self.student.files),
            self.plan.to_json(),
            self.text.fingerprint,
            str(self.objective),
            sorted(self.parts),
            self.training.model_dump(),
            processes,
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def distill_whole(
    assignment: Assignment,
    out: Path,
    *,
    listener: Listener,
    elsewhere: Elsewhere | None = None,
    work: Path | None = None,
) -> Outcome:
    """Train a student as a whole and write the best of it to `out`; where nothing got better, the student as it was.

    Interrupted in whatever way, the same call goes on after the last state that it kept.

    Args:
        listener: told how far it is.
        elsewhere: who does the job; by default this process, or as many as `training` says.
        work: directory to keep states in; by default beside `out`, or where those elsewhere reach it.

    Raises:
        InputError: nothing can be trained so, or it diverged.
        ServiceError: the processes ended without a result.
    """
    processes = elsewhere.processes if elsewhere else assignment.training.processes
    assignment.refuse_what_cannot_be(processes)
    trains = elsewhere or (train if processes == 1 else train_in_processes)
    if elsewhere and work is None:
        work = elsewhere.work
    with work_towards(out, assignment.name(processes), work) as kept:
        assignment.plan.save(kept / "plan.json")
        job = Job(
            teacher=assignment.teacher.directory,
            student=assignment.student.directory,
            plan=kept / "plan.json",
            directory=kept,
            objective=str(assignment.objective),
            parts=sorted(assignment.parts),
            training=assignment.training,
            processes=processes,
            trust_remote_code=assignment.student.trust_remote_code,
        )
        job.save(assignment.text)
        outcome = trains(job, listener)
        with build_beside(out) as beside:
            write(job, assignment, outcome, beside)
    return outcome


def write(job: Job, assignment: Assignment, outcome: Outcome, out: Path) -> None:
    """The student's checkpoint with what was learnt, where anything got better, into the directory `out`."""
    student, keeping = assignment.student, Keeping(job.directory / "states")
    if not outcome.better:
        rewrite(student, student.without_weights(), {}, out)
    elif "lora" not in job.parts:
        rewrite(student, student.without_weights(), keeping.best(), out)
    else:
        model = student.load(torch.float32, torch.device("cpu"))
        choose_what_learns(model, job, assignment.plan, assignment.teacher)
        learnt = keeping.best()
        put_back(model.named_parameters(), learnt)
        own = {plain_name(name): value for name, value in learnt.items() if ".lora_" not in name}
        rewrite(student, model, own | merge_lora(model), out)
