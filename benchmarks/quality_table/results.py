"""What was measured, put together: the cells of each row and amount, one for each draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from measuring import Spread

from quality_table.cells import Cell, Original
from quality_table.rows import Row

Place = tuple[Row, float, str]  # row, ratio, and what was calibrated on


@dataclass
class Results:
    """Everything that the table is made of.

    Attributes:
        original: the model itself.
        cells: by row, ratio and what was calibrated on; one for each draw.
        refused: why a row could not be cut so, in a sentence.
    """

    original: Original
    cells: dict[Place, list[Cell]] = field(default_factory=dict)
    refused: dict[Place, str] = field(default_factory=dict)

    def add(self, row: Row, cell: Cell) -> None:
        self.cells.setdefault((row, cell.key.ratio, cell.key.on), []).append(cell)

    def increase(self, cell: Cell, domain: str) -> float:
        """Of the loss over the original's, in nats per token."""
        return cell.quality[domain].loss_nats - self.original.quality[domain].loss_nats

    def mean_increase(self, cell: Cell) -> float:
        """Over the domains that it is judged on."""
        return mean(self.increase(cell, domain) for domain in cell.quality)

    def spread(self, place: Place, of: Callable[[Cell], float | None]) -> Spread | None:
        """Over the draws that have such a number; None where none has."""
        numbers = [number for cell in self.cells.get(place, []) if (number := of(cell)) is not None]
        return Spread.of(numbers) if numbers else None

    def ratios(self, rows: Sequence[Row], on: str) -> list[float]:
        """At which any of these rows was cut, ascending."""
        return sorted({ratio for row, ratio, place_on in self.cells if row in rows and place_on == on})


def speed(cell: Cell) -> float | None:
    """As a multiple of the original's; None where speed was not compared."""
    beside = cell.original_tokens_per_second
    return cell.tokens_per_second / beside if beside else None


def mean_accuracy(cell: Cell) -> float:
    """Over the domains that it is judged on."""
    return mean(quality.accuracy for quality in cell.quality.values())
