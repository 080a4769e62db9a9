"""What must fit together before anything is distilled: the plan, the teacher, the student, and their tokenizers."""

from __future__ import annotations

import torch

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import check_fits, foreseen_shapes
from moeprune.checkpoint.unsupported import quantisation
from moeprune.errors import InputError
from moeprune.plan import Plan

_PLAN_NAME = "pruning_plan.json"
_TRIED_TOKENS = 4096


def check_pair(teacher: Checkpoint, student: Checkpoint, plan: Plan) -> None:
    """Raise InputError where the plan is not the teacher's, or the student not what the plan makes of it."""
    check_fits(teacher, plan)
    address = student.files.address
    if method := quantisation(student.config):
        raise InputError(
            f"the weights of {address} are quantised as {method} and would have to be quantised again after training; "
            "prune and distill the unquantised original"
        )
    expected = foreseen_shapes(teacher, plan)
    found = {name: entry.shape for name, entry in student.files.entries.items()}
    unlike = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if unlike:
        raise InputError(
            f"{address} is not what the plan makes of {teacher.files.address}: {unlike[0]} "
            f"{_differs(expected.get(unlike[0]), found.get(unlike[0]))}; apply that plan first"
        )
    carried = student.directory / _PLAN_NAME
    if carried.is_file() and _decided(Plan.load(carried)) != _decided(plan):
        raise InputError(f"{address} was made by another plan (its {_PLAN_NAME}); give that, or apply this one first")


def check_tokenizers(teacher: Checkpoint, student: Checkpoint, ids_BS: torch.Tensor) -> None:
    """Raise InputError where the two would not read the same text as the same tokens.

    Args:
        ids_BS: some text, as the teacher reads it.
    """
    theirs, own = teacher.tokenizer(), student.tokenizer()
    text = theirs.decode(ids_BS.flatten()[:_TRIED_TOKENS], skip_special_tokens=True)
    if (
        theirs.get_vocab() != own.get_vocab()
        or theirs.eos_token_id != own.eos_token_id
        or theirs(text)["input_ids"] != own(text)["input_ids"]
    ):
        raise InputError(
            f"the tokenizer of {student.files.address} reads text otherwise than that of {teacher.files.address}, and "
            "what the one has learnt means nothing to the other; put the original's tokenizer beside the pruned model"
        )


def _differs(expected: tuple[int, ...] | None, found: tuple[int, ...] | None) -> str:
    if expected is None:
        return "is in it and should not be"
    if found is None:
        return "is not in it"
    return f"should be {list(expected)}, and is {list(found)}"


def _decided(plan: Plan) -> tuple[object, ...]:
    """What becomes of the weights, whoever decided it and why."""
    layers = {name: layer.model_dump(exclude={"scores"}) for name, layer in plan.layers.items()}
    return layers, plan.sparsity, plan.recovery
