"""Training on several nodes of a cluster: a TrainJob of Kubeflow Trainer 2.2 or later, created, followed and removed.

Needs `moeprune[cluster]`; everything else of moeprune works without.
"""

from __future__ import annotations

from moeprune.train_job.cluster import Cluster
from moeprune.train_job.manifest import job_name
from moeprune.train_job.nodes import DEFAULT_RUNTIME, Nodes
from moeprune.train_job.running import run_train_job

__all__ = ["DEFAULT_RUNTIME", "Cluster", "Nodes", "job_name", "run_train_job"]
