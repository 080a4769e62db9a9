"""The pipeline: a model, a domain and a ratio in; a smaller model, its report and its place in the registry out."""

from typing import NamedTuple

from kfp import dsl, kubernetes

from moeprune.components.calibrate import calibrate
from moeprune.components.cluster import cluster
from moeprune.components.distill import distill
from moeprune.components.distill_on_nodes import distill_on_nodes
from moeprune.components.evaluate import evaluate
from moeprune.components.global_prune import global_prune
from moeprune.components.merge_distilled import merge_distilled
from moeprune.components.merge_stats import merge_stats
from moeprune.components.prepare import prepare
from moeprune.components.promote import promote
from moeprune.components.spread import spread
from moeprune.methods import BASELINES, DEFAULT

from . import placement
from .building import built_once
from .on_a_cluster import VOLUME_PATH, use_nodes, use_services

EVALUATION_DATA = ["builtin://code/held-out", "builtin://prose/held-out", "builtin://arithmetic/held-out"]
HELD_AGAINST = list(BASELINES)
NO_OPTIONS: dict[str, str] = {}
NO_TOLERATIONS: list[dict] = []


class Outputs(NamedTuple):
    report: dsl.Artifact
    page: dsl.HTML
    model: dsl.Model
    promoted: bool
    verdict: str


@dsl.pipeline(name="model-at")
def model_at(address: str) -> dsl.Model:
    """Make an artifact of an address again.

    A pipeline of its own: a cluster looks for an importer's address among the inputs of the graph that it is in, and
    nowhere else. Built at once, since none can be built while another is.
    """
    imported = dsl.importer(artifact_uri=address, artifact_class=dsl.Model, reimport=True)
    imported.set_caching_options(enable_caching=False)
    return imported.output


@built_once("prune")
def prune(
    model: str = "builtin://reference",
    data: str = "builtin://code",
    evaluation_data: list[str] = EVALUATION_DATA,
    method: str = DEFAULT,
    ratio: float = 0.5,
    parameters_ratio: float = 0.0,
    size: str = "",
    method_options: dict = NO_OPTIONS,
    baselines: list[str] = HELD_AGAINST,
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
    distillation_shards: int = 1,
    distillation_memory_limit: str = "",
    distillation_nodes: int = 0,
    distillation_gpus_per_node: int = 1,
    distillation_volume: str = "",
    distillation_node_options: dict = NO_OPTIONS,
    distillation_training: dict = NO_OPTIONS,
    evaluation_blocks: int = 32,
    learning_rate: float = 0.03,
    registered_model: str = "moeprune",
    max_loss_increase_nats: float = 0.25,
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
    """Make a Mixture-of-Experts model smaller for a domain, win back what that lost, measure what is left, and register
    it if it lost little enough.

    Args:
        model: The model: a directory, an s3:// address, a Hugging Face hub id, or builtin://reference.
        data: Text of the domain to prune for, and to recover on: JSONL, plain text or Parquet (a path or an s3://
            address), a hub data set id, or builtin://code, builtin://prose, builtin://arithmetic. Several, separated by
            commas, are mixed, in equal shares or by weights (code.jsonl*3,prose.txt); %2C, %2A and %25 stand for a
            comma, star and percent sign in a name.
        evaluation_data: Held-out texts to measure on, as a JSON list of such addresses, that of the domain first.
        method: How to choose what stays: fuse, fuse-by-need, c-prune, reap, naee, mone, hc-smoe, contribution,
            frequency or random (experts), moe-pruner, wanda or magnitude (weights), cd-moe (layers).
        ratio: Fraction of the routed experts to remove, at least 0 and below 1. The next two, where given, take its
            place.
        parameters_ratio: Fraction of all parameters to remove, at least; 0 where it is not wanted.
        size: Most bytes that the pruned checkpoint may have, such as 400MB or 12GiB; empty where it is not wanted.
        method_options: Options of the method by name, as a JSON object, for example {"recover": false}.
        baselines: Methods to hold the result against, asked for the same, as a JSON list; [] for none.
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
        distillation_objective: What the pruned model is asked for, such as block=1 (what each MoE block puts out) or
            experts=1,block=0.5 (each expert's output, too).
        distillation_parts: What learns, of experts, router, shared and condensed, separated by commas; empty for
            experts and router, and the layers that the plan condenses.
        distillation_epochs: Times that each block is seen, at most.
        distillation_shards: Tasks that share the layers; each streams the original once and trains every so manieth
            layer. The result is the same.
        distillation_memory_limit: A size such as 16GiB that distilling stays below, whatever the model's. Empty: there
            is no limit; layers are brought in one at a time all the same.
        distillation_nodes: Nodes of the cluster that train the model as a whole, as a TrainJob of Kubeflow Trainer; 0
            to distill layer by layer, in tasks of the pipeline. With nodes, the next four say how, and objective,
            epochs, shards, memory limit and learning rate are not asked for.
        distillation_gpus_per_node: GPUs of each node; 0 to train on CPUs.
        distillation_volume: A PersistentVolumeClaim that many pods can write to (ReadWriteMany), through which the
            nodes share models and unfinished work.
        distillation_node_options: What else is asked of the nodes, by name, as a JSON object, for example {"memory":
            "64Gi", "queue": "gpus"}.
        distillation_training: Options of the training by name, as a JSON object, for example {"objective": "logits=1",
            "learning_rate": 1e-4}.
        evaluation_blocks: Blocks of each held-out text to measure on at most.
        learning_rate: Of the distillation, its peak, as a fraction of the size of the weights.
        registered_model: Name of the model in the registry.
        max_loss_increase_nats: The most that the result may lose on the domain, in nats per token, to be registered.
        trust_remote_code: Run modelling code that the model brings along.
        calibration_cpus: CPUs that each calibration asks its node for, such as 4 or 500m.
        calibration_memory: Memory that each calibration asks for and may have at most, such as 16Gi.
        calibration_gpus: GPUs that each calibration holds; 0 to calibrate on CPUs.
        pruning_cpus: CPUs that deciding, cutting and fitting ask for.
        pruning_memory: Memory that they ask for and may have at most.
        pruning_gpus: GPUs that they hold.
        distillation_cpus: CPUs that each task of a distillation layer by layer asks for.
        distillation_memory: Memory that each asks for and may have at most.
        distillation_gpus: GPUs that each holds.
        evaluation_cpus: CPUs that measuring asks for.
        evaluation_memory: Memory that it asks for and may have at most.
        evaluation_gpus: GPUs that it holds.
        merging_cpus: CPUs that adding up, clustering, merging and registering ask for.
        merging_memory: Memory that they ask for and may have at most; they hold no GPU.
        gpu_type: What the cluster calls a GPU, such as nvidia.com/gpu or amd.com/gpu.
        node_selector: Labels of the nodes that the steps which may hold GPUs run on, as a JSON object, for example
            {"pool": "gpus"}; {} for any.
        tolerations: Taints of those nodes that these steps put up with, as a JSON list, for example
            [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}].

    Returns:
        report: All that was measured (JSON).
        page: The report as one HTML page, with its figures.
        model: The pruned and recovered model, a Hugging Face checkpoint.
        promoted: Whether it was registered.
        verdict: Whether it was registered, and why, in a sentence.
    """
    texts = {"text_field": text_field, "block_tokens": block_tokens, "trust_remote_code": trust_remote_code}

    prepared = prepare(method=method, baselines=baselines, shards=calibration_shards)
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
    stats = merged.outputs["stats"]
    clustered = cluster(
        stats=stats,
        similarity=cluster_similarity,
        algorithm=cluster_algorithm,
        clusters_per_layer=clusters_per_layer,
        model=model,
        trust_remote_code=trust_remote_code,
    )
    clusters = clustered.outputs["clusters"]
    pruned = global_prune(
        model=model,
        stats=stats,
        clusters=clusters,
        method=method,
        ratio=ratio,
        parameters_ratio=parameters_ratio,
        size=size,
        method_options=method_options,
        baselines=baselines,
        data=data,
        trial_blocks=trial_blocks,
        recovery_blocks=recovery_blocks,
        **texts,
    )
    with dsl.If(distillation_nodes == 0, name="distillation in tasks"):
        # One shard is merged, too, so that what comes of this is one thing.
        numbered = spread(shards=distillation_shards)
        with dsl.ParallelFor(numbered.output, name="distillation shards") as part:
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
                part=part,
                parts=distillation_shards,
                stay_below=distillation_memory_limit,
                **texts,
            )
        in_tasks = merge_distilled(
            parts=dsl.Collected(learnt.outputs["distilled"]),
            student=pruned.outputs["pruned"],
            trust_remote_code=trust_remote_code,
        )
    with dsl.Else(name="distillation on nodes"):
        on_nodes = distill_on_nodes(
            teacher=model,
            student=pruned.outputs["pruned"],
            plan=pruned.outputs["plan"],
            data=data,
            nodes=distillation_nodes,
            volume=distillation_volume,
            volume_path=VOLUME_PATH,
            gpus_per_node=distillation_gpus_per_node,
            node_options=distillation_node_options,
            training=distillation_training,
            train=distillation_parts,
            max_blocks=distillation_blocks,
            **texts,
        )
    # Which of two artifacts was made, neither kfp.local nor every release of Kubeflow Pipelines can tell; which of two
    # addresses, all can.
    recovered = model_at(address=dsl.OneOf(in_tasks.outputs["Output"], on_nodes.outputs["Output"]))
    measured = evaluate(
        original=model,
        pruned=pruned.outputs["pruned"],
        distilled=recovered.output,
        baseline_models=pruned.outputs["baseline_models"],
        clusters=clusters,
        data=evaluation_data,
        max_blocks=evaluation_blocks,
        **texts,
    )
    judged = promote(
        report=measured.outputs["report"],
        model=recovered.output,
        registered_model=registered_model,
        max_loss_increase_nats=max_loss_increase_nats,
    )

    # What a run is compared by is made in that run, whatever was made before: only what all runs on the same model and
    # data share is taken from a cache.
    reusable, unique = (
        (prepared, calibrated, merged, clustered),
        (pruned, numbered, learnt, in_tasks, on_nodes, measured, judged),
    )
    recovered.set_caching_options(enable_caching=False)
    for task in reusable:
        task.set_caching_options(enable_caching=True)
    for task in unique:
        task.set_caching_options(enable_caching=False)
    for task in (*reusable, *unique):
        use_services(task)
    pool = placement.Pool(gpu_type, node_selector, tolerations)
    for task, cpus, memory, gpus in (
        (calibrated, calibration_cpus, calibration_memory, calibration_gpus),
        (pruned, pruning_cpus, pruning_memory, pruning_gpus),
        (learnt, distillation_cpus, distillation_memory, distillation_gpus),
        (measured, evaluation_cpus, evaluation_memory, evaluation_gpus),
    ):
        placement.heavy(task, cpus, memory, hours=48, gpus=gpus, pool=pool)
    for task in (merged, clustered, in_tasks, judged):
        placement.heavy(task, merging_cpus, merging_memory, hours=12)
    placement.light(prepared, numbered, on_nodes)
    placement.retry(calibrated, merged, clustered, pruned, learnt, in_tasks, measured, judged)
    kubernetes.set_timeout(on_nodes, 0)  # the TrainJob has a limit of its own, which the run may choose
    use_nodes(on_nodes, distillation_volume)

    return Outputs(
        report=measured.outputs["report"],
        page=measured.outputs["page"],
        model=recovered.output,
        promoted=judged.outputs["promoted"],
        verdict=judged.outputs["verdict"],
    )
