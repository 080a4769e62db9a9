"""A job done by the nodes of a cluster: as `processes` does it on one machine, with a TrainJob in place of torchrun's
one machine.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeprune.distillation.end_to_end.job import Job
from moeprune.distillation.end_to_end.processes import failure_file, why_it_failed
from moeprune.distillation.end_to_end.telling import EventFile, Listener
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.errors import InputError, ServiceError
from moeprune.train_job import Cluster, Nodes, job_name, run_train_job

_RUN_VARIABLE = "KFP_RUN_ID"


def train_on_nodes(job: Job, listener: Listener, nodes: Nodes, cluster: Cluster | None = None, **how: Any) -> Outcome:
    """Have a TrainJob run the job's processes, pass on what they say, and wait for what they come to.

    Args:
        job: with as many processes as the nodes have, all its paths on their volume.
        cluster: to run it on; by default the one that this process is in, or that the kubeconfig is about.
        how: options of `run_train_job`.

    Raises:
        InputError: as `train`; a path that the nodes cannot see; or the TrainJob cannot be as asked for.
        ServiceError: the cluster refuses, or the TrainJob failed.
    """
    for path in (job.teacher, job.student, job.plan, job.directory):
        if not path.is_relative_to(nodes.volume_path):
            raise InputError(f"the nodes cannot read {path}; it must lie on their volume, below {nodes.volume_path}")
    name = job_name(os.environ.get(_RUN_VARIABLE, ""), asdict(nodes), job.model_dump(mode="json"))
    events = EventFile.of(job.directory)

    def pass_on() -> None:
        try:
            said = list(events.new())
        except FileNotFoundError:  # nothing yet
            return
        for event in said:
            listener(event)

    failure = failure_file(job.directory)
    failure.unlink(missing_ok=True)
    try:
        run_train_job(name, nodes, command(job.directory), cluster=cluster or Cluster(), on_look=pass_on, **how)
    except ServiceError as error:
        if failure.is_file():
            raise InputError(failure.read_text()) from error
        raise
    pass_on()
    if outcome := Outcome.of(job.directory):
        return outcome
    raise why_it_failed(job.directory, "")


def command(directory: Path) -> list[str]:
    """Of each node. Which of the nodes it is, and where the others are, torchrun reads from the variables PET_* that
    Kubeflow Trainer sets.
    """
    return ["torchrun", "-m", f"{__package__}", str(directory)]
