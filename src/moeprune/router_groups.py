"""Routers that choose among groups of experts before they choose experts, as DeepSeek-V3's does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterGroups:
    """Equal groups of neighbouring experts. They must stay equal: the router cuts its scores into equal pieces.

    Attributes:
        count: how many there are; 1 where the router chooses experts at once.
        chosen: from how many of them a token's experts are taken.
    """

    count: int = 1
    chosen: int = 1

    def least_kept(self, top_k: int) -> int:
        """As few experts as a layer can keep: enough in any `chosen` groups for the `top_k` that run for a token."""
        return -(-top_k // self.chosen) * self.count

    def whole(self, number: int) -> int:
        """A number of experts, rounded down to as many of each group."""
        return number // self.count * self.count

    def take(self, order: Iterable[int], number: int, experts: int) -> list[int]:
        """The first `number` of an order, the same number of each group.

        Args:
            order: experts, the first to be taken first.
            number: how many, a multiple of `count`.
            experts: how many experts the layer has.
        """
        left = [number // self.count] * self.count
        taken = []
        for expert in order:
            group = expert * self.count // experts
            if left[group]:
                left[group] -= 1
                taken.append(expert)
        return taken

    def of_each(self, chosen: Sequence[int], experts: int) -> list[int]:
        """How many of each group are among these experts."""
        numbers = [0] * self.count
        for expert in chosen:
            numbers[expert * self.count // experts] += 1
        return numbers


NO_GROUPS = RouterGroups()
