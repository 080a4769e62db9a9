"""distill, end to end: both models, gradients and Adam's moments of what learns, and activations of all layers.

The processes share all of it equally (FSDP2) but the activations, of which each has its own.
"""

from __future__ import annotations

from moeprune.distillation.end_to_end.job import Training
from moeprune.distillation.text import HELD_OUT
from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.needs.case import FLOAT32, Case, converting, forward, weights
from moeprune.estimation.needs.need import Need, Phase

_MOMENTS = 2
_LOGITS = 4  # times that all logits are there in float32: of both models, and the gradients of two errors
_ADVICE = "more processes (--distillation-processes) share it, or distill layer by layer"


def need(case: Case) -> Need:
    work, pruned = case.work, case.pruned
    training = Training.model_fields
    tokens = work.distillation_blocks * work.block_tokens
    rows = -(-int(training["batch_blocks"].default) // work.distillation_processes)
    at_once = rows * work.block_tokens
    learns = pruned.routed * FLOAT32
    teacher, student = (
        weights(case.original, case.item, "the original"),
        weights(pruned, FLOAT32, "the pruned model, float32"),
    )
    states = (
        Term("gradients", learns),
        Term("Adam's moments", _MOMENTS * learns),
        Term("activations", work.distillation_processes * at_once * _activations(case), Basis.ASSUMED),
        Term("logits", work.distillation_processes * at_once * pruned.vocabulary * _LOGITS * FLOAT32, Basis.ASSUMED),
    )
    best = Amount.of(Term("the best so far, to be written", learns))
    fusing = converting(pruned, FLOAT32)
    return Need(
        "distill",
        (
            Phase("loading", Amount.of(teacher, student, fusing), passing=Amount.of(student)),
            Phase("learning", Amount.of(teacher, student, *states), best),
        ),
        disk=Amount.of(
            case.brought,
            Term("the pruned model, before and after", 2 * pruned.bytes_on_disk),
            Term("two states and the best", (2 * (1 + _MOMENTS) + 1) * learns),
        ),
        operations=_operations(case, tokens),
        moved=Amount.of(Term("both models", case.original.bytes_on_disk + 2 * pruned.bytes_on_disk)),
        computes=True,
        processes=work.distillation_processes,
        advice=_ADVICE,
    )


def _activations(case: Case) -> float:
    """Bytes that a token leaves for the backward pass: of every layer, or of one and each layer's input."""
    model, hidden = case.pruned, case.pruned.hidden
    of_layers = [16 * hidden + max(1, layer.top_k) * (5 * layer.width + 4 * hidden) for layer in model.layers.values()]
    if case.work.gradient_checkpointing:
        return (max(of_layers) + model.blocks * hidden) * FLOAT32
    dense = (model.blocks - len(of_layers)) * 24 * hidden
    return (sum(of_layers) + dense) * FLOAT32


def _operations(case: Case, tokens: int) -> Amount:
    work = case.work
    held_out = tokens / HELD_OUT
    evaluations = int(Training.model_fields["evaluations"].default) + 1
    learnt = (tokens - held_out) * work.distillation_epochs
    backward = 3 if work.gradient_checkpointing else 2
    one = forward(case.pruned, 1, work.block_tokens, head=True)
    teacher = forward(case.original, 1, work.block_tokens, head=True)
    return Amount.of(
        Term("the original's passes", teacher * (learnt + evaluations * held_out)),
        Term("learning", one * ((1 + backward) * learnt + evaluations * held_out)),
    )
