from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def calibrate(
    model: str,
    data: str,
    statistics: list[str],
    stats: dsl.Output[dsl.Artifact],
    text_field: str = "text",
    sequences: str = "packed",
    block_tokens: int = 256,
    max_blocks: int = 128,
    batch_blocks: int = 0,
    shard: int = 0,
    shards: int = 1,
    dtype: str = "auto",
    stay_below: str = "",
    trust_remote_code: bool = False,
) -> None:
    """Run text through the model once and take down what its experts do.

    Args:
        model: The original model: a directory, an s3:// address, a Hugging Face hub id, or builtin://reference.
        data: Text of the domain to prune for: JSONL, plain text or Parquet (a path or an s3:// address), a hub data
            set id, or builtin://code, builtin://prose, builtin://arithmetic. Several, separated by commas, are mixed,
            in equal shares or by weights (code.jsonl*3,prose.txt); %2C, %2A and %25 stand for a comma, star and percent
            sign in a name.
        statistics: What to collect, as a JSON list, from prepare.
        text_field: Field of JSONL or Parquet that holds the text.
        sequences: Either packed (documents are joined and cut into full blocks) or documents (one document per block,
            padded, a long one in several).
        block_tokens: Tokens per block.
        max_blocks: Blocks to read at most.
        batch_blocks: Blocks per forward pass, halved where memory runs out; 0 for as many as make 8192 tokens.
        shard: Which shard of the data to take, from 0.
        shards: How many shards there are; merge-stats adds up what they give.
        dtype: Of the model in memory: float32, bfloat16, or auto (bfloat16 on a GPU, float32 on a CPU).
        stay_below: A size such as 16GiB for its memory, whatever the model's: layers are brought in one at a time.
            Empty: the whole model is loaded.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        stats: Sums and counts per layer and expert (safetensors). Stats of shards or of several data sets can be added
            up.
    """
    from moeprune.steps import calibrate as step

    collected = step.calibrate(
        model,
        data,
        stats.path,
        statistics=statistics,
        text_field=text_field,
        sequences=sequences,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks or None,
        shard=shard,
        shards=shards,
        dtype=dtype,
        memory_limit=stay_below or None,
        trust_remote_code=trust_remote_code,
    )
    stats.metadata.update(model=model, data=data, tokens=collected.tokens, layers=len(collected.layers))
