"""What is compared: a row is a method with options, recovered or not; it is cut at several amounts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.errors import InputError
from moeprune.methods import METHODS, find, parse_options
from moeprune.methods.sparse import UNSTRUCTURED
from moeprune.sparsity import parse_pattern

_MARK = "+recovery"


@dataclass(frozen=True)
class Row:
    """A line of the picture.

    Attributes:
        method: one of `METHODS`.
        given: its options that are not the defaults, as JSON.
        recovered: whether what stays is fitted after the cut, although the method itself does not ask for it.
    """

    method: str
    given: str = "{}"
    recovered: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        """`METHOD[:OPTION=VALUE,...][+recovery]`. Raises InputError: no such method or option."""
        rest = text.removesuffix(_MARK)
        method, _, options = rest.partition(":")
        given = dict(_option(part) for part in options.split(",") if part)
        parse_options(find(method), given)
        return cls(method, json.dumps(given), rest != text)

    @property
    def options(self) -> dict[str, Any]:
        """Those that were given."""
        return dict(json.loads(self.given))

    def options_for(self, draw: int) -> dict[str, Any]:
        """All of them, with the defaults. A method that draws lots draws others for another draw, unless told."""
        seed = {"seed": draw} if "seed" in find(self.method).options.model_fields else {}
        return dict(parse_options(find(self.method), seed | self.options).model_dump(mode="json"))

    @property
    def label(self) -> str:
        words = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return self.method + (f" ({words})" if words else "") + (" + recovery" if self.recovered else "")


@dataclass(frozen=True)
class Amounts:
    """The ratios to cut at, by what a method removes."""

    experts: Sequence[float]
    weights: Sequence[float]
    layers: Sequence[float]

    def of(self, row: Row) -> Sequence[float]:
        match find(row.method).removes:
            case "experts":
                return self.experts
            case "weights":
                return _of_pattern(row.options.get("pattern", UNSTRUCTURED)) or self.weights
            case "layers":
                return self.layers


def amount(row: Row, ratio: float) -> str:
    """In words: `50 % of the experts`."""
    return f"{100 * ratio:.3g} % of the {find(row.method).removes}"


def every_row() -> list[Row]:
    """Every method that is known here, with its defaults, and the variants that its readers ask for."""
    return [
        row for name in METHODS for row in (Row(name), *(Row(name, json.dumps(given)) for given in _variants(name)))
    ]


def _variants(method: str) -> list[dict[str, Any]]:
    if find(method).removes == "weights":
        return [{"pattern": "2:4"}]  # which hardware runs faster
    return []


def _of_pattern(pattern: str) -> list[float]:
    """The only ratio that zeros in a pattern N:M make; none for zeros that may lie anywhere."""
    if pattern == UNSTRUCTURED:
        return []
    parsed = parse_pattern(pattern)
    return [parsed[0] / parsed[1]] if isinstance(parsed, tuple) else []


def _option(part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise InputError(f"the option {part!r} of a method is written name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
