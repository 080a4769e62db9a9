"""Tables from token to expert (hash routing): they name experts by number, and must go on doing so.

Axes: V tokens of the vocabulary, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def renumbered(
    table_VK: torch.Tensor, keep: list[int], experts: int, stand_ins: Mapping[int, int] | None = None
) -> torch.Tensor:
    """The table for the experts that stay, counted anew: `[V, K]`, of the same dtype.

    A token keeps those of its experts that stay. In place of one that goes it gets its stand-in, or where it has none,
    or the token has that one already, another that the token does not have yet: which one depends on the token's
    number, so that no expert is given more of them than the others.

    Args:
        stand_ins: experts that go -> experts that stay.
    """
    new_number_E = torch.full((experts,), -1, dtype=torch.int64)
    new_number_E[keep] = torch.arange(len(keep))
    stand_in_E = new_number_E.clone()
    for gone, stays in (stand_ins or {}).items():
        stand_in_E[gone] = new_number_E[stays]
    new_VK = new_number_E[table_VK.to(torch.int64)]
    token_V = torch.arange(len(new_VK))
    for slot in range(new_VK.shape[1]):
        other_V = stand_in_E[table_VK[:, slot].to(torch.int64)]
        free_V = (new_VK[:, slot] < 0) & (new_VK != other_V[:, None]).all(dim=1)
        new_VK[free_V, slot] = other_V[free_V]
    for slot in range(new_VK.shape[1]):
        for attempt in range(new_VK.shape[1]):  # so many suffice: the token has one expert less already
            other_V = (token_V * new_VK.shape[1] + slot + attempt) % len(keep)
            free_V = (new_VK[:, slot] < 0) & (new_VK != other_V[:, None]).all(dim=1)
            new_VK[free_V, slot] = other_V[free_V]
    return new_VK.to(table_VK.dtype)
