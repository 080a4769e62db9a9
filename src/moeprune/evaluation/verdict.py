"""What the table of results says, in words and numbers: one content for the terminal (table.py) and the page (page.py).

Text is ASCII only, because a terminal or a pipe may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeprune.evaluation.report import Candidate, Report

Tone = Literal["better", "worse", "same"]

# Timings and memory differ from run to run by about this much; a smaller change is not called better or worse.
NOISE = 0.02


@dataclass(frozen=True)
class Cell:
    value: str
    change: str = ""  # against the original; empty for the original itself
    tone: Tone = "same"


@dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...]  # one per candidate, in the report's order


@dataclass(frozen=True)
class Group:
    title: str  # empty for what is not about a domain
    pruned_for: bool
    rows: tuple[Row, ...]


def verdict(report: Report) -> list[Group]:
    """Size and speed, then quality on each domain, the pruned-for domain first."""
    return [_resources(report), *(_quality(report, domain) for domain in report.domains)]


def number(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, thousands separated: 0.123, 11.8, 9,120."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e9:
        return f"{value:.{digits - 1}e}"
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.0999 is 0.100
    return f"{value:,.{min(max(digits - 1 - magnitude, 0), digits)}f}"


def change(ratio: float) -> str:
    """A ratio to the original as people say it: `-46.7%`, `+180%`, `x24`."""
    if not math.isfinite(ratio):
        return ""
    if ratio >= 10:
        return f"x{number(ratio, 2)}"
    percent = (ratio - 1) * 100
    text = f"{percent:+.0f}" if abs(percent) >= 100 else f"{percent:+.1f}"
    return "0.0%" if float(text) == 0 else f"{text}%"


def _in_unit(counts: list[int | None], units: tuple[tuple[float, str], ...]) -> tuple[list[str], str]:
    """The counts in one unit, the largest that the first (the original's) fills, and that unit."""
    first = counts[0] or 0
    factor, unit = next((each for each in units if first >= each[0]), units[-1])
    return ["-" if count is None else number(count / factor) for count in counts], unit


def _tone(ratio: float, lower_is_better: bool, noise: float) -> Tone:
    if not abs(ratio - 1) > noise:  # also where it is not a number
        return "same"
    return "better" if (ratio < 1) == lower_is_better else "worse"


def _resources(report: Report) -> Group:
    candidates = report.candidates

    def row(
        label: str, values: list[str], ratio: Callable[[Candidate], float | None], lower: bool, noise: float
    ) -> Row:
        cells = [Cell(values[0])]
        for value, candidate in zip(values[1:], candidates[1:], strict=True):
            against = ratio(candidate)
            cells.append(Cell(value) if against is None else Cell(value, change(against), _tone(against, lower, noise)))
        return Row(label, tuple(cells))

    experts = Row("experts per layer", tuple(Cell(report.experts_label(candidate)) for candidate in candidates))
    parameters, parameters_unit = _in_unit([c.parameters for c in candidates], ((1e9, "B"), (1e6, "M"), (1e3, "K")))
    disk, disk_unit = _in_unit([c.bytes_on_disk for c in candidates], ((1e9, "GB"), (1e6, "MB")))
    memory, memory_unit = _in_unit([c.peak_memory_bytes for c in candidates], ((2.0**30, "GiB"), (2.0**20, "MiB")))
    speed = [number(candidate.tokens_per_second) for candidate in candidates]
    rows = (
        experts,
        row(f"parameters, {parameters_unit}", parameters, report.parameters_ratio, True, 0),
        row(f"on disk, {disk_unit}", disk, report.bytes_ratio, True, 0),
        row(f"peak memory, {memory_unit}", memory, report.memory_ratio, True, NOISE),
        row("tokens per second", speed, report.speed_ratio, False, NOISE),
    )
    return Group("", pruned_for=False, rows=rows)


def _quality(report: Report, domain: str) -> Group:
    original = report.original.quality[domain]
    perplexity = [Cell(number(original.perplexity, 4))]
    accuracy = [Cell(number(100 * original.accuracy))]
    for candidate in report.candidates[1:]:
        quality = candidate.quality[domain]
        ratio = quality.perplexity / original.perplexity
        perplexity.append(Cell(number(quality.perplexity, 4), change(ratio), _tone(ratio, True, 0.0005)))
        points = round(100 * (quality.accuracy - original.accuracy), 1)
        tone: Tone = "same" if points == 0 else "better" if points > 0 else "worse"
        accuracy.append(Cell(number(100 * quality.accuracy), f"{points:+.1f}pt" if points else "0.0pt", tone))
    rows = (Row("perplexity", tuple(perplexity)), Row("accuracy, %", tuple(accuracy)))
    return Group(domain, pruned_for=domain == report.domain, rows=rows)
