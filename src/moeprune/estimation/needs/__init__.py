"""What each step needs: a file for each, a function from the case to the step's need."""

from __future__ import annotations

from collections.abc import Callable

from moeprune.estimation.needs import (
    calibrate,
    cluster,
    distill,
    end_to_end,
    evaluate,
    global_prune,
    light,
    merge_distilled,
    merge_stats,
    promote,
)
from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need
from moeprune.estimation.work import END_TO_END


def needs_of(case: Case) -> list[Need]:
    """Of all steps of a run, in their order. Raises InputError where a memory limit is too small for this model."""
    distilling: list[Callable[[Case], Need]] = [light.spread, distill.need, merge_distilled.need]
    if case.work.how == END_TO_END:
        distilling = [end_to_end.need]
    steps = [
        light.prepare,
        calibrate.need,
        merge_stats.need,
        cluster.need,
        global_prune.need,
        *distilling,
        evaluate.need,
        promote.need,
    ]
    return [step(case) for step in steps]
