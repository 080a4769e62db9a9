"""The machines that a TrainJob asks a cluster for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeprune.errors import InputError
from moeprune.validation import complaint

DEFAULT_RUNTIME = "moeprune-distill"
_QUANTITY = r"^(\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$"
_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Nodes(BaseModel):
    """How many, of what kind, and what is on them.

    Raises:
        ValidationError: a value that cannot be meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=1, description="nodes, each one pod")
    volume: str = Field(
        pattern=_NAME,
        description="a PersistentVolumeClaim that many pods can write to (ReadWriteMany): the models lie there for all "
        "nodes to read, and unfinished work, which outlives them",
    )
    volume_path: str = Field(
        "/mnt/moeprune",
        pattern=r"^/.*[^/]$",
        description="where they, and whoever starts them, mount the volume",
    )
    image: str = Field("", description="that has moeprune in it; empty: that of the pod which starts them")
    gpus: int = Field(
        0, ge=0, description="of each node, with a process for each; 0: one process per node, on its CPUs"
    )
    cpus: str = Field("", pattern=_QUANTITY, description="of each node, such as 8; empty: as the runtime says")
    memory: str = Field("", pattern=_QUANTITY, description="of each node, such as 64Gi; empty: as the runtime says")
    gpu_resource: str = Field("nvidia.com/gpu", pattern=r"\S", description="what the cluster calls a GPU")
    runtime: str = Field(
        DEFAULT_RUNTIME,
        pattern=_NAME,
        description="a TrainingRuntime of the namespace, or a ClusterTrainingRuntime, with the torch policy",
    )
    node_selector: dict[str, str] = Field({}, description="labels of the nodes of a pool")
    tolerations: list[dict[str, Any]] = Field([], description="of its taints, as in the spec of a pod")
    queue: str = Field("", description="a LocalQueue of Kueue that the job waits in; empty: none")
    longest_hours: float = Field(
        72.0, gt=0, description="after which the cluster ends the job, whoever still follows it"
    )

    @classmethod
    def of(cls, **options: Any) -> Nodes:
        """Raises InputError, with the option's name, for one that makes no sense."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise _refused("the nodes", error) from error

    @classmethod
    def load(cls, path: Path) -> Nodes:
        """From a JSON file. Raises InputError where it is not there, or says something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise _refused(f"the nodes in {path}", error) from error

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def processes(self) -> int:
        """On all of them."""
        return self.count * self.processes_per_node


def _refused(what: str, error: ValidationError) -> InputError:
    where, wrong = complaint(error)
    given = error.errors()[0].get("input")
    return InputError(f"{what}: {where}: {wrong}" + (f" (given: {given!r})" if isinstance(given, str | int) else ""))
