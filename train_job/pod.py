"""The pod that this process runs in, if it does: whom it belongs to, and whether the cluster takes it away."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from moeprune.train_job.cluster import Cluster, NotThereError

POD_VARIABLE = "MOEPRUNE_POD_NAME"
_MAIN_CONTAINER = "main"  # as Kubeflow Pipelines names it, among its own


@dataclass(frozen=True)
class OwnPod:
    """Attributes:
    name: of the pod; empty where this is none.
    image: that it runs.
    owner: the object that it goes with: the workflow of a pipeline's run.
    """

    name: str = ""
    image: str = ""
    owner: dict[str, Any] | None = None

    @classmethod
    def of_this_process(cls, cluster: Cluster) -> OwnPod:
        """Raises ServiceError where the cluster does not let us look."""
        name = os.environ.get(POD_VARIABLE, "")
        if not name:
            return cls()
        pod = cluster.pod(name)
        images = {container.name: container.image for container in pod.spec.containers}
        controllers = [owner for owner in pod.metadata.owner_references or [] if owner.controller]
        owner = None
        if controllers:
            # The pod itself would be the wrong owner: a second try, in another pod, must find the job that the first
            # one started.
            owner = {
                "apiVersion": controllers[0].api_version,
                "kind": controllers[0].kind,
                "name": controllers[0].name,
                "uid": controllers[0].uid,
            }
        return cls(name, images.get(_MAIN_CONTAINER) or next(iter(images.values())), owner)

    def is_taken_away(self, cluster: Cluster) -> bool:
        """Whether it is the cluster that ends this pod (to drain its machine, or for a pod of more importance), so that
        another will take its place; a user who cancels a run leaves no such mark.
        """
        if not self.name:
            return False
        try:
            conditions = cluster.pod(self.name).status.conditions or []
        except NotThereError:
            return False
        return any(condition.type == "DisruptionTarget" and condition.status == "True" for condition in conditions)
