"""Where the tasks of a run go on a cluster, what they may use there, and what happens when one is lost.

A local run ignores all of this. Values that a run chooses are texts, the numbers too: of a pod's resources, Kubeflow
Pipelines resolves no other parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes

HOUR = 3600
USER = 1000  # of the image
# What only passes on what others made.
LIGHT_CPUS, LIGHT_MEMORY, LIGHT_HOURS = "500m", "2Gi", 1
# What only moves models.
MOVING_CPUS, MOVING_MEMORY, MOVING_HOURS = "2", "4Gi", 12


@dataclass(frozen=True)
class Pool:
    """The nodes that have what the heavy steps need: what they call a GPU, their labels, and their taints."""

    gpu_type: Any
    node_selector: Any
    tolerations: Any


def light(*tasks: Any) -> None:
    """Tasks that hold no GPU, and may run on any node."""
    for task in tasks:
        _place(task, LIGHT_CPUS, LIGHT_MEMORY, LIGHT_HOURS)


def moving(task: Any) -> None:
    """A task that waits for disks and the network."""
    _place(task, MOVING_CPUS, MOVING_MEMORY, MOVING_HOURS)


def heavy(task: Any, cpus: Any, memory: Any, *, hours: int, gpus: Any = None, pool: Pool | None = None) -> None:
    """A task whose size the run chooses; with a pool, it runs there, and holds as many of its GPUs as `gpus` says."""
    _place(task, cpus, memory, hours)
    channels = [cpus, memory]
    if pool:
        task.set_accelerator_type(pool.gpu_type).set_accelerator_limit(gpus)
        kubernetes.add_node_selector_json(task, pool.node_selector)
        kubernetes.add_toleration_json(task, pool.tolerations)
        channels += [gpus, pool.gpu_type]
    # The compiler passes into a loop only what it was told of in this way.
    task.register_pipeline_channels(channels)


def retry(*tasks: Any) -> None:
    """Try tasks again whose node or network may fail; they go on where they were, or start clean.

    Not for tasks that only look at the run's parameters: they will say the same again.
    """
    for task in tasks:
        task.set_retry(num_retries=2, backoff_duration="60s", backoff_factor=2, backoff_max_duration="600s")


def _place(task: Any, cpus: Any, memory: Any, hours: int) -> None:
    # No limit on CPUs: a process that is throttled waits for its own threads. Memory has one, for the neighbours' sake.
    task.set_cpu_request(cpus).set_memory_request(memory).set_memory_limit(memory)
    kubernetes.set_timeout(task, hours * HOUR)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_non_root=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "moeprune")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", task.name)
