"""What a run is asked to do: those of the pipeline's parameters that cost something."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeprune.budget import Budget
from moeprune.errors import InputError
from moeprune.methods import BASELINES, DEFAULT

LAYER_LOCAL, END_TO_END = "layer-local", "end-to-end"


@dataclass(frozen=True)
class Work:
    """Amounts of text and ways to go about it, under the names that `moeprune run` has for them.

    Attributes:
        budget: how much goes.
        options: of the method.
        memory limits: in bytes; None where there is none.
        evaluation_texts: how many there are, each of `evaluation_blocks`.
        how: `LAYER_LOCAL` or `END_TO_END`.

    Raises:
        InputError: a number below 1, or an unknown way to distill.
    """

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.5))
    method: str = DEFAULT
    options: dict[str, object] = field(default_factory=dict)
    baselines: tuple[str, ...] = tuple(BASELINES)
    block_tokens: int = 256
    calibration_blocks: int = 128
    calibration_shards: int = 1
    calibration_memory_limit: int | None = None
    trial_blocks: int = 8
    recovery_blocks: int = 128
    how: str = LAYER_LOCAL
    distillation_blocks: int = 384
    distillation_epochs: int = 4
    distillation_shards: int = 1
    distillation_memory_limit: int | None = None
    distillation_processes: int = 1
    gradient_checkpointing: bool = False
    evaluation_blocks: int = 32
    evaluation_texts: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1 and not name.endswith("limit"):
                raise InputError(f"{name.replace('_', ' ')}: {value}; it must be at least 1")
        if self.how not in (LAYER_LOCAL, END_TO_END):
            raise InputError(f"distillation goes {LAYER_LOCAL} or {END_TO_END}, not {self.how!r}")
