"""close_run: how a pipeline ended -> the state of its run in MLflow."""

from __future__ import annotations

from moeprune import tracking

# Kubeflow's words for it, in the spellings of its releases; whatever else it says is a failure.
_STATUS = {"SUCCEEDED": "FINISHED", "COMPLETE": "FINISHED", "CANCELLED": "KILLED", "CANCELED": "KILLED"}


def close_run(state: str, error: str = "") -> str:
    """End the parent run that the steps of this Kubeflow run share.

    Args:
        state: that Kubeflow says the pipeline ended in.
        error: what it says went wrong.

    Returns:
        The status that the run in MLflow has from now on.

    Raises:
        ServiceError: MLflow is configured and does not answer, or refuses.
    """
    status = _STATUS.get(state.upper(), "FAILED")
    tracking.end_run_of_kubeflow(status, error)
    return status
