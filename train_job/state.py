"""How a TrainJob stands, in words, from what Kubernetes says of it and of its pods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.train_job.manifest import QUEUE_LABEL

COMPLETE, FAILED, SUSPENDED = "Complete", "Failed", "Suspended"
# Nothing that waiting mends, unless somebody mends the cluster.
_HOPELESS = frozenset(
    {"InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff", "CreateContainerConfigError", "CreateContainerError"}
)


@dataclass(frozen=True)
class State:
    """Attributes:
    text: for people; it changes when something happened.
    complete, failed: whether it is over, and how.
    reason: of a failure.
    obstacle: why a pod cannot start that needs somebody's hand; empty if there is none.
    """

    text: str
    complete: bool = False
    failed: bool = False
    reason: str = ""
    obstacle: str = ""

    @property
    def over(self) -> bool:
        return self.complete or self.failed


def state_of(job: Mapping[str, Any], pods: Sequence[Any]) -> State:
    """Args:
    job: a TrainJob as the API gives it.
    pods: its nodes (kubernetes.client.V1Pod), in order.
    """
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions", [])
        if condition["status"] == "True"
    }
    if COMPLETE in conditions:
        return State("complete", complete=True)
    if failed := conditions.get(FAILED):
        reason = "; ".join([_sentence(failed), *filter(None, map(_ending, pods))])
        return State(f"failed: {reason}", failed=True, reason=reason)
    if SUSPENDED in conditions:
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
        return State(f"waits in the queue {queue}" if queue else "is suspended")
    wanted = job["spec"]["trainer"]["numNodes"]
    running = sum(pod.status.phase in ("Running", "Succeeded") for pod in pods)
    text = f"{running} of {wanted} nodes run"
    if waiting := next(filter(None, map(_waiting_for, pods)), None):
        return State(f"{text}; {waiting[0]}", obstacle=waiting[0] if waiting[1] else "")
    return State(text)


def _sentence(condition: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, [condition.get("reason"), condition.get("message")]))


def _waiting_for(pod: Any) -> tuple[str, bool] | None:
    """Why a pod does not start yet, and whether somebody must see to it."""
    if pod.status.phase != "Pending":
        return None
    for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        waiting = status.state.waiting if status.state else None
        if waiting and waiting.reason:
            return f"{pod.metadata.name}: {waiting.reason} {waiting.message or ''}".strip(), waiting.reason in _HOPELESS
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{pod.metadata.name} has no machine yet: {condition.message or condition.reason}", False
    return None


def _ending(pod: Any) -> str:
    """How a pod that failed did."""
    for status in pod.status.container_statuses or []:
        ended = status.state.terminated if status.state else None
        if ended and ended.exit_code:
            return f"{pod.metadata.name} ended with code {ended.exit_code} ({ended.reason})"
    return f"{pod.metadata.name}: {pod.status.reason}" if pod.status.phase == "Failed" and pod.status.reason else ""
