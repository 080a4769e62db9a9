"""distill, layer by layer: a layer of the original, the block of what stays that learns, and all text at its door."""

from __future__ import annotations

from moeprune.distillation.layer_local.layers import COPIES, NOTED_IN_MEMORY
from moeprune.distillation.layer_local.learn import LOOKS
from moeprune.distillation.layer_local.lesson import AT_ONCE
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.text import HELD_OUT
from moeprune.errors import InputError
from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.anatomy import MoeLayer
from moeprune.estimation.needs.case import FLOAT32, Case, converting, forward, least_limit, one_pass
from moeprune.estimation.needs.need import LIBRARIES, Need, Phase
from moeprune.estimation.units import in_bytes
from moeprune.statistics.calibration import BATCH_TOKENS
from moeprune.streaming.streamed import FEWEST_EXPERTS

_HELD_STATES = 3  # hidden states that a stopped pass holds of each token
_BACKWARD = 2  # times the operations of a forward pass
_ADVICE = "give --distillation-memory-limit, and what stopped passes hold goes to disk"


def need(case: Case) -> Need:
    """Raises InputError where the memory limit is too small."""
    work, parts = case.work, case.work.distillation_shards
    tokens = work.distillation_blocks * work.block_tokens
    noted = 2 * tokens * case.original.hidden * case.item
    learns = sum(layer.routed for layer in case.pruned.layers.values()) * FLOAT32
    limit = work.distillation_memory_limit
    if limit is not None:
        _refuse_too_small(case, limit)
    phases = (
        _phases(case, tokens, noted)
        if limit is None
        else (Phase("streaming", Amount.of(Term("the memory limit", limit - LIBRARIES))),)
    )
    on_disk = max(0, noted - NOTED_IN_MEMORY) if limit is None else noted
    disk = Amount.of(
        Term("the pruned model", case.pruned.bytes_on_disk),
        Term("what a layer is given and puts out", on_disk),
        Term("what its layers have learnt", learns / parts),
    )
    return Need(
        "distill",
        phases,
        disk,
        _operations(case, tokens),
        moved=Amount.of(Term("the original, and a share of the pruned model", _moved(case))),
        pods=parts,
        computes=True,
        advice=_ADVICE if limit is None else "give a smaller --distillation-memory-limit",
    )


def _phases(case: Case, tokens: int, noted: int) -> tuple[Phase, ...]:
    original, layer, item = case.original, case.pruned.largest, case.item
    held = Term("hidden states of all tokens", tokens * _HELD_STATES * original.hidden * item, Basis.ASSUMED)
    kept = Amount.of(Term("what a layer is given and puts out", min(noted, NOTED_IN_MEMORY)))
    batch = min(tokens, max(BATCH_TOKENS, case.work.block_tokens))
    teacher = (
        Term("a layer of the original", (original.largest_part + original.largest.routed) * item),
        converting(original, item),
        one_pass(original, batch, item),
    )
    learning = layer.routed * FLOAT32
    student = (
        Term("the block that learns, float32", learning + layer.beside * FLOAT32),
        Term("its gradients, moments and best", (COPIES - 1) * learning),
    )
    fusing = Term("its experts, while they are fused", learning)
    return (
        Phase("the original's layer", Amount.of(held, *teacher), kept),
        Phase("bringing the block in", Amount.of(held, student[0], fusing), kept),
        Phase("learning", Amount.of(held, *student, _step(case, layer)), kept),
    )


def _step(case: Case, layer: MoeLayer) -> Term:
    """Activations that a step keeps for its backward pass, or a look at what is held out takes without one."""
    block, hidden = case.work.block_tokens, case.pruned.hidden
    per_token = max(1, layer.top_k) * (5 * layer.width + 4 * hidden) + 8 * hidden
    looking = max(1, layer.top_k) * (3 * layer.width + 2 * hidden) + 4 * hidden
    rows = min(Settings.batch_blocks, case.work.distillation_blocks)
    most = max(rows * per_token, min(AT_ONCE, case.work.distillation_blocks) * looking)
    return Term("activations of a step", most * block * FLOAT32, Basis.ASSUMED)


def _operations(case: Case, tokens: int) -> Amount:
    """Each pod's pass of the original, and of the layers that learn: forward and backward, and looks at the rest."""
    held_out = tokens / HELD_OUT
    seen = (tokens - held_out) * case.work.distillation_epochs * (1 + _BACKWARD) + held_out * (1 + LOOKS)
    blocks = sum(layer.active for layer in case.pruned.layers.values())
    passes = case.work.distillation_shards * forward(case.original, tokens, case.work.block_tokens)
    return Amount.of(Term("the original's passes", passes), Term("learning", 2.0 * blocks * seen))


def _moved(case: Case) -> float:
    return case.original.bytes_on_disk + case.pruned.bytes_on_disk / case.work.distillation_shards


def _refuse_too_small(case: Case, limit: int) -> None:
    layer = case.pruned.largest
    least = max(
        least_limit(case.original, case.item, case.work.block_tokens, FEWEST_EXPERTS, LIBRARIES),
        LIBRARIES + (COPIES * layer.routed + layer.beside) * FLOAT32,
    )
    if limit < least:
        raise InputError(
            f"a distillation memory limit of {in_bytes(limit)} is too small for this model: some {in_bytes(least)} are "
            "needed for the libraries and a layer that learns"
        )
