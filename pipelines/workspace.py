"""A volume that all tasks of a run share: the original is brought from where it lies once, and not by every task.

Kubeflow makes the volume when a run begins and removes it with the run. Its size, and how many nodes may write to it,
are fixed when the pipeline is compiled; so that is when it is chosen. Without one, each task is given what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from kfp import dsl

from moeprune.components.bring import bring
from moeprune.errors import InputError

from . import placement
from .on_a_cluster import use_services

ACCESS_MODES = ("ReadWriteMany", "ReadWriteOnce")


@dataclass(frozen=True)
class Workspace:
    """What is asked of the volume.

    Attributes:
        size: such as 200Gi; it holds the original.
        storage_class: of the cluster; empty for its default.
        access_mode: one of ACCESS_MODES. With ReadWriteOnce all pods of a run have to be on one node.

    Raises:
        InputError: the size is none that Kubernetes knows, or there is no such mode.
    """

    size: str
    storage_class: str = ""
    access_mode: str = ACCESS_MODES[0]

    def __post_init__(self) -> None:
        if self.access_mode not in ACCESS_MODES:
            raise InputError(f"a workspace's access mode is {' or '.join(ACCESS_MODES)}, not {self.access_mode!r}")
        try:
            self.config()
            if not float(self.size.rstrip("KMGTPEi")):
                raise ValueError("nothing fits")
        except ValueError as error:
            raise InputError(f"a workspace is of a size such as 200Gi, not {self.size!r}") from error

    @classmethod
    def of(cls, size: str, storage_class: str, access_mode: str) -> Self | None:
        """As a user gives it; None where nothing is asked for. Raises InputError, too, where only the size lacks."""
        if not size and (storage_class or access_mode):
            raise InputError("a workspace has a size, too: `--workspace 200Gi`")
        return cls(size, storage_class, access_mode or ACCESS_MODES[0]) if size else None

    def config(self) -> dsl.WorkspaceConfig:
        """As Kubeflow is told of it."""
        patch: dict[str, Any] = {"accessModes": [self.access_mode]}
        if self.storage_class:
            patch["storageClassName"] = self.storage_class
        return dsl.WorkspaceConfig(self.size, dsl.KubernetesWorkspaceConfig(patch))


def bring_model(address: Any) -> Any:
    """Bring the model of an address to the workspace; returns where tasks then read it.

    Not in the pipeline that reads it, but in one around that: `kfp.local` lets no task's value into a loop.
    """
    brought = bring(model=address, workspace=dsl.WORKSPACE_PATH_PLACEHOLDER)
    brought.set_caching_options(enable_caching=False)  # the volume is this run's own
    use_services(brought)
    placement.moving(brought)
    placement.retry(brought)
    return brought.output
