"""prepare, spread: a few lines of Python."""

from __future__ import annotations

from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need, Phase


def prepare(case: Case) -> Need:
    return Need("prepare", (Phase("all"),))


def spread(case: Case) -> Need:
    return Need("spread", (Phase("all"),))
