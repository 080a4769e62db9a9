"""Plan: the decision. What becomes of each layer, by which method and options, made from what.

A Plan is JSON that a person can read, diff, edit and replay; `moeprune apply` does what it says and nothing else. It
holds decisions and no weights: where carrying one out takes numbers (a dropped expert's mean output, the energy of a
weight's inputs), they come from the Stats that the Plan names by their fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.sparsity import ENERGY, Score, parse_pattern
from moeprune.validation import complaint


class LayerPlan(BaseModel):
    """What becomes of one layer's routed experts.

    Attributes:
        experts: how many the original has.
        top_k: how many run for a token; at least as many must stay.
        keep: indices of those that stay, ascending.
        merged: of those that stay, the ones that become a weighted mean of experts, and its weights, by expert.
        merged_router: whether their rows in the router become such means, too.
        stands_for: of those that stay, the ones that recovery makes of themselves and of others, which go.
        constant: of those that go, the ones that the router may still choose; in their place stands their mean output.
        condensed: where the layer loses its router: the experts that run for every token, and what each is multiplied
            by. They are those in `keep`, and may be fewer than `top_k`.
        shared_scale: where it does, what the shared experts' output is multiplied by.
        scores: what each expert was worth to the method, where it has such a number; only for people to look at.
    """

    model_config = ConfigDict(extra="forbid")

    experts: int
    top_k: int
    keep: list[int]
    merged: dict[int, dict[int, float]] = {}
    merged_router: bool = False
    stands_for: dict[int, list[int]] = {}
    constant: list[int] = []
    condensed: dict[int, float] | None = None
    shared_scale: float = 1.0
    scores: list[float] | None = None

    @model_validator(mode="after")
    def _check(self) -> LayerPlan:
        if self.keep != sorted(set(self.keep)) or (self.keep and not 0 <= self.keep[0] <= self.keep[-1] < self.experts):
            raise ValueError(f"`keep` must be ascending, without repeats, and between 0 and {self.experts - 1}")
        if self.condensed is None and len(self.keep) + len(self.constant) < self.top_k:
            raise ValueError(f"{len(self.keep)} experts would stay, but {self.top_k} run for each token")
        if self.condensed is not None and (self.keep != sorted(self.condensed) or self.merged or self.constant):
            raise ValueError("a condensed layer keeps the experts of `condensed`, and merges or replaces none")
        if self.condensed is None and self.shared_scale != 1:
            raise ValueError("`shared_scale` is of a condensed layer")
        if not self.merged.keys() <= set(self.keep):
            raise ValueError("`merged` names experts that do not stay")
        if any(not 0 <= member < self.experts for weights in self.merged.values() for member in weights):
            raise ValueError(f"the experts of `merged` must be between 0 and {self.experts - 1}")
        if any(min(weights.values(), default=0) < 0 or not sum(weights.values()) for weights in self.merged.values()):
            raise ValueError("the weights of `merged` must not be negative, and some must be above 0")
        stood_for = [expert for others in self.stands_for.values() for expert in others]
        if not self.stands_for.keys() <= set(self.keep) or len(set(stood_for)) < len(stood_for):
            raise ValueError("`stands_for` names experts that do not stay, or one that goes twice")
        if not set(stood_for) <= set(self.drop):
            raise ValueError("`stands_for` names experts that do not go in place of some that stay")
        if not set(self.constant) <= set(self.drop):
            raise ValueError("`constant` names experts that do not go")
        if self.scores is not None and len(self.scores) != self.experts:
            raise ValueError(f"`scores` must have {self.experts} numbers, one for each expert")
        return self

    @property
    def choosable(self) -> list[int]:
        """Those that the router can choose: the experts that stay, and the constants in others' places."""
        return sorted([*self.keep, *self.constant])

    @property
    def drop(self) -> list[int]:
        kept = set(self.keep)
        return [expert for expert in range(self.experts) if expert not in kept]


class Sparsity(BaseModel):
    """Which weights inside the experts become zero.

    Attributes:
        pattern: `0.5` for that fraction of each output row's weights, or `2:4` for two of every four that follow each
            other along the input.
        score: how weights are ranked; the lowest go (`moeprune.sparsity`).
    """

    model_config = ConfigDict(extra="forbid")

    pattern: str
    score: Score

    @field_validator("pattern")
    @classmethod
    def _check(cls, pattern: str) -> str:
        parse_pattern(pattern)
        return pattern


class Recovery(BaseModel):
    """How what stays is fitted, after the cut, to what the original puts out (`recovery`).

    Attributes:
        router: whether the router's rows are fitted, too.
    """

    model_config = ConfigDict(extra="forbid")

    router: bool = True


class Plan(BaseModel):
    """The decision for a whole model.

    Attributes:
        method, options: who decided, and with what.
        ratio: how much goes: the fraction of all routed experts, or what else the method counts by.
        budget: what was asked for, in words, where the ratio follows from it.
        score: what the layers' `scores` are, in words.
        sparsity: of the experts that stay.
        recovery: of the experts that stay.
        model: fingerprint of the model it was made for; it is applied to no other.
        data: fingerprint of the calibration data it was made from.
        layers: name of the experts module -> what becomes of it.
    """

    model_config = ConfigDict(extra="forbid")

    moeprune_plan: Literal[2] = 2
    method: str
    options: dict[str, Any]
    ratio: float
    budget: str = ""
    score: str = ""
    sparsity: Sparsity | None = None
    recovery: Recovery | None = None
    model: str
    data: str
    layers: dict[str, LayerPlan]

    @property
    def keep(self) -> dict[str, list[int]]:
        return {name: layer.keep for name, layer in self.layers.items()}

    @property
    def condensed(self) -> dict[str, LayerPlan]:
        """The layers that lose their router."""
        return {name: layer for name, layer in self.layers.items() if layer.condensed is not None}

    @property
    def experts_per_layer(self) -> dict[str, int]:
        """Of the layers that still have a router."""
        return {name: len(layer.keep) for name, layer in self.layers.items() if layer.condensed is None}

    @property
    def is_uniform(self) -> bool:
        return len(set(self.experts_per_layer.values())) <= 1

    @property
    def needs_code(self) -> bool:
        """Whether what it makes is of no architecture that transformers has."""
        return not self.is_uniform or any(layer.constant for layer in self.layers.values())

    @property
    def removed(self) -> float:
        """The fraction of routed experts that really goes."""
        total = sum(layer.experts for layer in self.layers.values())
        return 1 - sum(map(len, self.keep.values())) / total

    @property
    def takes_stats(self) -> bool:
        """Whether carrying it out takes numbers from the Stats that it was made from."""
        ranked = self.sparsity is not None and bool(ENERGY[self.sparsity.score])
        return ranked or any(layer.constant for layer in self.layers.values())

    def to_json(self) -> str:
        """As it is written: without what it does not decide."""
        stated = {"moeprune_plan": self.moeprune_plan, **self.model_dump(mode="json", exclude_defaults=True)}
        return json.dumps(stated, indent=1) + "\n"

    def save(self, path: Path) -> None:
        with write_beside(path) as beside:
            beside.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises InputError: unreadable, of another version, or a decision that cannot be carried out."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the plan {path} cannot be read ({error}); make one with `moeprune plan make`") from error
        except ValidationError as error:
            where, wrong = complaint(error)
            if where == "moeprune_plan":
                wrong = "it was made by another version of moeprune; make it again with `moeprune plan make`"
            raise InputError(f"{path} is not a valid plan: {where + ': ' if where else ''}{wrong}") from error
