from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    teacher: str,
    student: dsl.Input[dsl.Model],
    plan: dsl.Input[dsl.Artifact],
    data: str,
    distilled: dsl.Output[dsl.Model],
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    batch_blocks: int = 8,
    learning_rate: float = 1e-3,
    epochs: int = 1,
    trust_remote_code: bool = False,
) -> None:
    """Teach the pruned model's MoE blocks to answer as the original's do.

    Args:
        teacher: The original model.
        student: The pruned model, from global_prune.
        plan: What was pruned, from global_prune.
        data: Text of the domain, as for calibrate.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block.
        max_blocks: Blocks to read at most.
        batch_blocks: Blocks per step of the optimizer.
        learning_rate: Its peak.
        epochs: Times that each block is seen.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        distilled: The recovered model, a Hugging Face checkpoint.
    """
    from moeprune.steps import distill as step

    result = step.distill(
        teacher,
        student.path,
        plan.path,
        data,
        distilled.path,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        learning_rate=learning_rate,
        epochs=epochs,
        trust_remote_code=trust_remote_code,
    )
    distilled.metadata.update(student.metadata, optimizer_steps=len(result.curve))
