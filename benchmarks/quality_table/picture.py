"""Quality against size: a line for each row, from the original to the smallest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from measuring import Spread

from moeprune.evaluation import drawing
from moeprune.methods import find
from quality_table.results import Results
from quality_table.rows import Row
from quality_table.texts import MIXTURE

_TICKS = (-2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
_LINEAR = 0.05  # nats; below it the scale is even, far above it each doubling takes the same room
_HEIGHT = 6.4  # inches
_LABEL_HEIGHT = 0.035  # of the panel
_DASHES = ("-", "--", ":")
_AS_LARGE = 0.97  # of the original's size

_LEFT_ROOM = 0.3  # of the panel's sizes, left of the original, for the names of what is as large as it is

Point = tuple[float, Spread]  # size as a share of the original's; increase of the loss over the draws


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str
    line: str | None  # None: a single point


@drawing.styled
def quality_and_size(results: Results, rows: Sequence[Row], title: str) -> Figure:
    """The mean increase of the loss over the domains; bars are the least and the most over the draws.

    Rows that remove experts are lines from the original on, named at their ends; others are single points.
    """
    points = {row: found for row in rows if (found := _points(results, row))}
    looks = _looks(list(points))
    figure = drawing.sheet(_HEIGHT)
    axes = figure.subplots()
    axes.set_yscale("asinh", linear_width=_LINEAR)
    axes.axhline(0, color=drawing.INK, linewidth=1.2, zorder=1)
    for row, found in points.items():
        _draw(axes, found, looks[row])
    axes.set_title(title)
    axes.set_xlabel("bytes on disk, of the original's (further right is smaller)")
    axes.set_ylabel("loss above the original's, mean of the domains, nats per token\n(further down is better)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(x=0.03, y=0.04)
    least, most = axes.get_xlim()
    ends = {row: found[-1] for row, found in points.items()}
    as_large = [row for row in ends if looks[row].line is None and ends[row][0] > _AS_LARGE]
    axes.set_xlim(most + _LEFT_ROOM * (most - least) if as_large else most, least)
    axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick <= min(most, 1)])
    axes.grid()
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "the original")
    _name(axes, {row.label: (looks[row], ends[row]) for row in ends if looks[row].line}, at_the_right=True)
    _name(axes, {row.label: (looks[row], ends[row]) for row in as_large}, at_the_right=False)
    others = [row for row in ends if looks[row].line is None and row not in as_large]
    drawing.label_points(figure, axes, [(row.label, *_middle(ends[row])) for row in others], fontsize=8.5)
    return figure


def _looks(rows: Sequence[Row]) -> dict[Row, _Look]:
    """Lines are told apart by colour, then by dashes; points, each of which has its name beside it, by what goes."""
    lines = [row for row in rows if find(row.method).removes == "experts"]
    looks = {row: _Look(drawing.INK, "X" if find(row.method).removes == "layers" else "D", None) for row in rows}
    for place, row in enumerate(lines):
        again, colour = divmod(place, len(drawing.SERIES))
        looks[row] = _Look(drawing.SERIES[colour], drawing.MARKERS[again], _DASHES[again % len(_DASHES)])
    return looks


def _points(results: Results, row: Row) -> list[Point]:
    """Of one row, the largest first."""
    found = []
    for ratio in results.ratios([row], MIXTURE):
        place = (row, ratio, MIXTURE)
        size = results.spread(place, lambda cell: cell.bytes_on_disk / results.original.bytes_on_disk)
        increase = results.spread(place, results.mean_increase)
        assert size
        assert increase
        found.append((size.median, increase))
    return sorted(found, key=lambda point: -point[0])


def _middle(point: Point) -> tuple[float, float]:
    size, increase = point
    return size, increase.median


def _draw(axes: Axes, points: Sequence[Point], look: _Look) -> None:
    at = [_middle(point) for point in points]
    if look.line:
        axes.plot(*zip((1.0, 0.0), *at, strict=True), look.line, color=look.colour, linewidth=1.4, zorder=2)
    below = [increase.median - increase.least for _, increase in points]
    above = [increase.most - increase.median for _, increase in points]
    axes.errorbar(
        [x for x, _ in at],
        [y for _, y in at],
        yerr=[below, above],
        fmt=look.marker,
        color=look.colour,
        ecolor=look.colour,
        elinewidth=1,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )


def _name(axes: Axes, ends: Mapping[str, tuple[_Look, Point]], *, at_the_right: bool) -> None:
    """Each name to the side of its point, at its height, or as near as the other names leave room."""
    to_panel = axes.transData + axes.transAxes.inverted()
    place = {name: to_panel.transform(_middle(point)) for name, (_, point) in ends.items()}
    for name, height in _apart({name: float(y) for name, (_, y) in place.items()}, _LABEL_HEIGHT).items():
        look, point = ends[name]
        axes.annotate(
            name,
            _middle(point),
            xytext=(1.03 if at_the_right else float(place[name][0]) - 0.025, height),
            textcoords="axes fraction",
            ha="left" if at_the_right else "right",
            va="center",
            color=look.colour,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0 if at_the_right else 1, 0.5),
                "color": look.colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moved so that no two are nearer than the gap: those too near to each other in both directions alike."""
    names = sorted(heights, key=heights.__getitem__)
    up = _at_least(gap, [heights[name] for name in names])
    down = [-height for height in reversed(_at_least(gap, [-heights[name] for name in reversed(names)]))]
    between = [(high + low) / 2 for high, low in zip(up, down, strict=True)]
    from_below = _at_least(gap, between, least=0.0)
    from_above = _at_least(gap, [-height for height in reversed(from_below)], least=-1.0)
    return dict(zip(names, [-height for height in reversed(from_above)], strict=True))


def _at_least(gap: float, ascending: Sequence[float], least: float = -math.inf) -> list[float]:
    """Raised, where they must be, to lie that far above the one before."""
    placed: list[float] = []
    for height in ascending:
        placed.append(max(height, placed[-1] + gap if placed else least))
    return placed
