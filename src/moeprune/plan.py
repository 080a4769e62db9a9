"""Plan: the decision. What is kept of each layer, by which method and options, made from what.

A Plan is JSON that a person can read, diff, edit and replay; `moeprune apply` does what it says and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moeprune.atomic import write_beside
from moeprune.errors import InputError


class LayerPlan(BaseModel):
    """What becomes of one layer's routed experts.

    Attributes:
        experts: how many the original has.
        top_k: how many run for a token; at least as many must stay.
        keep: indices of those that stay, ascending.
    """

    model_config = ConfigDict(extra="forbid")

    experts: int
    top_k: int
    keep: list[int]

    @model_validator(mode="after")
    def _check(self) -> LayerPlan:
        if self.keep != sorted(set(self.keep)) or (self.keep and not 0 <= self.keep[0] <= self.keep[-1] < self.experts):
            raise ValueError(f"`keep` must be ascending, without repeats, and between 0 and {self.experts - 1}")
        if len(self.keep) < self.top_k:
            raise ValueError(f"{len(self.keep)} experts would stay, but {self.top_k} run for each token")
        return self

    @property
    def drop(self) -> list[int]:
        kept = set(self.keep)
        return [expert for expert in range(self.experts) if expert not in kept]


class Plan(BaseModel):
    """The decision for a whole model.

    Attributes:
        method, options: who decided, and with what.
        ratio: the fraction of all routed experts that goes.
        model: fingerprint of the model it was made for; it is applied to no other.
        data: fingerprint of the calibration data it was made from.
        layers: name of the experts module -> what becomes of it.
    """

    model_config = ConfigDict(extra="forbid")

    moeprune_plan: Literal[1] = 1
    method: str
    options: dict[str, Any]
    ratio: float
    model: str
    data: str
    layers: dict[str, LayerPlan]

    @property
    def keep(self) -> dict[str, list[int]]:
        return {name: layer.keep for name, layer in self.layers.items()}

    @property
    def experts_per_layer(self) -> dict[str, int]:
        return {name: len(layer.keep) for name, layer in self.layers.items()}

    @property
    def is_uniform(self) -> bool:
        return len(set(self.experts_per_layer.values())) == 1

    @property
    def removed(self) -> float:
        """The fraction of routed experts that really goes."""
        total = sum(layer.experts for layer in self.layers.values())
        return 1 - sum(self.experts_per_layer.values()) / total

    def save(self, path: Path) -> None:
        with write_beside(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises InputError: unreadable, of another version, or a decision that cannot be carried out."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the plan {path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path} is not a valid plan: {where + ': ' if where else ''}{first['msg']}") from error
