"""Addresses of text: one source, or several with their weights, in one argument.

code.jsonl*3,prose.txt          three blocks of code for each of prose; a weight that is not given is 1
odd%2Cname.txt                  a comma, a star or a percent sign that belongs to a name: %2C, %2A, %25
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import PurePosixPath

from moeprune.errors import InputError

_ESCAPED = {"%": "%25", ",": "%2C", "*": "%2A"}
_UNESCAPED = {code: character for character, code in _ESCAPED.items()}


@dataclass(frozen=True)
class Source:
    """One source of text, and how much of a mixture it gives."""

    address: str
    weight: float = 1


def parse_sources(mixture: str) -> list[Source]:
    """The sources that an argument names.

    Raises:
        InputError: it names none, or a weight is not a positive number.
    """
    sources = [_parse(part.strip()) for part in mixture.split(",") if part.strip()]
    if not sources:
        raise InputError("no data was named")
    return sources


def _parse(part: str) -> Source:
    address, star, given = part.rpartition("*")
    if not star:
        return Source(_unescape(part))
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf or not address:
        raise InputError(
            f"the weight in {part!r} must be a positive number, as in mine.jsonl*3; a star in a name is written %2A"
        )
    return Source(_unescape(address.strip()), weight)


def format_sources(sources: list[Source]) -> str:
    """The argument that names these sources."""
    return ",".join(_escape(each.address) + (f"*{each.weight:g}" if each.weight != 1 else "") for each in sources)


def with_addresses(mixture: str, change: Callable[[str], str]) -> str:
    """The same mixture, its addresses changed."""
    return format_sources([replace(source, address=change(source.address)) for source in parse_sources(mixture)])


def shares(sources: list[Source], blocks: int) -> list[int]:
    """How many of so many blocks each source gives: in proportion to the weights, by the largest remainder.

    Raises:
        InputError: a source would give none.
    """
    total = sum(Fraction(source.weight) for source in sources)
    exact = [blocks * Fraction(source.weight) / total for source in sources]
    whole = [int(share) for share in exact]
    by_remainder = sorted(
        range(len(sources)), key=lambda place: whole[place] - exact[place]
    )  # the first of equals first
    for place in by_remainder[: blocks - sum(whole)]:
        whole[place] += 1
    for source, share in zip(sources, whole, strict=True):
        if share == 0:
            raise InputError(
                f"{len(sources)} sources cannot share {blocks} blocks by their weights: none would be of "
                f"{source.address}; allow more blocks, or name fewer sources"
            )
    return whole


def short_name(address: str) -> str:
    """What a table calls a source: the built-in domain, the file's bare name, or the last part of the hub id."""
    if address.startswith("builtin://"):
        return address.removeprefix("builtin://").split("/")[0]
    return PurePosixPath(address).name.split(".")[0]


def mixture_name(mixture: str) -> str:
    """What a table calls a mixture: the names of its sources."""
    return "+".join(short_name(source.address) for source in parse_sources(mixture))


def _escape(address: str) -> str:
    return re.sub(r"%(?=2[5AaCc])|[,*]", lambda found: _ESCAPED[found[0]], address)


def _unescape(address: str) -> str:
    return re.sub(r"%2[5ac]", lambda found: _UNESCAPED[found[0].upper()], address, flags=re.IGNORECASE)
