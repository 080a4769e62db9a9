"""Numbers that say where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Basis(StrEnum):
    """How much a number is worth, the best first."""

    COMPUTED = "computed"  # from the model's config and headers, and what the step does with them
    MEASURED = "measured"  # on this machine, or by a benchmark of the repository
    ASSUMED = "assumed"  # a rule of thumb


_ORDER = list(Basis)


@dataclass(frozen=True)
class Term:
    """One part of an amount: bytes, seconds or operations."""

    what: str
    value: float
    basis: Basis = Basis.COMPUTED


@dataclass(frozen=True)
class Amount:
    """A sum, with its terms."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, *terms: Term) -> Amount:
        """Without the terms that are nothing."""
        return cls(tuple(term for term in terms if term.value))

    @property
    def value(self) -> float:
        return sum(term.value for term in self.terms)

    @property
    def basis(self) -> Basis:
        """That of its weakest term."""
        return weakest(term.basis for term in self.terms)

    def __add__(self, other: Amount) -> Amount:
        return Amount((*self.terms, *other.terms))


NOTHING = Amount()


def weakest(bases: Iterable[Basis]) -> Basis:
    return max(bases, key=_ORDER.index, default=Basis.COMPUTED)


def largest(amounts: Sequence[Amount]) -> Amount:
    """The one of the greatest value: what several things take that come one after the other."""
    return max(amounts, key=lambda amount: amount.value, default=NOTHING)
