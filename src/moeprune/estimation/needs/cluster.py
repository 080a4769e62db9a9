"""cluster: the Stats, of which one layer's are numbers at a time."""

from __future__ import annotations

from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need, Phase
from moeprune.estimation.statistics_size import bytes_of_layer
from moeprune.statistics.calibration import GROUPS


def need(case: Case) -> Need:
    stats = Term("Stats", case.stats_bytes)
    return Need(
        "cluster",
        (Phase("all", host=Amount.of(stats, as_numbers(case))),),
        disk=Amount.of(stats),
    )


def as_numbers(case: Case) -> Term:
    """One layer's sums as float64, twice: as they are and as whoever decides has scaled them."""
    hidden, statistics = case.original.hidden, case.statistics
    most = max(bytes_of_layer(layer, hidden, statistics, GROUPS) for layer in case.original.layers.values())
    return Term("a layer's Stats as numbers", most, Basis.ASSUMED)
