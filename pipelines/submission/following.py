"""A run on a cluster, followed to its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1Run

from moeprune.errors import MoepruneError, in_one_line

from .server import Server

EVERY_SECONDS = 10.0
_ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


class RunError(MoepruneError):
    """A run on a cluster did not end well, or not in time."""


def follow(
    server: Server,
    run_id: str,
    on_change: Callable[[str, str], None],
    *,
    timeout_seconds: float | None = None,
) -> V2beta1Run:
    """Wait for a run to succeed.

    Args:
        on_change: called with a task's name and its state whenever that has changed.
        timeout_seconds: how long at most; the run goes on after it.

    Raises:
        RunError: it failed, was cancelled, or goes on after the time.
        ServiceError: the server has not answered for some minutes, or refuses.
    """
    ends = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    states: dict[str, str] = {}
    while True:
        run = server.read(lambda api: api.runs.run_service_get_run(run_id))
        for task in _tasks(run):
            if task.state and states.get(task.task_id) != task.state:
                states[task.task_id] = task.state
                on_change(task.display_name, task.state)
        if run.state == "SUCCEEDED":
            return run
        if run.state in _ENDED:
            raise RunError(_why(run))
        if ends is not None and time.monotonic() >= ends:
            raise RunError(
                f"the run has not ended in {timeout_seconds:g} s; it goes on, and is not waited for any more"
            )
        time.sleep(EVERY_SECONDS)


def _tasks(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    return (run.run_details and run.run_details.task_details) or []


def _why(run: V2beta1Run) -> str:
    ended = {"FAILED": "failed", "CANCELED": "was cancelled", "SKIPPED": "was skipped"}[run.state]
    reasons = [in_one_line(Exception(run.error.message))] if run.error and run.error.message else []
    for task in _tasks(run):
        # A group of tasks (a loop, the run itself) fails with the task in it, which says why.
        if task.state == "FAILED" and not task.child_tasks:
            message = task.error.message if task.error else ""
            reasons.append(f"{task.display_name}: {' '.join(message.split())[:400]}" if message else task.display_name)
    return f"the run {ended}" + (f" ({'; '.join(reasons)})" if reasons else "")
