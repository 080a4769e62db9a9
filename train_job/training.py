"""A job done by the nodes of a cluster: as `processes` does it on one machine, with a TrainJob in place of torchrun's
one machine.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.atomic import build_beside
from moeprune.distillation import end_to_end
from moeprune.distillation.end_to_end.job import Job
from moeprune.distillation.end_to_end.processes import failure_file, why_it_failed
from moeprune.distillation.end_to_end.telling import EventFile, Listener
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.errors import InputError, ServiceError
from moeprune.tracking import PIPELINE_RUN_VARIABLE
from moeprune.train_job.cluster import Cluster
from moeprune.train_job.manifest import job_name
from moeprune.train_job.nodes import Nodes
from moeprune.train_job.running import run_train_job


@dataclass(frozen=True)
class OnNodes:
    """The nodes that do a job in place of this machine (`distilling.Elsewhere`).

    Raises:
        InputError: their volume is not mounted here.
    """

    nodes: Nodes

    def __post_init__(self) -> None:
        if not self.work.is_dir():
            raise InputError(
                f"the nodes' volume {self.nodes.volume} is not here: whoever starts them must mount it, too, at "
                f"{self.work}"
            )

    @property
    def processes(self) -> int:
        return self.nodes.processes

    @property
    def work(self) -> Path:
        return Path(self.nodes.volume_path)

    @property
    def told(self) -> dict[str, Any]:
        return {f"nodes.{name}": value for name, value in self.nodes.model_dump().items()}

    def __call__(self, job: Job, listener: Listener) -> Outcome:
        return train_on_nodes(job, listener, self.nodes)


def train_on_nodes(job: Job, listener: Listener, nodes: Nodes, cluster: Cluster | None = None, **how: Any) -> Outcome:
    """Have a TrainJob run the job's processes, pass on what they say, and wait for what they come to.

    Models that do not lie on the nodes' volume are copied into the job's directory, which does.

    Args:
        job: of `nodes.processes` processes.
        cluster: to run it on; by default the one that this process is in, or that the kubeconfig is about.
        how: options of `run_train_job`.

    Raises:
        InputError: as `train`; the job's directory is not on the volume; or the TrainJob cannot be as asked for.
        ServiceError: the cluster refuses, or the TrainJob failed.
    """
    if not job.directory.is_relative_to(nodes.volume_path):
        raise InputError(
            f"the nodes cannot reach {job.directory}; keep the work on their volume {nodes.volume}, which they mount "
            f"at {nodes.volume_path} (and so must whoever starts them)"
        )
    cluster = cluster or Cluster()
    cluster.runtime_kind(nodes.runtime)  # refused before anything is copied
    job = _with_models_on_the_volume(job, nodes)
    name = job_name(os.environ.get(PIPELINE_RUN_VARIABLE, ""), nodes.model_dump(), job.model_dump(mode="json"))
    events, failure = EventFile.of(job.directory), failure_file(job.directory)

    def pass_on() -> None:
        try:
            said = list(events.new())
        except FileNotFoundError:  # nothing yet
            return
        for event in said:
            listener(event)

    if outcome := Outcome.of(job.directory):
        cluster.delete(name)  # whoever followed it to its end had no time to
        return outcome
    failure.unlink(missing_ok=True)
    try:
        run_train_job(name, nodes, command(job.directory), cluster=cluster, on_look=pass_on, **how)
    except ServiceError as error:
        if failure.is_file():
            raise InputError(failure.read_text()) from error
        raise
    if outcome := Outcome.of(job.directory):
        return outcome
    raise why_it_failed(job.directory, "")


def command(directory: Path) -> list[str]:
    """Of each node. Which of the nodes it is, and where the others are, torchrun reads from the variables PET_* that
    Kubeflow Trainer sets.
    """
    return ["torchrun", "-m", end_to_end.__name__, str(directory)]


def _with_models_on_the_volume(job: Job, nodes: Nodes) -> Job:
    there = {}
    for name in ("teacher", "student"):
        directory: Path = getattr(job, name)
        if not directory.is_relative_to(nodes.volume_path):
            copy = job.directory / "models" / name
            if not copy.exists():
                with build_beside(copy) as beside:
                    shutil.copytree(directory, beside, dirs_exist_ok=True)
            there[name] = copy
    moved = job.model_copy(update=there)
    moved.save(job.text())
    return moved
