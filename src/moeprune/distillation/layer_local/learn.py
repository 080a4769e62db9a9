"""One block trained: AdamW on sequences in random order, the rate falling as a cosine, judged on sequences held out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from moeprune.distillation import rates
from moeprune.distillation.layer_local.lesson import Lesson
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.zeros import Zeros
from moeprune.errors import InputError

_WARM_UP = 0.05  # of the steps
_PATIENCE = 2  # times in a row that it may have got no better
_NOTHING_LOST = 1e-9


@dataclass(frozen=True)
class Outcome:
    """How training a block went.

    Attributes:
        before, after: the error on sequences held out. Where it got no better, the block is as it was, and they are
            equal.
        curve: the training error, step by step.
        seen: sequences that it was trained on, repetitions counted.
        reason: why it is as it was; empty where it got better, or where nothing had been lost.
    """

    before: float
    after: float
    curve: list[float]
    seen: int = 0
    reason: str = ""


def learn(
    lesson: Lesson,
    parameters: list[torch.nn.Parameter],
    train: torch.Tensor,
    held_out: torch.Tensor,
    settings: Settings,
    *,
    seed: int,
    keep_zeros: bool,
    on_step: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Train some parameters of a block, in place.

    Args:
        train, held_out: numbers of sequences.
        keep_zeros: whether weights that are zero stay so.
        on_step: called with how many steps are done, of `steps_of`.
    """
    with lesson.open():
        before = lesson.mean_error(held_out)
        if before < _NOTHING_LOST:
            return Outcome(before, before, [])
        best, least = _copy(parameters), before
        curve: list[float] = []
        diverged, since_best, seen = False, 0, 0
        steps = _Steps(parameters, steps_of(settings, len(train)), settings.learning_rate, keep_zeros)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(settings.epochs):
            order = train[torch.randperm(len(train), generator=generator)]
            for rows in order.split(settings.batch_blocks):
                curve.append(steps.take(lesson.error(rows)))
                seen += len(rows)
                on_step(len(curve))
                if diverged := not math.isfinite(curve[-1]):
                    break
            error = math.inf if diverged else lesson.mean_error(held_out)
            since_best += 1
            if error < least:
                best, least, since_best = _copy(parameters), error, 0
            if diverged or since_best == _PATIENCE:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    reason = "" if least < before else _reason(curve, settings, diverged)
    return Outcome(before, least, [error for error in curve if math.isfinite(error)], seen, reason)


def steps_of(settings: Settings, sequences: int) -> int:
    """Optimizer steps to train on so many sequences, at most."""
    return settings.epochs * -(-sequences // settings.batch_blocks)


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Steps:
    """The optimizer's."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], steps: int, learning_rate: float, keep_zeros: bool
    ) -> None:
        groups = rates.groups(parameters, learning_rate)
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        self._schedule = LambdaLR(self._optimizer, lambda step: rate_at(step, steps))
        if keep_zeros:
            Zeros(parameters).keep(self._optimizer)

    def take(self, error: torch.Tensor) -> float:
        """One step down; returns the error. Where it is not finite, nothing is changed."""
        if not error.requires_grad:
            raise InputError("nothing of what learns has a say in the objective; train other parts, or ask for `block`")
        value = float(error.detach())
        if math.isfinite(value):
            error.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._schedule.step()
        return value


def _copy(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _reason(curve: list[float], settings: Settings, diverged: bool) -> str:
    if diverged:
        return (
            f"training diverged at step {len(curve)}: the learning rate, {settings.learning_rate:g}, is too high; "
            "halve it"
        )
    tenth = max(1, len(curve) // 10)
    if sum(curve[-tenth:]) >= sum(curve[:tenth]):
        return (
            f"it did not get better on the text that it was trained on either: the learning rate, "
            f"{settings.learning_rate:g}, is too high; halve it"
        )
    return (
        "it got better only on the text that it was trained on: there is too little text for so many parameters; give "
        "more text, or train fewer of them"
    )
