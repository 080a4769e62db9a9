"""Recovery from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moeprune.atomic import build_beside
from moeprune.checkpoint.layout import experts_modules
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.rewriting import rewrite
from moeprune.checkpoint.unsupported import quantisation
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.recovery.recover import Recovered, recover
from moeprune.statistics.calibration import make_batches

_BATCH_TOKENS = 2048  # passes wait for each other at every layer, and what is inside its experts is held for one batch


def recover_checkpoint(
    original: Checkpoint,
    teacher: PreTrainedModel,
    cut: Checkpoint,
    plan: Plan,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor | None,
    out: Path,
    *,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Recovered:
    """Fit what a plan left of a model, and write the result into the directory `out`.

    Args:
        original: the checkpoint that the plan was made for.
        teacher: that checkpoint in memory.
        cut: what surgery made of it by the plan.
        ids_BS, mask_BS: text (`texts.Blocks`).

    Raises:
        InputError: a plan or a family whose experts cannot be fitted so, or too little text.
    """
    refuse_what_cannot_be_fitted(original, teacher, plan)
    student = cut.load(torch.float32, teacher.device)
    batches = make_batches(ids_BS, mask_BS, max(1, _BATCH_TOKENS // ids_BS.shape[1]))
    recovered = recover(teacher, student, plan, original.layout.layers, batches, on_layer=on_layer)
    with build_beside(out) as beside:
        rewrite(cut, student, recovered.parameters, beside)
    return recovered


def refuse_what_cannot_be_fitted(original: Checkpoint, teacher: PreTrainedModel, plan: Plan) -> None:
    """Raise InputError for what recovery knows no closed form of."""
    if plan.sparsity or plan.condensed or any(layer.constant or layer.merged for layer in plan.layers.values()):
        raise InputError(
            "recovery fits whole experts that stay; a plan that makes weights zero, condenses layers, or puts means or "
            "constants in the place of experts is carried out without it: distill the result instead"
        )
    if method := quantisation(original.config):
        raise InputError(
            f"the weights of {original.files.address} are quantised as {method} and would have to be quantised again "
            "after recovery; prune and recover the unquantised original"
        )
    if any(getattr(module, "has_post_expert_norm", False) for module in experts_modules(teacher).values()):
        raise InputError(
            f"the experts of {original.config.model_type} end in a norm, so that what fits them is no least-squares "
            "problem; make a plan without recovery (`--set recover=false`) and distill"
        )
