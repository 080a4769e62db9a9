"""One block trained: AdamW on sequences in random order, the rate falling as a cosine, judged on sequences held out.

A rate that is too high for a layer shows at once: the block is worse than it was before it was trained. It is then put
back to the best that it has been, and goes on from there at half the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from moeprune.distillation import rates
from moeprune.distillation.layer_local.lesson import Lesson
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.zeros import Zeros
from moeprune.errors import InputError

_WARM_UP = 0.05  # of the steps
LOOKS = 8  # times that it is seen how far it has got
_PATIENCE = 3  # times in a row that it may have got no better
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
    sparse: Sequence[torch.nn.Parameter] = (),
    on_step: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Train some parameters of a block, in place.

    Args:
        train, held_out: numbers of sequences.
        sparse: those of them whose zeros stay zero.
        on_step: called with how many steps are done, of `steps_of`.
    """
    with lesson.open():
        before = lesson.mean_error(held_out)
        if before < _NOTHING_LOST:
            return Outcome(before, before, [])
        sample = train[: len(held_out)]
        sample_before, only_by_heart = lesson.mean_error(sample), False
        best, least, since_best = _copy(parameters), before, 0
        curve: list[float] = []
        seen, diverged = 0, False
        steps = _Steps(parameters, steps_of(settings, len(train)), settings.learning_rate, sparse)
        for rows in _batches(train, settings, seed):
            curve.append(steps.take(lesson.error(rows)))
            seen += len(rows)
            on_step(len(curve))
            if not math.isfinite(curve[-1]):
                diverged = True
                break
            if not steps.is_time_to_look:
                continue
            error = lesson.mean_error(held_out)
            if not math.isfinite(error):
                diverged = True
                break
            since_best += 1
            if error < least:
                best, least, since_best = _copy(parameters), error, 0
            elif error >= before:
                only_by_heart = lesson.mean_error(sample) < sample_before
                _put_back(parameters, best)
                steps.begin_again_slower()
                since_best = 0
            if since_best == _PATIENCE:
                break
    _put_back(parameters, best)
    reason = "" if least < before else _reason(len(curve), settings, diverged, only_by_heart)
    return Outcome(before, least, [error for error in curve if math.isfinite(error)], seen, reason)


def _batches(train: torch.Tensor, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    """Numbers of sequences, each once in an epoch, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        yield from train[torch.randperm(len(train), generator=generator)].split(settings.batch_blocks)


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
    """The optimizer's.

    Attributes:
        is_time_to_look: whether the last was one after which to see how far it has got.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        steps: int,
        learning_rate: float,
        sparse: Sequence[torch.nn.Parameter],
    ) -> None:
        groups = rates.groups(parameters, learning_rate)
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        self._pace = 1.0
        self._schedule = LambdaLR(self._optimizer, lambda step: self._pace * rate_at(step, steps))
        self._looks = {-(-look * steps // LOOKS) for look in range(1, LOOKS + 1)}
        if sparse:
            Zeros(sparse).keep(self._optimizer)

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

    @property
    def is_time_to_look(self) -> bool:
        return self._schedule.last_epoch in self._looks

    def begin_again_slower(self) -> None:
        """At half the rate, and without the momentum that has led astray."""
        self._pace /= 2
        self._optimizer.state.clear()


@torch.no_grad()
def _put_back(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _copy(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _reason(steps: int, settings: Settings, diverged: bool, only_by_heart: bool) -> str:
    rate = f"the learning rate, {settings.learning_rate:g}, is too high; halve it"
    if diverged:
        return f"training diverged at step {steps}: {rate}"
    if only_by_heart:
        return (
            "it got better only on the text that it was trained on: there is too little text for so many parameters; "
            "give more text, or train fewer of them"
        )
    return f"it got worse on the text that it was trained on, too: {rate}"
