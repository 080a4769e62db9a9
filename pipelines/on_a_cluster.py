"""What a task gets from the cluster it runs on: where MLflow and S3 are, the key to them, and which run it belongs to.

A local run ignores all of this; its steps inherit the environment of `moeprune run`.
"""

from __future__ import annotations

from typing import Any

from kfp import kubernetes

from moeprune.tracking import PIPELINE_RUN_VARIABLE
from moeprune.train_job import Nodes
from moeprune.train_job.pod import POD_VARIABLE

# A Kubernetes secret of this name, in the namespace of the run. Where it is not there, or lacks an entry, a variable is
# not set; MLflow is then not used, unless Kubeflow itself sets it up.
SECRET = "moeprune"
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_EXPERIMENT_NAME",
    "HF_TOKEN",
    "MOEPRUNE_WORK",
)

_USER = 1000  # of the image; any other works too
VOLUME_PATH: str = Nodes.model_fields["volume_path"].default


def use_services(task: Any) -> None:
    """Give a task the variables above, and by what the steps of one run find each other in MLflow.

    It is never root, and so may run where Kubernetes enforces the restricted standard.
    """
    kubernetes.set_security_context(task, run_as_user=_USER, run_as_non_root=True)
    kubernetes.use_secret_as_env(task, SECRET, {name: name for name in VARIABLES}, optional=True)
    kubernetes.use_field_path_as_env(task, PIPELINE_RUN_VARIABLE, "metadata.labels['pipeline/runid']")


def use_nodes(task: Any, volume: Any) -> None:
    """Let a task have a TrainJob train: it shares a volume with it, and can tell whose it is.

    What it starts goes on when its own pod is lost, and is found again when the task is tried again.
    """
    kubernetes.mount_pvc(task, pvc_name=volume, mount_path=VOLUME_PATH)
    kubernetes.use_field_path_as_env(task, POD_VARIABLE, "metadata.name")
    task.set_retry(num_retries=3, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
