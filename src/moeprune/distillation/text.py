"""What is learnt from, and what is held out to judge by.

Axes: B sequences, S tokens of each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from moeprune.errors import InputError
from moeprune.statistics.stats import block_hash

HELD_OUT = 8  # one sequence of so many, and at least one


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids to learn from, and others to judge by: sequences of one length, without padding."""

    train_BS: torch.Tensor
    held_out_BS: torch.Tensor

    @classmethod
    def of(cls, ids_BS: torch.Tensor) -> Text:
        """Sequences in an order, and held out of them some, that are told by what they are, wherever they stand.

        Raises:
            InputError: there is nothing to hold out, or nothing besides.
        """
        if len(ids_BS) < 2:
            raise InputError(
                f"the text makes {len(ids_BS)} block of {ids_BS.shape[1]} tokens, and distillation needs at least 2, "
                "one of them to hold out; give more text or shorter blocks"
            )
        by_content = sorted(range(len(ids_BS)), key=lambda row: block_hash(ids_BS[row]))
        held = max(1, len(ids_BS) // HELD_OUT)
        return cls(ids_BS[by_content[held:]], ids_BS[by_content[:held]])

    def rows(self) -> torch.Tensor:
        """All of it, what is learnt from first: the order in which rows are counted."""
        return torch.cat([self.train_BS, self.held_out_BS])

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their order."""
        rows = (self.train_BS, self.held_out_BS)
        return hashlib.sha256(b"".join(repr(ids.shape).encode() + ids.numpy().tobytes() for ids in rows)).hexdigest()
