"""The Report: what was measured, of the original and of each candidate, on the same inputs.

It is JSON on disk, versioned by its field `moeprune_report`. Whatever shows results (terminal, HTML page, MLflow, the
gate of promotion) reads this type and nothing else.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.validation import complaint

VERSION = 2


class _Record(BaseModel):
    # JSON has no infinity; a model that pruning destroyed may have an infinite perplexity, and the report must say so.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Quality(_Record):
    """How well one candidate predicts the held-out text of one domain."""

    loss_nats: float = Field(description="mean cross-entropy per predicted token, in nats")
    perplexity: float = Field(description="exp(loss_nats)")
    accuracy: float = Field(ge=0, le=1, description="share of next tokens predicted, 0 to 1")
    tokens: int = Field(gt=0, description="tokens predicted")


class Candidate(_Record):
    """One model that was measured."""

    name: str = Field(min_length=1, description="original, pruned, distilled, or the name of a baseline")
    address: str = Field(description="where the checkpoint is: local path, s3:// or hub id")
    weights: str = Field(description="which they are: see `checkpoint.identity.close_fingerprint`")
    method: str | None = Field(default=None, description="how its experts were chosen; null for the original")
    experts_per_layer: dict[str, int] = Field(description="experts module path -> experts it has")
    parameters: int = Field(gt=0)
    bytes_on_disk: int = Field(gt=0)
    peak_memory_bytes: int | None = Field(
        default=None, ge=0, description="above the interpreter's own; null: not measured"
    )
    tokens_per_second: float = Field(gt=0)
    quality: dict[str, Quality] = Field(description="domain name -> quality on it")

    @property
    def experts(self) -> int:
        """Routed experts in all layers together."""
        return sum(self.experts_per_layer.values())

    @property
    def experts_label(self) -> str:
        """Experts per layer for people: `16`, or `5-11 (mean 8.0)` where layers differ."""
        counts = self.experts_per_layer.values()
        if not counts:
            return "0"
        if min(counts) == max(counts):
            return str(max(counts))
        return f"{min(counts)}-{max(counts)} (mean {self.experts / len(counts):.1f})"


class DataSet(_Record):
    """The held-out text of one domain."""

    name: str
    address: str
    blocks: int
    tokens: int
    fingerprint: str


class Report(_Record):
    """What was measured. The first candidate is the original; ratios and increases are against it."""

    moeprune_report: Literal[2] = 2
    domain: str = Field(description="the domain that was pruned for, one of those measured")
    data: list[DataSet]
    candidates: list[Candidate] = Field(min_length=1)
    expert_use: dict[str, dict[str, list[float]]] = Field(
        default_factory=dict,
        description="domain -> experts module path -> share of routed tokens per expert, of the original",
    )
    machine: dict[str, str] = Field(default_factory=dict, description="device, dtype, threads, versions")

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) < len(names):
            raise ValueError(f"two candidates have the same name (names: {', '.join(names)})")
        measured = set(self.original.quality)
        if self.domain not in measured:
            raise ValueError(f"the domain '{self.domain}' was not measured (measured: {', '.join(sorted(measured))})")
        for candidate in self.candidates:
            if set(candidate.quality) != measured:
                raise ValueError(f"'{candidate.name}' was not measured on the same domains as '{self.original.name}'")
        return self

    @property
    def original(self) -> Candidate:
        return self.candidates[0]

    @property
    def headline(self) -> Candidate:
        """The candidate a run is about: the distilled one, else the pruned one, else the first after the original."""
        by_name = {candidate.name: candidate for candidate in self.candidates[1:]}
        first = self.candidates[min(1, len(self.candidates) - 1)]
        return by_name.get("distilled") or by_name.get("pruned") or first

    @property
    def domains(self) -> list[str]:
        """The measured domains, the pruned-for one first."""
        return [self.domain, *(domain for domain in self.original.quality if domain != self.domain)]

    @property
    def front(self) -> list[Candidate]:
        """The Pareto front of quality against size: those that no other is smaller and better than, by their size."""
        found: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda it: (it.bytes_on_disk, self._loss(it))):
            if math.isfinite(self._loss(candidate)) and (not found or self._loss(candidate) < self._loss(found[-1])):
                found.append(candidate)
        return found

    def _loss(self, candidate: Candidate) -> float:
        return candidate.quality[self.domain].loss_nats

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name. Raises InputError with the known names."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        known = ", ".join(candidate.name for candidate in self.candidates)
        raise InputError(f"The report has no candidate '{name}'; it has: {known}.")

    def condensed_layers(self, candidate: Candidate) -> int:
        """How many of the original's layers have no router any more."""
        return len(self.original.experts_per_layer) - len(candidate.experts_per_layer)

    def experts_label(self, candidate: Candidate) -> str:
        """The candidate's experts per layer for people, and in how many layers where not in all of the original's."""
        layers = f" in {len(candidate.experts_per_layer)} layers" if self.condensed_layers(candidate) else ""
        return candidate.experts_label + layers

    def bytes_ratio(self, candidate: Candidate) -> float:
        return candidate.bytes_on_disk / self.original.bytes_on_disk

    def parameters_ratio(self, candidate: Candidate) -> float:
        return candidate.parameters / self.original.parameters

    def speed_ratio(self, candidate: Candidate) -> float:
        return candidate.tokens_per_second / self.original.tokens_per_second

    def memory_ratio(self, candidate: Candidate) -> float | None:
        """None where either was not measured."""
        if not self.original.peak_memory_bytes or candidate.peak_memory_bytes is None:
            return None
        return candidate.peak_memory_bytes / self.original.peak_memory_bytes

    def loss_increase(self, candidate: Candidate, domain: str | None = None) -> float:
        """Nats per token above the original, on the pruned-for domain or the one named; negative is better."""
        domain = domain or self.domain
        return candidate.quality[domain].loss_nats - self.original.quality[domain].loss_nats

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        with write_beside(Path(path)) as beside:
            beside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote. Raises InputError for what is not a report or is of another version."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"Cannot read the report {path}: {error.strerror}. Give the JSON that evaluate wrote."
            ) from None
        except ValueError as error:  # not UTF-8, or not JSON
            raise InputError(
                f"{path} is not a report: it is not JSON ({error}). Give the JSON that evaluate wrote."
            ) from None
        if not isinstance(content, dict) or "moeprune_report" not in content:
            raise InputError(
                f"{path} is not a report: it has no field moeprune_report. Give the JSON that evaluate wrote."
            )
        version = content["moeprune_report"]
        if version != VERSION:
            raise InputError(
                f"{path} is a report of version {version!r}, and this moeprune reads version {VERSION}: "
                "evaluate again, or read it with the moeprune that wrote it."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            where, wrong = complaint(error)
            where = where or "the whole"
            raise InputError(f"The report {path} is damaged at {where}: {wrong}. Evaluate again.") from None
