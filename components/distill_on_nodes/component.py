from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill_on_nodes(
    teacher: str,
    student: dsl.Input[dsl.Model],
    plan: dsl.Input[dsl.Artifact],
    data: str,
    distilled: dsl.Output[dsl.Model],
    nodes: int,
    volume: str,
    volume_path: str = "/mnt/moeprune",
    gpus_per_node: int = 1,
    node_options: dict = {},  # noqa: B006 (Kubeflow's way to say the default; never written to)
    training: dict = {},  # noqa: B006
    train: str = "",
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    trust_remote_code: bool = False,
) -> str:
    """Teach the pruned model as a whole to answer as the original does, on several nodes of the cluster.

    The task itself trains nothing: it starts a TrainJob of Kubeflow Trainer, follows it to its end and removes it.

    Args:
        teacher: The original model.
        student: The pruned model, from global_prune.
        plan: What was pruned, from global_prune.
        data: Text of the domain, as for calibrate.
        nodes: How many nodes train.
        volume: A PersistentVolumeClaim that many pods can write to (ReadWriteMany), mounted by this task, too.
        volume_path: Where it is mounted.
        gpus_per_node: GPUs of each node; 0 to train on CPUs.
        node_options: What else is asked of the nodes, by name, as a JSON object, for example {"memory": "64Gi",
            "queue": "gpus"} (docs/distillation.md lists them).
        training: Options of the training by name, as a JSON object, for example {"objective": "logits=1",
            "learning_rate": 1e-4}: those of moeprune distill --how end-to-end.
        train: What learns, of experts, router, shared, condensed, all and lora, separated by commas; empty for experts
            and router, and the layers that the plan condenses.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block.
        max_blocks: Blocks to read at most; an eighth of them is held out.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        distilled: The recovered model, a Hugging Face checkpoint.
        Output: Where that is.
    """
    from moeprune.steps import distill_end_to_end as step
    from moeprune.train_job import Nodes, OnNodes

    outcome = step.distill_end_to_end(
        teacher,
        student.path,
        plan.path,
        data,
        distilled.path,
        elsewhere=OnNodes(
            Nodes.of(count=nodes, gpus=gpus_per_node, volume=volume, volume_path=volume_path, **node_options)
        ),
        train=train,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        trust_remote_code=trust_remote_code,
        **training,
    )
    distilled.metadata.update(student.metadata, optimizer_steps=max(outcome.curve, default=0))
    return distilled.uri
