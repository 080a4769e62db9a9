"""Many methods at many ratios, from one calibration, and the Pareto front of what they made."""

from typing import NamedTuple

from kfp import dsl

from moeprune.components.calibrate import calibrate
from moeprune.components.cluster import cluster
from moeprune.components.combine import combine
from moeprune.components.compare import compare
from moeprune.components.distill import distill
from moeprune.components.evaluate import evaluate
from moeprune.components.global_prune import global_prune
from moeprune.components.merge_stats import merge_stats
from moeprune.components.prepare import prepare
from moeprune.distillation.layer_local.settings import Settings
from moeprune.methods import BASELINES, DEFAULT

from . import placement
from .building import built_once
from .on_a_cluster import use_services
from .prune import EVALUATION_DATA, NO_OPTIONS, NO_TOLERATIONS

METHODS = [DEFAULT, *BASELINES]
RATIOS = [0.25, 0.5, 0.75]
NO_BASELINES: list[str] = []
AT_ONCE = 4  # models that are made at the same time; the others wait for their turn


class Outputs(NamedTuple):
    report: dsl.Artifact
    page: dsl.HTML
    front: list[str]


@built_once("sweep")
def sweep(
    model: str = "builtin://reference",
    data: str = "builtin://code",
    evaluation_data: list[str] = EVALUATION_DATA,
    methods: list[str] = METHODS,
    ratios: list[float] = RATIOS,
    method_options: dict = NO_OPTIONS,
    text_field: str = "text",
    block_tokens: int = 256,
    calibration_blocks: int = 128,
    calibration_sequences: str = "packed",
    calibration_shards: int = 1,
    calibration_dtype: str = "auto",
    calibration_memory_limit: str = "",
    cluster_similarity: str = "outputs",
    cluster_algorithm: str = "ward",
    clusters_per_layer: str = "published",
    trial_blocks: int = 8,
    recovery_blocks: int = 128,
    distillation_blocks: int = 384,
    distillation_objective: str = "block=1",
    distillation_parts: str = "",
    distillation_epochs: int = 4,
    distillation_memory_limit: str = "",
    evaluation_blocks: int = 32,
    learning_rate: float = Settings.learning_rate,
    trust_remote_code: bool = False,
    calibration_cpus: str = "4",
    calibration_memory: str = "16Gi",
    calibration_gpus: str = "0",
    pruning_cpus: str = "4",
    pruning_memory: str = "16Gi",
    pruning_gpus: str = "0",
    distillation_cpus: str = "4",
    distillation_memory: str = "16Gi",
    distillation_gpus: str = "0",
    evaluation_cpus: str = "4",
    evaluation_memory: str = "16Gi",
    evaluation_gpus: str = "0",
    merging_cpus: str = "2",
    merging_memory: str = "8Gi",
    gpu_type: str = "nvidia.com/gpu",
    node_selector: dict = NO_OPTIONS,
    tolerations: list[dict] = NO_TOLERATIONS,
) -> Outputs:
    """Prune a Mixture-of-Experts model for a domain by every method at every ratio, win back what each lost, measure
    them all, and show which of them no other is smaller and better than.

    Args:
        model: The model: a directory, an s3:// address, a Hugging Face hub id, or builtin://reference.
        data: Text of the domain to prune for, and to recover on: JSONL, plain text or Parquet (a path or an s3://
            address), a hub data set id, or builtin://code, builtin://prose, builtin://arithmetic. Several, separated by
            commas, are mixed, in equal shares or by weights (code.jsonl*3,prose.txt); %2C, %2A and %25 stand for a
            comma, star and percent sign in a name.
        evaluation_data: Held-out texts to measure on, as a JSON list of such addresses, that of the domain first.
        methods: How to choose what stays, as a JSON list; each makes a model of every ratio. `moeprune methods` lists
            them all.
        ratios: Fractions to remove, each at least 0 and below 1, as a JSON list.
        method_options: Options of each method by its name, as a JSON object, for example
            {"fuse": {"recover": false}}.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block; texts are joined and cut into blocks.
        calibration_blocks: Blocks to calibrate on at most.
        calibration_sequences: Either packed (documents are joined and cut into full blocks) or documents (one document
            per block, padded, a long one in several).
        calibration_shards: Tasks that share the calibration; each loads the model and takes every so manieth batch of
            the blocks. The result is the same, bit for bit.
        calibration_dtype: Of the model while calibrating: float32, bfloat16, or auto (bfloat16 on a GPU, float32 on a
            CPU).
        calibration_memory_limit: A size such as 16GiB that calibrating stays below, whatever the model's: layers are
            brought in one at a time. Empty: the whole model is loaded.
        cluster_similarity: Which experts are alike: those with the same outputs, with the same parameters (outputs,
            parameters), or both.
        cluster_algorithm: How to cluster experts: ward, average or k-means.
        clusters_per_layer: How many clusters of experts: a number, published (12 for every 64 experts), or auto (for
            each layer what suits it best, by the silhouette).
        trial_blocks: Blocks to try decisions on at most, where the method does that (cd-moe,
            fuse-by-need).
        recovery_blocks: Blocks to fit what stays on at most, by least squares, where the method asks for that (fuse,
            fuse-by-need).
        distillation_blocks: Blocks to distill on at most; an eighth of them is held out.
        distillation_objective: What the pruned models are asked for, such as block=1 (what each MoE block puts out) or
            experts=1,block=0.5 (each expert's output, too).
        distillation_parts: What learns, of experts, router, shared and condensed, separated by commas; empty for
            experts and router, and the layers that the plan condenses.
        distillation_epochs: Times that each block is seen, at most.
        distillation_memory_limit: A size such as 16GiB that distilling stays below, whatever the model's. Empty: there
            is no limit; layers are brought in one at a time all the same.
        evaluation_blocks: Blocks of each held-out text to measure on at most.
        learning_rate: Of the distillation, its peak, as a fraction of the size of the weights.
        trust_remote_code: Run modelling code that the model brings along.
        calibration_cpus: CPUs that each calibration asks its node for, such as 4 or 500m.
        calibration_memory: Memory that each calibration asks for and may have at most, such as 16Gi.
        calibration_gpus: GPUs that each calibration holds; 0 to calibrate on CPUs.
        pruning_cpus: CPUs that deciding, cutting and fitting ask for, for each model.
        pruning_memory: Memory that they ask for and may have at most.
        pruning_gpus: GPUs that they hold.
        distillation_cpus: CPUs that distilling asks for, for each model.
        distillation_memory: Memory that it asks for and may have at most.
        distillation_gpus: GPUs that it holds.
        evaluation_cpus: CPUs that measuring asks for, for each model.
        evaluation_memory: Memory that it asks for and may have at most.
        evaluation_gpus: GPUs that it holds.
        merging_cpus: CPUs that adding up, clustering and comparing ask for.
        merging_memory: Memory that they ask for and may have at most; they hold no GPU.
        gpu_type: What the cluster calls a GPU, such as nvidia.com/gpu or amd.com/gpu.
        node_selector: Labels of the nodes that the steps which may hold GPUs run on, as a JSON object, for example
            {"pool": "gpus"}; {} for any.
        tolerations: Taints of those nodes that these steps put up with, as a JSON list, for example
            [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}].

    Returns:
        report: All that was measured, side by side (JSON).
        page: The report as one HTML page, with the Pareto front of quality against size.
        front: The names of the models that no other is smaller and better than, the smallest first.
    """
    texts = {"text_field": text_field, "block_tokens": block_tokens, "trust_remote_code": trust_remote_code}

    chosen = combine(methods=methods, ratios=ratios, options=method_options)
    prepared = prepare(method=DEFAULT, baselines=methods, shards=calibration_shards).after(chosen)
    with dsl.ParallelFor(prepared.output, name="calibration shards") as share:
        calibrated = calibrate(
            model=model,
            data=data,
            statistics=share.statistics,
            max_blocks=calibration_blocks,
            sequences=calibration_sequences,
            shard=share.shard,
            shards=calibration_shards,
            dtype=calibration_dtype,
            stay_below=calibration_memory_limit,
            **texts,
        )
    merged = merge_stats(parts=dsl.Collected(calibrated.outputs["stats"]))
    clustered = cluster(
        stats=merged.outputs["stats"],
        similarity=cluster_similarity,
        algorithm=cluster_algorithm,
        clusters_per_layer=clusters_per_layer,
        model=model,
        trust_remote_code=trust_remote_code,
    )
    with dsl.ParallelFor(chosen.output, name="models", parallelism=AT_ONCE) as choice:
        pruned = global_prune(
            model=model,
            stats=merged.outputs["stats"],
            clusters=clustered.outputs["clusters"],
            method=choice.method,
            ratio=choice.ratio,
            method_options=choice.options,
            baselines=NO_BASELINES,
            data=data,
            trial_blocks=trial_blocks,
            recovery_blocks=recovery_blocks,
            **texts,
        )
        learnt = distill(
            teacher=model,
            student=pruned.outputs["pruned"],
            plan=pruned.outputs["plan"],
            data=data,
            objective=distillation_objective,
            train=distillation_parts,
            max_blocks=distillation_blocks,
            learning_rate=learning_rate,
            epochs=distillation_epochs,
            stay_below=distillation_memory_limit,
            **texts,
        )
        measured = evaluate(
            original=model,
            pruned=pruned.outputs["pruned"],
            distilled=learnt.outputs["distilled"],
            baseline_models=pruned.outputs["baseline_models"],
            clusters=clustered.outputs["clusters"],
            data=evaluation_data,
            max_blocks=evaluation_blocks,
            of_the_run=False,
            **texts,
        )
    compared = compare(reports=dsl.Collected(measured.outputs["report"]))

    for task in (prepared, calibrated, merged, clustered):
        task.set_caching_options(enable_caching=True)
    for task in (chosen, pruned, learnt, measured, compared):
        task.set_caching_options(enable_caching=False)
    for task in (chosen, prepared, calibrated, merged, clustered, pruned, learnt, measured, compared):
        use_services(task)
    pool = placement.Pool(gpu_type, node_selector, tolerations)
    for task, cpus, memory, gpus in (
        (calibrated, calibration_cpus, calibration_memory, calibration_gpus),
        (pruned, pruning_cpus, pruning_memory, pruning_gpus),
        (learnt, distillation_cpus, distillation_memory, distillation_gpus),
        (measured, evaluation_cpus, evaluation_memory, evaluation_gpus),
    ):
        placement.heavy(task, cpus, memory, hours=48, gpus=gpus, pool=pool)
    for task in (merged, clustered, compared):
        placement.heavy(task, merging_cpus, merging_memory, hours=12)
    placement.light(chosen, prepared)
    placement.retry(calibrated, merged, clustered, pruned, learnt, measured, compared)

    return Outputs(
        report=compared.outputs["report"],
        page=compared.outputs["page"],
        front=compared.outputs["Output"],
    )
