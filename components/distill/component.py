from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    teacher: str,
    student: dsl.Input[dsl.Model],
    plan: dsl.Input[dsl.Artifact],
    data: str,
    distilled: dsl.Output[dsl.Model],
    objective: str = "block=1",
    train: str = "",
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    batch_blocks: int = 8,
    learning_rate: float = 0.03,
    epochs: int = 4,
    part: int = 0,
    parts: int = 0,
    stay_below: str = "",
    how: str = "layer-local",
    training: dict = {},  # noqa: B006 (Kubeflow's way to say the default; never written to)
    trust_remote_code: bool = False,
) -> None:
    """Teach the pruned model to answer as the original does, one layer at a time or end to end.

    Args:
        teacher: The original model.
        student: The pruned model, from global_prune.
        plan: What was pruned, from global_prune.
        data: Text of the domain, as for calibrate.
        objective: What a layer is asked for, such as block=1 (what each MoE block puts out) or experts=1,block=0.5
            (each expert's output, too).
        train: What learns, of experts, router, shared and condensed, and end to end all and lora, separated by commas;
            empty for experts and router, and the layers that the plan condenses.
        text_field: Field of JSONL or Parquet that holds the text.
        block_tokens: Tokens per block.
        max_blocks: Blocks to read at most; an eighth of them is held out.
        batch_blocks: Blocks per step of the optimizer.
        learning_rate: Its peak, as a fraction of the size of the weights.
        epochs: Times that each block is seen, at most.
        part: Which part of the layers to train, from 0.
        parts: How many parts there are; each trains every so manieth layer, and merge-distilled makes the model of
            them. 0 to train all layers and write the model.
        stay_below: A size such as 16GiB for its memory, whatever the model's. Empty: there is no limit; layers are
            brought in one at a time all the same.
        how: layer-local, in the memory of a layer, by the inputs above; or end-to-end: the whole model in memory, by
            those of training instead of objective, batch_blocks, learning_rate, epochs, part, parts and stay_below.
        training: Options of the training by name, as a JSON object, for example {"objective": "logits=1",
            "learning_rate": 1e-4, "processes": 8}: those of moeprune distill --how end-to-end.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        distilled: The recovered model, a Hugging Face checkpoint; of a part, what its layers have learnt.
    """
    import os
    from typing import Any

    both: dict[str, Any] = {"text_field": text_field, "block_tokens": block_tokens, "max_blocks": max_blocks}
    both |= {"train": train, "trust_remote_code": trust_remote_code}
    if how == "end-to-end":
        from moeprune.steps.distill_end_to_end import distill_end_to_end

        options = both | training
        outcome = distill_end_to_end(teacher, student.path, plan.path, data, distilled.path, **options)
        steps = max(outcome.curve, default=0)
    elif how == "layer-local":
        from moeprune.steps import distill as step

        steps = step.distill(
            teacher,
            student.path,
            plan.path,
            data,
            distilled.path,
            objective=objective,
            batch_blocks=batch_blocks,
            learning_rate=learning_rate,
            epochs=epochs,
            part=part,
            parts=parts,
            memory_limit=stay_below or None,
            work=os.environ.get("MOEPRUNE_WORK"),  # what the next pod goes on with, where this one is lost
            **both,
        ).steps
    else:
        from moeprune.errors import InputError

        raise InputError(f"how is layer-local or end-to-end, not {how!r}")
    distilled.metadata.update(student.metadata, optimizer_steps=steps)
