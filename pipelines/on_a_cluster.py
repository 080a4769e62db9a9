"""What a task gets from the cluster it runs on: where MLflow and S3 are, the key to them, and which run it belongs to.

A local run ignores all of this; its steps inherit the environment of `moeprune run`.
"""

from __future__ import annotations

from typing import Any

from kfp import kubernetes

from moeprune.environment import SECRET, VARIABLES


def use_services(task: Any) -> None:
    """Give a task what it may need of the secret, and `KFP_RUN_ID`, by which steps of one run find each other."""
    kubernetes.use_secret_as_env(task, SECRET, {name: name for name in VARIABLES}, optional=True)
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
