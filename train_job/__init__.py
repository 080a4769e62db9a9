"""Training on several nodes of a cluster: a TrainJob of Kubeflow Trainer 2.2 or later, created, followed and removed.

`nodes` is what is asked of the cluster, `manifest` the TrainJob that says so, `running` its way from creation to
removal, `training` a distillation that goes it.

Needs `moeprune[cluster]`; everything else of moeprune works without.
"""

from __future__ import annotations

from moeprune.train_job.cluster import Cluster
from moeprune.train_job.manifest import job_name
from moeprune.train_job.nodes import DEFAULT_RUNTIME, Nodes
from moeprune.train_job.running import run_train_job
from moeprune.train_job.training import OnNodes

__all__ = ["DEFAULT_RUNTIME", "Cluster", "Nodes", "OnNodes", "job_name", "run_train_job"]
