"""merge-stats: the Stats of all shards in memory, and their sum."""

from __future__ import annotations

from moeprune.estimation.amounts import Amount, Term
from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need, Phase


def need(case: Case) -> Need:
    shards, size = case.work.calibration_shards, case.stats_bytes
    parts, whole = Term("Stats of all shards", shards * size), Term("their sum", size)
    return Need("merge-stats", (Phase("all", host=Amount.of(parts, whole)),), disk=Amount.of(parts, whole))
