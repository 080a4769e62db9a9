"""evaluate: the original and every candidate on the same texts, each alone in a process of its own."""

from __future__ import annotations

from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.needs.case import FLOAT32, Case, converting, forward, on_its_way, one_pass, weights
from moeprune.estimation.needs.need import LIBRARIES, Need, Phase
from moeprune.evaluation.measure import BATCH_BLOCKS

_OF_A_ROW = 3  # times that a block's logits are there in float32: as they are, as shares, and compared
_ADVICE = "evaluate needs the whole model in memory: a pod with more, or more GPUs"


def need(case: Case) -> Need:
    work, original = case.work, case.original
    candidates = 2 + len(work.baselines)  # as pruned, as distilled
    rows = min(BATCH_BLOCKS, work.evaluation_blocks)
    model, fusing = weights(original, case.item, "the original"), converting(original, case.item)
    logits = Term(
        "logits",
        original.vocabulary * work.block_tokens * (rows * case.item + _OF_A_ROW * FLOAT32),
    )
    passes = Amount.of(model, one_pass(original, rows * work.block_tokens, case.item), logits)
    servers = Amount.of(Term("the processes that start and measure", 2 * LIBRARIES, Basis.ASSUMED))
    phases = (
        Phase("loading", Amount.of(model, fusing), servers, on_its_way(case, original)),
        Phase("measuring", passes, servers),
    )
    tokens = work.evaluation_texts * work.evaluation_blocks * work.block_tokens
    every = Term("pruned models and baselines", candidates * case.pruned.bytes_on_disk)
    return Need(
        "evaluate",
        phases,
        disk=Amount.of(case.brought, every),
        operations=Amount.of(
            Term(
                "the original, twice: to measure it, and to count who is used",
                2 * forward(original, tokens, work.block_tokens, head=True),
            ),
            Term("the candidates", candidates * forward(case.pruned, tokens, work.block_tokens, head=True)),
        ),
        moved=Amount.of(Term("all models", original.bytes_on_disk + every.value)),
        computes=True,
        spreads=True,
        advice=_ADVICE,
    )
