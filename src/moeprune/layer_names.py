"""The names of layers: module paths such as `model.layers.10.mlp.experts`, and what people call them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def labels(layers: Sequence[str]) -> list[str]:
    """The number that tells these module paths apart; the whole paths where none does."""
    numbers = [re.findall(r"\d+", layer) for layer in layers]
    for place in range(min((len(each) for each in numbers), default=0)):
        found = [each[place] for each in numbers]
        if len(set(found)) == len(layers):
            return found
    return list(layers)
