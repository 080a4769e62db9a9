"""merge-distilled: the pruned model written again, with what each layer has learnt, a layer in memory at a time."""

from __future__ import annotations

from moeprune.estimation.amounts import Amount, Term
from moeprune.estimation.needs.case import FLOAT32, Case
from moeprune.estimation.needs.need import Need, Phase


def need(case: Case) -> Need:
    pruned, layer = case.pruned, case.pruned.largest
    learnt = Term("what layers have learnt", pruned.routed * FLOAT32)
    written = Term("the pruned model, before and after", 2 * pruned.bytes_on_disk)
    of_layer = Term("a layer, as it was learnt and as it is stored", 2 * (layer.routed + layer.beside) * FLOAT32)
    return Need(
        "merge-distilled",
        (Phase("all", host=Amount.of(of_layer)),),
        disk=Amount.of(learnt, written),
        moved=Amount.of(Term("parts and model", learnt.value + written.value)),
    )
