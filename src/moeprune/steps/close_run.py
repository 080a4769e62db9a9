"""close_run: how a pipeline ended -> the state of its run in MLflow."""

from __future__ import annotations

from moeprune import tracking


def close_run(status: str, error: str = "") -> None:
    """End the parent run that the steps of this pipeline's run share.

    Args:
        status: how it ended, in MLflow's words: FINISHED, FAILED or KILLED.
        error: what went wrong, where that is known.

    Raises:
        ServiceError: MLflow is configured and does not answer, or refuses.
    """
    tracking.end_run_of_pipeline(status, error)
