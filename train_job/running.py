"""A TrainJob from its creation to its removal: started once, however often the task that wants it is tried, followed to
its end, and not left behind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from moeprune.errors import InputError, ServiceError
from moeprune.progress import note
from moeprune.services.signals import deferred, raised
from moeprune.tracking import PIPELINE_RUN_VARIABLE
from moeprune.train_job.cluster import Cluster, ExistsError, NoAnswerError, NotThereError
from moeprune.train_job.log import NodeLog
from moeprune.train_job.manifest import train_job
from moeprune.train_job.nodes import Nodes
from moeprune.train_job.pod import OwnPod
from moeprune.train_job.state import State, state_of

_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_FOR_OBSTACLES = 900.0  # to be removed by somebody's hand: an image pushed, a secret made
_SECONDS_TO_CLEAN_UP = 20.0  # of the 30 that a pod has after SIGTERM
_LINES_OF_A_FAILED_NODE = 20


def run_train_job(
    name: str,
    nodes: Nodes,
    command: Sequence[str],
    *,
    cluster: Cluster,
    on_look: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    seconds_between_looks: float = _SECONDS_BETWEEN_LOOKS,
    seconds_for_obstacles: float = _SECONDS_FOR_OBSTACLES,
) -> None:
    """Run a command on several nodes, to its end.

    A job of that name that is there already is followed instead, so that a task that is tried again goes on where it
    was; one that failed is removed first. The job is removed when it is over, and when this process is told to stop
    (SIGTERM, SIGINT), unless it is because the cluster takes its pod away: then the next try is to find the job. What a
    process that is killed leaves behind goes with its owner, the workflow of the run, and ends after
    `nodes.longest_hours` in any case.

    Args:
        name: of the TrainJob, from `job_name`.
        nodes: an empty image is that of this process's pod.
        command: of each node, in which torchrun finds the others by the variables that the runtime sets.
        on_look: called each time that the job was looked at.
        say: gets the job's state when it changes, and the lines of the first node as they come.

    Raises:
        InputError: the runtime does not exist or is not for PyTorch; there is no image.
        ServiceError: the cluster refuses, no longer answers, or the job failed: with its reason.
    """
    own_pod = OwnPod.of_this_process(cluster)
    if not nodes.image:
        if not own_pod.image:
            raise InputError("which image is the job to run? name one that has moeprune in it")
        nodes = nodes.model_copy(update={"image": own_pod.image})
    run = os.environ.get(PIPELINE_RUN_VARIABLE, "")
    kind = cluster.runtime_kind(nodes.runtime)
    job = train_job(name, nodes, command, runtime_kind=kind, run=run, owner=own_pod.owner)
    started = False
    with raised():
        try:
            _start(cluster, name, job, say)
            started = True
            _follow(cluster, name, say, on_look, seconds_between_looks, seconds_for_obstacles)
        except NoAnswerError as error:
            raise NoAnswerError(
                f"{error}; the TrainJob {name} goes on, and is found again when this is tried again"
            ) from error
        except (KeyboardInterrupt, SystemExit):
            with deferred():
                _leave(cluster, name, own_pod, say)
            raise
        except BaseException:
            if started:
                _remove(cluster, name)
            raise
        _remove(cluster, name)


def _start(cluster: Cluster, name: str, job: dict, say: Callable[[str], None]) -> None:
    for _ in range(2):
        try:
            cluster.create(job)
            say(f"the TrainJob {cluster.namespace}/{name} is created")
            return
        except ExistsError:
            try:
                there = cluster.job(name)
            except NotThereError:
                continue
            gone = "deletionTimestamp" in there["metadata"]
            if not gone and not state_of(there, []).failed:
                say(f"the TrainJob {cluster.namespace}/{name} is there already, and is followed")
                return
            say(f"the TrainJob {cluster.namespace}/{name} {'is being deleted' if gone else 'has failed before'}")
            cluster.delete(name, and_wait=True)
    cluster.create(job)


def _follow(
    cluster: Cluster,
    name: str,
    say: Callable[[str], None],
    on_look: Callable[[], None],
    between_looks: float,
    for_obstacles: float,
) -> None:
    log = NodeLog(cluster)
    before, since = State(""), time.monotonic()
    while True:
        try:
            job = cluster.job(name)
        except NotThereError as error:
            raise ServiceError(f"somebody deleted the TrainJob {name} while it ran") from error
        pods = cluster.nodes_of(name)
        state = state_of(job, pods)
        if state.obstacle != before.obstacle:
            since = time.monotonic()
        lines = log.new_lines(pods[0].metadata.name) if pods else []
        news = [f"{name}: {state.text}"] if state.text != before.text else []
        for line in [*lines, *news] if state.over else [*news, *lines]:
            say(line)
        on_look()
        before = state
        if state.complete:
            return
        if state.failed:
            for pod in pods[1:]:
                if pod.status.phase == "Failed":
                    _quote(cluster, pod.metadata.name, say)
            raise ServiceError(f"the TrainJob {name} failed: {state.reason}")
        if state.obstacle and time.monotonic() - since >= for_obstacles:
            raise ServiceError(f"the TrainJob {name} cannot start: {state.obstacle}")
        time.sleep(between_looks)


def _quote(cluster: Cluster, pod: str, say: Callable[[str], None]) -> None:
    """The end of what another node than the first said, where that may be why it failed."""
    with suppress(ServiceError):
        for entry in cluster.log(pod, tail_lines=_LINES_OF_A_FAILED_NODE).splitlines():
            say(f"{pod}: {entry.partition(' ')[2]}")


def _leave(cluster: Cluster, name: str, own_pod: OwnPod, say: Callable[[str], None]) -> None:
    """Told to stop: the job ends with the run that is cancelled, and waits for the next try of one that is not."""
    cluster.patience_seconds = _SECONDS_TO_CLEAN_UP
    taken_away = False
    with suppress(ServiceError):
        taken_away = own_pod.is_taken_away(cluster)
    if taken_away:
        say(f"the cluster takes this pod away; the TrainJob {name} goes on, and the next try follows it")
    else:
        _remove(cluster, name)


def _remove(cluster: Cluster, name: str) -> None:
    try:
        cluster.delete(name)
    except ServiceError as error:  # what came before matters more
        command = f"kubectl --namespace {cluster.namespace} delete trainjob {name}"
        note(f"the TrainJob {name} is left behind ({error}); remove it: {command}")
