"""The TrainJob itself: what is asked of Kubeflow Trainer, as Kubernetes takes it (trainer.kubeflow.org/v1alpha1).

It is written out here, and not by the SDK's `TrainerClient.train`, because that takes neither an owner nor how many
processes a node has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeprune.train_job.nodes import Nodes

API_VERSION = "trainer.kubeflow.org/v1alpha1"
RUN_LABEL = "pipeline/runid"  # as Kubeflow Pipelines labels its own pods
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
CONTAINER = "node"  # what Kubeflow Trainer calls both the replicated job that trains and its container
_MANAGER = "moeprune"  # of our patch to the runtime; others, such as Kueue, have their own
_VOLUME = "moeprune"


def job_name(*what: Any) -> str:
    """The same for a task that is tried again, and another for everything else.

    Short enough for the names that are made of it: of jobs, pods and a subdomain, 63 characters each at most.

    Args:
        what: all that makes a job another, as JSON takes it.
    """
    return f"moeprune-distill-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def train_job(
    name: str,
    nodes: Nodes,
    command: Sequence[str],
    *,
    runtime_kind: str,
    run: str = "",
    owner: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest.

    Args:
        name: from `job_name`.
        nodes: with an image.
        command: of each node.
        runtime_kind: TrainingRuntime or ClusterTrainingRuntime.
        run: of Kubeflow Pipelines, that asks for it; empty outside.
        owner: an owner reference; the cluster removes the job with its owner.
    """
    labels = {"app.kubernetes.io/part-of": "moeprune", "app.kubernetes.io/component": "distill"}
    if run:
        labels[RUN_LABEL] = run
    # The queue is the job's alone: a pod with its label would wait in it once more.
    queue = {QUEUE_LABEL: nodes.queue} if nodes.queue else {}
    metadata: dict[str, Any] = {"name": name, "labels": labels | queue}
    if owner:
        metadata["ownerReferences"] = [dict(owner)]
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {"apiGroup": API_VERSION.split("/")[0], "kind": runtime_kind, "name": nodes.runtime},
            "activeDeadlineSeconds": max(1, int(nodes.longest_hours * 3600)),
            "trainer": {
                "image": nodes.image,
                "command": list(command),
                # All that is read lies on the volume. The nodes are given no keys, since they need none.
                "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                "numNodes": nodes.count,
                "numProcPerNode": nodes.processes_per_node,
                "resourcesPerNode": _resources(nodes),
            },
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": _patch(labels, nodes)}],
        },
    }


def _resources(nodes: Nodes) -> dict[str, dict[str, str]]:
    limits = {}
    if nodes.memory:
        limits["memory"] = nodes.memory
    if nodes.gpus:
        limits[nodes.gpu_resource] = str(nodes.gpus)
    # No limit on CPUs: it would only slow a node down that has some to spare.
    return {"requests": limits | ({"cpu": nodes.cpus} if nodes.cpus else {}), "limits": limits}


def _patch(labels: Mapping[str, str], nodes: Nodes) -> dict[str, Any]:
    """What is added to the pods that the runtime describes."""
    pod: dict[str, Any] = {
        "volumes": [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": nodes.volume}}],
        "containers": [{"name": CONTAINER, "volumeMounts": [{"name": _VOLUME, "mountPath": nodes.volume_path}]}],
    }
    if nodes.node_selector:
        pod["nodeSelector"] = nodes.node_selector
    if nodes.tolerations:
        pod["tolerations"] = nodes.tolerations
    # Istio's sidecar, which Kubeflow's namespaces inject, comes between the nodes, and outlives the training.
    metadata = {"labels": {**labels, "sidecar.istio.io/inject": "false"}}
    template = {"metadata": metadata, "spec": pod}
    job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
