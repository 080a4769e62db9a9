from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    original: str,
    pruned: dsl.Input[dsl.Model],
    distilled: dsl.Input[dsl.Model],
    baseline_models: dsl.Input[dsl.Artifact],
    clusters: dsl.Input[dsl.Artifact],
    data: list[str],
    report: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 32,
    batch_blocks: int = 8,
    of_the_run: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Measure the original and its candidates on the same held-out texts: quality, size, memory and speed.

    Args:
        original: The original model.
        pruned: The pruned model, from global_prune.
        distilled: The recovered model, from distill.
        baseline_models: The models pruned by the baselines, from global_prune.
        clusters: Of the original's experts, from cluster; the page shows them.
        data: Held-out texts, as a JSON list of addresses as for calibrate; that of the pruned-for domain first.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block.
        max_blocks: Blocks of each text at most.
        batch_blocks: Blocks per forward pass.
        of_the_run: Whether the whole run is about these models, and is to show what was measured.
        trust_remote_code: Run modelling code that the models bring along.

    Returns:
        report: All that was measured (JSON).
        page: The same as one HTML page, with its figures.
        metrics: The recovered model against the original, on the pruned-for domain.
    """
    from moeprune.steps import evaluate as step

    measured = step.evaluate(
        [
            step.Named("original", original),
            step.Named("pruned", pruned.path),
            step.Named("distilled", distilled.path),
            *step.models_in(baseline_models.path),
        ],
        data,
        report.path,
        page_out=page.path,
        clusters=clusters.path,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        of_the_run=of_the_run,
        trust_remote_code=trust_remote_code,
    )
    best = measured.headline
    metrics.log_metric("loss_increase_nats", measured.loss_increase(best))
    metrics.log_metric("perplexity", best.quality[measured.domain].perplexity)
    metrics.log_metric("accuracy_share", best.quality[measured.domain].accuracy)
    metrics.log_metric("size_on_disk_share", measured.bytes_ratio(best))
    metrics.log_metric("throughput_share", measured.speed_ratio(best))
    if plan := step.plan_in(pruned.path):  # the checkpoint knows, however its artifact came here
        report.metadata.update(method=plan.method, ratio=plan.ratio)
    report.metadata.update(domain=measured.domain, candidates=", ".join(c.name for c in measured.candidates))
