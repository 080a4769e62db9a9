from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def bring(model: str, workspace: str) -> str:
    """Bring the model to where all tasks of the run can read it.

    Args:
        model: The model: a directory, an s3:// address, a Hugging Face hub id, or builtin://reference.
        workspace: A directory that all tasks share.

    Returns:
        Output: Where tasks read it from: a directory of the workspace; of a model that needs no bringing, its address.
    """
    from moeprune.steps.bring import bring as step

    return step(model, workspace)
