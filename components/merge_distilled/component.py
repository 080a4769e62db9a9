from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge_distilled(
    parts: dsl.Input[list[dsl.Model]],
    student: dsl.Input[dsl.Model],
    distilled: dsl.Output[dsl.Model],
    trust_remote_code: bool = False,
) -> str:
    """Make one model of what the layers have learnt in several tasks.

    Args:
        parts: What each task's layers have learnt, from distill.
        student: The pruned model, from global_prune.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        distilled: The recovered model, a Hugging Face checkpoint: what one task would have made of all layers.
        Output: Where that is.
    """
    from moeprune.steps import merge_distilled as step

    result = step.merge_distilled(
        [part.path for part in parts], student.path, distilled.path, trust_remote_code=trust_remote_code
    )
    distilled.metadata.update(student.metadata, optimizer_steps=result.steps)
    return distilled.uri
