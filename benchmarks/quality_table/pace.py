"""How much is done, and how long the rest will take by what the like of it took."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import mean


class Pace:
    """Tells each piece of work on standard error as it ends.

    Args:
        kinds: of all the pieces that are to be done; those of a kind take about as long as each other.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self._left = Counter(kinds)
        self._total = self._left.total()
        self._took: dict[str, list[float]] = defaultdict(list)

    def done(self, kind: str, seconds: float, text: str) -> None:
        self._left[kind] -= 1
        self._took[kind].append(seconds)
        count = self._total - self._left.total()
        rest = f", {_duration(self.seconds_left)} left" if count < self._total else ""
        sys.stderr.write(f"{count}/{self._total} {text} ({_duration(seconds)}{rest})\n")
        sys.stderr.flush()

    @property
    def seconds_left(self) -> float:
        """A kind of which nothing is done yet is taken to be as the others."""
        overall = mean(seconds for each in self._took.values() for seconds in each)
        return sum(count * mean(self._took.get(kind) or [overall]) for kind, count in self._left.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
