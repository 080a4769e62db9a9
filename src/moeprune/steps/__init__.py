"""The steps of the pipeline: each brings its inputs here, calls the library, tells MLflow, and puts its output in
place.

The command line and the Kubeflow components call these functions and nothing else.
"""

from moeprune.steps.calibrate import calibrate, merge_stats
from moeprune.steps.cluster import cluster
from moeprune.steps.distill import distill
from moeprune.steps.evaluate import Named, evaluate, models_in
from moeprune.steps.promote import promote
from moeprune.steps.prune import apply, plan, prune

__all__ = [
    "Named",
    "apply",
    "calibrate",
    "cluster",
    "distill",
    "evaluate",
    "merge_stats",
    "models_in",
    "plan",
    "promote",
    "prune",
]
