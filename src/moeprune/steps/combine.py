"""combine: methods and ratios -> each method at each ratio, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moeprune.errors import InputError
from moeprune.methods import find, parse_options


class Choice(NamedTuple):
    """A method, with its options, at a ratio."""

    method: str
    ratio: float
    options: dict[str, Any]


def combine(
    methods: Sequence[str], ratios: Sequence[float], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Choice]:
    """Every method at every ratio.

    Args:
        options: method -> its options by name.

    Raises:
        InputError: a method or option is not known, a ratio makes no sense, one is there twice, or there is none.
    """
    given = options or {}
    for what, values in (("method", methods), ("ratio", ratios)):
        if not values:
            raise InputError(f"a sweep needs at least one {what}")
        if len(set(values)) < len(values):
            raise InputError(f"a {what} is there twice: {', '.join(map(str, values))}")
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise InputError(f"a ratio is at least 0 and below 1, not {ratio:g}")
    for method in methods:
        parse_options(find(method), dict(given.get(method, {})))
    if unknown := given.keys() - set(methods):
        raise InputError(f"there are options for {', '.join(sorted(unknown))}, which is not among the methods")
    return [Choice(method, float(ratio), dict(given.get(method, {}))) for method in methods for ratio in ratios]
