from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def calibrate(
    model: str,
    data: str,
    stats: dsl.Output[dsl.Artifact],
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 128,
    batch_blocks: int = 8,
    trust_remote_code: bool = False,
) -> None:
    """Run text through the model once and take down what its experts do.

    Args:
        model: The original model: a directory, an s3:// address, a Hugging Face hub id, or builtin://reference.
        data: Text of the domain to prune for: JSONL, plain text or Parquet (a path or an s3:// address), a hub data
            set id, or builtin://code, builtin://prose, builtin://arithmetic. Several, separated by commas, are mixed in
            equal shares.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block; texts are joined and cut into blocks.
        max_blocks: Blocks to read at most.
        batch_blocks: Blocks per forward pass.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        stats: Sums and counts per layer and expert (safetensors). Stats of several data sets can be added up.
    """
    from moeprune.steps import calibrate as step

    collected = step.calibrate(
        model,
        data,
        stats.path,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        trust_remote_code=trust_remote_code,
    )
    stats.metadata.update(model=model, data=data, tokens=collected.tokens, layers=len(collected.layers))
