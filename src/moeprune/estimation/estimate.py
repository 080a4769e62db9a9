"""The needs of all steps as numbers, with where each comes from: the estimate that is shown, written and handed on."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moeprune.budget import Budget
from moeprune.estimation.amounts import NOTHING, Amount, Basis, Term, weakest
from moeprune.estimation.anatomy import Anatomy
from moeprune.estimation.machines import USABLE, Machine
from moeprune.estimation.needs import needs_of
from moeprune.estimation.needs.case import Case
from moeprune.estimation.needs.need import Need
from moeprune.estimation.units import in_bytes

_START_SECONDS = 15  # of a pod's Python, until the libraries are there


class Part(BaseModel):
    """One term of a number."""

    what: str
    value: float
    basis: Basis


class Number(BaseModel):
    """Bytes or seconds.

    Attributes:
        basis: that of its weakest part.
        parts: what it is the sum of.
    """

    value: float
    basis: Basis
    parts: list[Part]

    @classmethod
    def of(cls, amount: Amount) -> Number:
        parts = [Part(what=term.what, value=term.value, basis=term.basis) for term in amount.terms]
        return cls(value=amount.value, basis=amount.basis, parts=parts)


class Step(BaseModel):
    """What a step of the pipeline needs.

    Attributes:
        pods: that do it side by side.
        gpus: of each pod.
        memory: bytes of each pod's memory.
        gpu_memory: bytes of all GPUs of a pod together.
        disk: bytes that each pod brings to its disk and writes there.
        seconds: of each pod, where all of them run at once.
    """

    name: str
    pods: int
    gpus: int
    memory: Number
    gpu_memory: Number
    disk: Number
    seconds: Number


class Model(BaseModel):
    """Attributes: parameters in memory; those that a token is multiplied with; bytes of all files."""

    parameters: int
    active_parameters: int
    bytes_on_disk: int
    experts: int


class Estimate(BaseModel):
    """Everything.

    Attributes:
        model: address of the original.
        method, budget: the plan's.
        machine: what each pod is taken to be.
        speed: what its speed is known from.
        warnings: what does not fit, or will be slow, and what to do.
    """

    model_config = ConfigDict(extra="forbid")

    moeprune_estimate: Literal[1] = 1
    model: str
    method: str
    budget: str
    machine: str
    speed: str
    original: Model
    pruned: Model
    steps: list[Step]
    warnings: list[str]

    @property
    def seconds(self) -> float:
        """Of the whole run, where all pods of a step run at once."""
        return sum(step.seconds.value for step in self.steps)

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)


def estimate(case: Case, model: str, stored: bool) -> Estimate:
    """Add everything up.

    Args:
        model: the original's address.
        stored: whether its headers are its own, and not what its config implies.

    Raises:
        InputError: a memory limit is too small.
    """
    needs = needs_of(case)
    steps = [_step(need, case.machine) for need in needs]
    warnings = [
        warning for need, step in zip(needs, steps, strict=True) if (warning := _too_large(need, step, case.machine))
    ]
    if not stored:
        warnings.append("there are no weights beside this config: sizes are those that transformers would save")
    computes, reads = case.machine.computes, case.machine.reads
    return Estimate(
        model=model,
        method=case.plan.method,
        budget=case.plan.budget or str(Budget(ratio=case.plan.ratio)),
        machine=case.machine.name,
        speed=f"{computes.value / 1e9:,.0f} GFLOP/s ({computes.basis}: {computes.why}), weights read at "
        f"{reads.value / 1e9:.2g} GB/s ({reads.basis}: {reads.why})",
        original=_model(case.original),
        pruned=_model(case.pruned),
        steps=steps,
        warnings=warnings,
    )


def _model(anatomy: Anatomy) -> Model:
    return Model(
        parameters=anatomy.parameters,
        active_parameters=anatomy.active,
        bytes_on_disk=anatomy.bytes_on_disk,
        experts=sum(layer.experts for layer in anatomy.layers.values()),
    )


def _step(need: Need, machine: Machine) -> Step:
    gpu_memory = need.gpu_memory() if machine.gpu_memory else NOTHING
    gpus = _gpus(need, gpu_memory.value, machine)
    return Step(
        name=need.step,
        pods=need.pods,
        gpus=gpus,
        memory=Number.of(need.memory(gpus)),
        gpu_memory=Number.of(gpu_memory),
        disk=Number.of(need.disk),
        seconds=Number.of(_seconds(need, machine, gpus)),
    )


def _gpus(need: Need, memory: float, machine: Machine) -> int:
    if not machine.gpu_memory or not need.computes:
        return 0
    return max(need.processes, math.ceil(memory / (USABLE * machine.gpu_memory)) if need.spreads else 1)


def _seconds(need: Need, machine: Machine, gpus: int) -> Amount:
    """Layers that lie on several GPUs take turns: only processes make it faster."""
    rate = machine.computes.value * (need.processes if gpus else 1)
    terms = [
        Term(term.what, term.value / need.pods / rate, weakest([term.basis, machine.computes.basis]))
        for term in need.operations.terms
    ]
    moved = need.moved.value / machine.reads.value
    return Amount.of(
        Term("starting", _START_SECONDS, Basis.ASSUMED), Term("reading weights", moved, machine.reads.basis), *terms
    )


def _too_large(need: Need, step: Step, machine: Machine) -> str:
    """In words, where a step's GPUs are too small for it."""
    room = step.gpus * USABLE * machine.gpu_memory
    if step.gpu_memory.value <= room:
        return ""
    return (
        f"{need.step} needs {in_bytes(step.gpu_memory.value)} of GPU memory and cannot use more than {step.gpus} of "
        f"these GPUs, {in_bytes(room)}: {need.advice}"
    )
