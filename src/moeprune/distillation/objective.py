"""What a student is asked for: errors of several kinds, each with its weight.

    experts   each expert's output against that of the teacher's own, on the tokens it receives (MoE-Pruner, arXiv
              2410.12013, section 3.3)
    block     what a whole MoE block puts out
    logits    the Kullback-Leibler divergence from the teacher's most probable next tokens
    text      the cross-entropy of the text itself

Only the first two can be had of a layer alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moeprune.errors import InputError

ERRORS = ("experts", "block", "logits", "text")
_WHOLE_NUMBERS = {"teacher_top"}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of errors.

    Attributes:
        experts, block, logits, text: weights, at least 0 and not all 0.
        temperature: by which both sides' logits are divided before they are compared.
        teacher_top: how many of the teacher's logits are compared for each token; the others count as one.

    Raises:
        InputError: a number that is none of these.
    """

    experts: float = 0.0
    block: float = 0.0
    logits: float = 0.0
    text: float = 0.0
    temperature: float = 1.0
    teacher_top: int = 64

    def __post_init__(self) -> None:
        weights = [getattr(self, name) for name in ERRORS]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise InputError(
                f"the objective {self} asks for nothing that can be had; give {_either(ERRORS)} a weight above 0, and "
                "none one below"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"the temperature of an objective must be above 0, not {self.temperature:g}")
        if self.teacher_top < 1:
            raise InputError(f"an objective compares at least 1 of the teacher's logits, not {self.teacher_top}")

    @classmethod
    def parse(cls, text: str) -> Objective:
        """`experts=1,text=0.5` or `logits=1,temperature=2,teacher_top=32`; what is not named is as by default.

        Raises:
            InputError: not of that form, an unknown name, or one twice.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.partition("="))
            if name not in known:
                names = ", ".join(field.name for field in fields(cls))
                raise InputError(f"{text!r} names {name!r}, which is no objective; known: {names}")
            if name in values:
                raise InputError(f"{text!r} names {name} twice; give it one weight")
            try:
                values[name] = int(number) if name in _WHOLE_NUMBERS else float(number)
            except ValueError as error:
                example = "64" if name in _WHOLE_NUMBERS else "0.5"
                raise InputError(
                    f"{part.strip()!r} in the objective {text!r} is not of the form NAME=NUMBER; write for example "
                    f"{name}={example}"
                ) from error
        return cls(**values)  # type: ignore[arg-type]  # teacher_top is a whole number

    def __str__(self) -> str:
        """As `parse` reads it, without what is as by default."""
        stated = [
            f"{field.name}={getattr(self, field.name):.12g}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(stated)

    @property
    def layer_local(self) -> bool:
        """Whether a layer's own input and output are all that is needed."""
        return not (self.logits or self.text)


DEFAULT = Objective(block=1.0)


def _either(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
