"""What pydantic says of a wrong value, as a part of our own sentences."""

from __future__ import annotations

from pydantic import ValidationError


def complaint(error: ValidationError) -> tuple[str, str]:
    """Where the first wrong value is, as a dotted path (empty: the whole), and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return where, "not known"
    return where, first["msg"].removeprefix("Value error, ")
