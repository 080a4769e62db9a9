"""Trainings of tiny models: a pruned student, a job for it, and several processes to do it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from masking import draws
from safetensors.torch import load_file

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.end_to_end.job import Job, Training
from moeprune.distillation.end_to_end.telling import Event
from moeprune.distillation.text import Text
from moeprune.plan import Plan, Sparsity
from moeprune.services.ports import free_ports

UNEVEN = [3, 6, 4]
TEXT = Text(tiny.token_ids(9, blocks=24), tiny.token_ids(10, blocks=6))
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_blocks": 4, "evaluations": 3, "warmup": 0.2}


@dataclass(frozen=True)
class Pair:
    """A teacher's checkpoint, its pruned student's, and the plan between them, which is at `plan_path`, too."""

    teacher: Checkpoint
    student: Checkpoint
    plan: Plan
    plan_path: Path

    def job(self, directory: Path, objective: str, parts: str, *, processes: int = 1, **settings: Any) -> Job:
        """A job that is ready to be done in a directory."""
        job = Job(
            teacher=self.teacher.directory,
            student=self.student.directory,
            plan=self.plan_path,
            directory=directory,
            objective=objective,
            parts=parts.split(","),
            training=Training.of(**{**SETTINGS, **settings}),
            processes=processes,
        )
        job.save(TEXT)
        return job


def make_pair(source: Path, directory: Path, *, sparse: bool = False) -> Pair:
    """A student of which experts are gone, as many as differ from layer to layer; or half of the experts' weights."""
    teacher = Checkpoint(source)
    names = list(teacher.layout.layers)
    counts = UNEVEN[: len(names)]
    kept = [list(range(tiny.EXPERTS))] * len(names) if sparse else draws(3, len(names), counts)
    plan = tiny.plan_for(names, kept, teacher.fingerprint)
    if sparse:
        plan = plan.model_copy(update={"sparsity": Sparsity(pattern="0.5", score="magnitude")})
    directory.mkdir()
    plan.save(directory / "plan.json")
    apply(teacher, plan, directory / "pruned")
    return Pair(teacher, Checkpoint(directory / "pruned"), plan, directory / "plan.json")


def unheard(_: Event) -> None:
    """Nobody listens."""


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, as they are stored."""
    return {
        name: value for path in checkpoint.directory.glob("*.safetensors") for name, value in load_file(path).items()
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def in_processes(count: int, work: Callable[[], object], seconds: float = 120) -> list[int]:
    """Do something in forked processes that torch takes for a group, as torchrun would start them; their exit codes.

    Forked ones have imported everything already, which takes a new process longer than any of these trainings.
    """
    (port,) = free_ports(1)
    started = []
    for rank in range(count):
        if process := os.fork():
            started.append(process)
            continue
        code = 1
        try:
            signal.alarm(int(seconds))
            shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
