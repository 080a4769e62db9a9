"""The machines that a TrainJob asks a cluster for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from moeprune.errors import InputError

DEFAULT_RUNTIME = "moeprune-distill"
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


@dataclass(frozen=True)
class Nodes:
    """How many, of what kind, and what is on them.

    Attributes:
        count: nodes, each one pod.
        volume: a PersistentVolumeClaim that many pods can write to (ReadWriteMany): the models lie there for all
            nodes to read, and unfinished work, which outlives them.
        image: container image, one with moeprune in it; empty: that of the pod that asks.
        gpus: of each node, one process for each; 0: one process per node, on its CPUs.
        cpus, memory: of each node, as Kubernetes writes quantities (8, 1500m, 64Gi); empty: what the runtime says.
        gpu_resource: what the cluster calls a GPU.
        runtime: a TrainingRuntime of the namespace, or a ClusterTrainingRuntime, with the torch policy.
        volume_path: where they, and whoever follows them, mount the volume.
        node_selector: labels of the nodes of a pool.
        tolerations: of its taints, as in the spec of a pod.
        queue: a LocalQueue of Kueue that the job waits in; empty: none.
        longest_hours: after which the cluster ends the job, whoever still follows it.

    Raises:
        InputError: a value that cannot be meant.
    """

    count: int
    volume: str
    image: str = ""
    gpus: int = 0
    cpus: str = ""
    memory: str = ""
    gpu_resource: str = "nvidia.com/gpu"
    runtime: str = DEFAULT_RUNTIME
    volume_path: str = "/mnt/moeprune"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    queue: str = ""
    longest_hours: float = 72.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"a TrainJob needs at least 1 node, not {self.count}")
        if self.gpus < 0:
            raise InputError(f"a node has 0 GPUs or more, not {self.gpus}")
        for what, quantity in (("CPUs", self.cpus), ("memory", self.memory)):
            if quantity and not _QUANTITY.fullmatch(quantity):
                raise InputError(f"{quantity!r} is no amount of {what} that Kubernetes knows; write 8, 1500m or 64Gi")
        for what, name in (
            ("training runtime", self.runtime),
            ("volume", self.volume),
            *([("queue", self.queue)] if self.queue else []),
        ):
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"{name!r} cannot be the name of a {what}; that has lower-case letters, digits, - and . in it"
                )
        if not self.volume_path.startswith("/") or self.volume_path == "/":
            raise InputError(f"a volume is mounted at a path such as /mnt/moeprune, not {self.volume_path!r}")
        if not self.longest_hours > 0:
            raise InputError(f"a TrainJob may take more than 0 hours, not {self.longest_hours:g}")

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)
