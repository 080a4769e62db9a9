from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def global_prune(
    model: str,
    stats: dsl.Input[dsl.Artifact],
    clusters: dsl.Input[dsl.Artifact],
    plan: dsl.Output[dsl.Artifact],
    pruned: dsl.Output[dsl.Model],
    baseline_models: dsl.Output[dsl.Artifact],
    data: str,
    method: str = "fuse",
    ratio: float = 0.5,
    parameters_ratio: float = 0.0,
    size: str = "",
    method_options: dict = {},  # noqa: B006 (Kubeflow's way to say the default; never written to)
    baselines: list[str] = [],  # noqa: B006
    text_field: str = "text",
    block_tokens: int = 256,
    trial_blocks: int = 8,
    recovery_blocks: int = 128,
    trust_remote_code: bool = False,
) -> None:
    """Decide which experts of which layers stay, and write the model without the others.

    Args:
        model: The original model, as given to calibrate.
        stats: What its experts do, from calibrate.
        clusters: Which experts are alike, from cluster.
        data: Text of the domain, as for calibrate; read where a method tries what it decides, or has what stays
            fitted.
        method: How to choose: fuse, c-prune, reap and others; `moeprune methods` lists them all with their options.
        ratio: Fraction of the routed experts to remove, at least 0 and below 1. The next two, where given, take its
            place.
        parameters_ratio: Fraction of all parameters to remove, at least; 0 where it is not wanted.
        size: Most bytes that the pruned checkpoint may have, such as 400MB or 12GiB; empty where it is not wanted.
        method_options: Options of the method by name, as a JSON object, for example {"recover": false}.
        baselines: Methods to hold the result against, as a JSON list. Each prunes the same model for the same
            ratio or size, with its default options.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block.
        trial_blocks: Blocks to try on, at most.
        recovery_blocks: Blocks to fit what stays on, at most, where the method asks for that.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        plan: What stays in each layer and why (JSON, to read, edit and replay).
        pruned: The pruned model, a Hugging Face checkpoint.
        baseline_models: The models pruned by the baselines, a directory each; empty where none was asked for.
    """
    from moeprune.steps import prune as step

    made = step.prune(
        model,
        method,
        None if parameters_ratio or size else ratio,
        stats.path,
        plan.path,
        pruned.path,
        data=data,
        text_field=text_field,
        block_tokens=block_tokens,
        trial_blocks=trial_blocks,
        recovery_blocks=recovery_blocks,
        parameters_ratio=parameters_ratio,
        size=size,
        clusters=clusters.path,
        options=method_options,
        baselines=baselines,
        baselines_out=baseline_models.path,
        trust_remote_code=trust_remote_code,
    )
    kept = sorted(made.plan.experts_per_layer.values()) or [0]
    facts = {"method": method, "ratio": made.plan.ratio, "fewest_experts": kept[0], "most_experts": kept[-1]}
    plan.metadata.update(facts)
    pruned.metadata.update(facts, framework="transformers", parameters=made.parameters)
    baseline_models.metadata.update(methods=", ".join(baselines), ratio=made.plan.ratio)
