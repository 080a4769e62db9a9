"""distill: teacher and pruned student -> recovered student."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from moeprune import places, tracking
from moeprune.atomic import build_beside, refuse_to_overwrite
from moeprune.checkpoint.loading import Checkpoint, default_device
from moeprune.checkpoint.rewriting import rewrite
from moeprune.checkpoint.surgery import check_fits
from moeprune.checkpoint.unsupported import quantisation
from moeprune.distillation import Distilled
from moeprune.distillation import distill as recover
from moeprune.errors import InputError
from moeprune.moe_blocks import block_of
from moeprune.plan import Plan
from moeprune.progress import progress
from moeprune.steps import machine
from moeprune.texts import read_blocks


def distill(
    teacher: str,
    student: str,
    plan: str,
    data: str,
    out: str,
    *,
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    batch_blocks: int = 8,
    learning_rate: float = 1e-3,
    epochs: int = 1,
    trust_remote_code: bool = False,
) -> Distilled:
    """Win back what pruning lost, and put the recovered checkpoint at `out`. See `distillation.distill`.

    Raises:
        InputError: the plan was not made for the teacher, or the student is not what it makes of the teacher.
    """
    machine.quieten()
    params = {
        "teacher": teacher,
        "data": data,
        "block_tokens": block_tokens,
        "max_blocks": max_blocks,
        "learning_rate": learning_rate,
        "epochs": epochs,
    }
    with (
        tracking.step("distill", params | machine.describe()) as run,
        places.output(out) as path,
        places.local_file(plan) as plan_path,
        places.local_model(teacher) as teacher_directory,
        places.local_model(student) as student_directory,
    ):
        refuse_to_overwrite(path)
        decided = Plan.load(plan_path)
        original = Checkpoint(teacher_directory, trust_remote_code)
        pruned = Checkpoint(student_directory, trust_remote_code)
        check_fits(original, decided)
        if method := quantisation(pruned.config):
            raise InputError(
                f"the weights of {student} are quantised as {method} and would have to be quantised again after "
                "training; prune and distill the unquantised original"
            )
        if pruned.experts_per_layer != decided.experts_per_layer:
            raise InputError(
                f"{student} does not keep the experts that {plan} says; apply that plan to {teacher} first"
            )
        blocks = read_blocks(
            data, original.tokenizer(), block_tokens=block_tokens, max_blocks=max_blocks, text_field=text_field
        )
        run.dataset(blocks.name, blocks.address, blocks.fingerprint, "distillation", blocks.tokens)
        device = default_device()
        learner = pruned.load(torch.float32, device)
        trainable = _trainable(original, learner, decided)
        started = time.monotonic()
        with progress("distill") as on_step:
            result = recover(
                original.load(device=device),
                learner,
                trainable,
                blocks.ids_BS,
                learning_rate=learning_rate,
                batch_blocks=batch_blocks,
                epochs=epochs,
                keep_zeros=decided.sparsity is not None,
                on_step=on_step,
            )
        seconds = time.monotonic() - started
        with build_beside(path) as beside:
            rewrite(pruned, learner, result.parameters, beside)
        run.metrics({"seconds": seconds, "throughput_tokens_per_second": blocks.tokens * epochs / seconds})
        for step, error in enumerate(result.curve):
            run.metrics({"training_error_share_of_variance": error}, step)
        for layer, name in enumerate(result.error_before):
            run.metrics(
                {
                    "layer_error_before_share_of_variance": result.error_before[name],
                    "layer_error_after_share_of_variance": result.error_after[name],
                },
                layer,
            )
        return result


def _trainable(original: Checkpoint, learner: PreTrainedModel, plan: Plan) -> dict[str, list[str]]:
    """By layer, the parameters that learn: of experts and routers, or all of a condensed layer.

    Where the plan condenses layers, those that it leaves as they were have nothing to learn.
    """
    trainable = {}
    for name, layer in original.layout.layers.items():
        planned = plan.layers[name]
        if planned.condensed is not None:
            block = block_of(name)
            trainable[name] = [f"{block}.{own}" for own, _ in learner.get_submodule(block).named_parameters()]
        elif planned.drop or not plan.condensed:
            trainable[name] = list(layer.parameters)
    return trainable
