"""estimate: a model's config and headers, and what a run is to do -> what each step will need."""

from __future__ import annotations

from moeprune import places
from moeprune.checkpoint.surgery import check_fits
from moeprune.errors import InputError
from moeprune.estimation.anatomy import Anatomy
from moeprune.estimation.estimate import Estimate
from moeprune.estimation.estimate import estimate as add_up
from moeprune.estimation.expected_plan import expected_plan
from moeprune.estimation.headers import Described, describe
from moeprune.estimation.machines import gpu as known_gpu
from moeprune.estimation.machines import here
from moeprune.estimation.needs.case import Case
from moeprune.estimation.work import Work
from moeprune.plan import Plan
from moeprune.steps import machine


def estimate(
    model: str,
    work: Work,
    *,
    plan: str | None = None,
    gpu: str = "",
    trust_remote_code: bool = False,
) -> Estimate:
    """Say what a run will need. No weight is read.

    Args:
        model: the original.
        plan: address of a Plan to carry out; by default one of the size that the method will make.
        gpu: that each pod has, by its name in `machines.GPUS`; by default this machine is measured.

    Raises:
        InputError: a model that cannot be pruned, a plan for another, a budget or memory limit that cannot be kept, or
            an unknown GPU.
        ServiceError: S3 or the hub refuses, or cannot be reached.
    """
    machine.quieten()
    with describe(model, trust_remote_code) as described:
        original = Anatomy.of(described.checkpoint, described.elsewhere)
        decided = _plan(described, original, work, plan)
        case = Case(
            original,
            original.pruned(decided, described.checkpoint, described.elsewhere),
            decided,
            work,
            known_gpu(gpu) if gpu else here(original),
            is_here=not (places.is_remote(model) or places.is_on_hub(model)),
        )
        return add_up(case, model, described.is_stored)


def _plan(described: Described, original: Anatomy, work: Work, address: str | None) -> Plan:
    if address is None:
        return expected_plan(described.checkpoint, original, work.budget, work.method, work.options)
    if not described.is_stored:
        raise InputError("a plan is for one model's weights, and there is only a config here; leave --plan out")
    with places.local_file(address) as path:
        plan = Plan.load(path)
    check_fits(described.checkpoint, plan)
    return plan
