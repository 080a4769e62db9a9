"""promote: the distilled model, sent to the registry."""

from __future__ import annotations

from moeprune.estimation.amounts import Amount, Term
from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need, Phase


def need(case: Case) -> Need:
    model = Amount.of(Term("the distilled model", case.pruned.bytes_on_disk))
    return Need("promote", (Phase("all"),), disk=model, moved=model)
