"""The TrainJob itself: what is asked of Kubeflow Trainer, as Kubernetes takes it (trainer.kubeflow.org/v1alpha1).

It is written out here, and not by the SDK's `TrainerClient.train`, because that takes neither variables from a secret
nor an owner, nor the number of processes on a node.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from moeprune.environment import VARIABLES
from moeprune.train_job.nodes import Nodes

API_VERSION = "trainer.kubeflow.org/v1alpha1"
RUN_LABEL = "pipeline/runid"  # as Kubeflow Pipelines labels its own pods
CONTAINER = "node"  # what Kubeflow Trainer calls both the replicated job that trains and its container
_MANAGER = "moeprune"  # of our patch to the runtime; others, such as Kueue, have their own
_VOLUME = "moeprune"
# Identifiers that a task has from whoever started it, by which the job's steps find their run in MLflow.
_PASSED_ON = ("KFP_RUN_ID", "MOEPRUNE_PARENT_RUN_ID", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")


def job_name(run: str, nodes: Nodes, arguments: Sequence[str]) -> str:
    """The same for a task that is tried again, and another for everything else.

    Short enough for the names that are made of it: of jobs, pods and a subdomain, 63 characters each at most.
    """
    what = json.dumps([run, asdict(nodes), list(arguments)], sort_keys=True)
    return f"moeprune-distill-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def train_job(
    name: str,
    nodes: Nodes,
    command: Sequence[str],
    arguments: Sequence[str],
    *,
    runtime_kind: str,
    run: str = "",
    owner: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """The manifest.

    Args:
        name: from `job_name`.
        nodes: with an image.
        command, arguments: of each node.
        runtime_kind: TrainingRuntime or ClusterTrainingRuntime.
        run: of Kubeflow Pipelines, that asks for it; empty outside.
        owner: an owner reference; the cluster removes the job with its owner.
        environment: of this process, some of which is passed on.
    """
    labels = {"app.kubernetes.io/part-of": "moeprune", "app.kubernetes.io/component": "distill"}
    if run:
        labels[RUN_LABEL] = run
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if nodes.queue:
        labels["kueue.x-k8s.io/queue-name"] = nodes.queue
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
                "args": list(arguments),
                "env": _variables(nodes.secret, environment),
                "numNodes": nodes.count,
                "numProcPerNode": nodes.processes_per_node,
                "resourcesPerNode": _resources(nodes),
            },
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": _patch(labels, nodes)}],
        },
    }


def _variables(secret: str, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    passed_on = {name: environment[name] for name in _PASSED_ON if environment.get(name)}
    if "MLFLOW_RUN_ID" in passed_on:
        # A run is of one server. Where Kubeflow made it, the secret need not know which.
        server = environment.get("MLFLOW_TRACKING_URI", "")
        if server and not urlsplit(server).username:
            passed_on["MLFLOW_TRACKING_URI"] = server
    literal = [{"name": name, "value": value} for name, value in passed_on.items()]
    return literal + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}
        for name in VARIABLES
        if name not in passed_on
    ]


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
    pod: dict[str, Any] = {}
    if nodes.node_selector:
        pod["nodeSelector"] = nodes.node_selector
    if nodes.tolerations:
        pod["tolerations"] = nodes.tolerations
    if nodes.volume:
        pod["volumes"] = [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": nodes.volume}}]
        pod["containers"] = [{"name": CONTAINER, "volumeMounts": [{"name": _VOLUME, "mountPath": nodes.volume_path}]}]
    # Istio's sidecar, which Kubeflow's namespaces inject, comes between the nodes, and outlives the training.
    metadata = {"labels": {**labels, "sidecar.istio.io/inject": "false"}}
    template = {"metadata": metadata, "spec": pod} if pod else {"metadata": metadata}
    job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
