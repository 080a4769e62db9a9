from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def close_run(status: dsl.PipelineTaskFinalStatus) -> None:
    """End the run's record in MLflow with the state that the pipeline ended in, whatever that is.

    Args:
        status: How the pipeline ended, from Kubeflow.
    """
    from moeprune.steps import close_run as step

    # Kubeflow's words, in the spellings of its releases, and MLflow's; whatever else Kubeflow says is a failure.
    words = {"SUCCEEDED": "FINISHED", "COMPLETE": "FINISHED", "CANCELLED": "KILLED", "CANCELED": "KILLED"}
    step.close_run(words.get(status.state.upper(), "FAILED"), status.error_message or "")
