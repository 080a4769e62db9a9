"""How layers are trained."""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.distillation.objective import DEFAULT, Objective
from moeprune.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What a layer's training depends on, beside the layer and the text.

    Attributes:
        objective: of errors that a layer has.
        learning_rate: its peak, as a fraction of the weights' size (`rates`).
        epochs: times that each sequence is seen, at most.
        batch_blocks: sequences per step.
        seed: of the order in which they are seen.
    """

    objective: Objective = DEFAULT
    learning_rate: float = 0.03
    epochs: int = 4
    batch_blocks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.objective.layer_local:
            raise InputError(
                f"the objective {self.objective} needs the whole model; distill end to end (`--how end-to-end`), or "
                "ask for errors of a layer alone: experts, block"
            )
        if not self.learning_rate > 0 or self.epochs < 1 or self.batch_blocks < 1:
            raise InputError(
                f"a learning rate of {self.learning_rate:g}, {self.epochs} epochs, {self.batch_blocks} blocks per "
                "step: all must be above 0"
            )
