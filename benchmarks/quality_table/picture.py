"""Quality against size: a line for each row, from the original to the smallest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

Point = tuple[float, Spread]  # size as a share of the original's; increase of the loss over the draws
Look = tuple[str, str]  # colour and marker


@drawing.styled
def quality_and_size(results: Results, rows: Sequence[Row], title: str) -> Figure:
    """The mean increase of the loss over the domains; bars are the least and the most over the draws.

    Rows that remove experts are lines from the original on, named at their ends; others are single points.
    """
    points = {row: found for row in rows if (found := _points(results, row))}
    looks = {row: drawing.look(place) for place, row in enumerate(points, start=1)}
    lines = {row: found for row, found in points.items() if find(row.method).removes == "experts"}
    figure = drawing.sheet(_HEIGHT)
    axes = figure.subplots()
    axes.set_yscale("asinh", linear_width=_LINEAR)
    axes.axhline(0, color=drawing.INK, linewidth=1.2, zorder=1)
    for row, found in points.items():
        _draw(axes, found, looks[row], from_original=row in lines)
    axes.set_title(title)
    axes.set_xlabel("bytes on disk, of the original's (further right is smaller)")
    axes.set_ylabel("loss above the original's, mean of the domains, nats per token\n(further down is better)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(x=0.03, y=0.04)
    axes.invert_xaxis()
    axes.grid()
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "the original")
    _name_at_the_right(axes, {row.label: (looks[row], found[-1]) for row, found in lines.items()})
    single = [(row.label, *_middle(found[-1])) for row, found in points.items() if row not in lines]
    drawing.label_points(figure, axes, single, fontsize=8)
    return figure


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


def _draw(axes: Axes, points: Sequence[Point], look: Look, *, from_original: bool) -> None:
    colour, marker = look
    at = [_middle(point) for point in points]
    if from_original:
        axes.plot(*zip((1.0, 0.0), *at, strict=True), color=colour, linewidth=1.4, zorder=2)
    below = [increase.median - increase.least for _, increase in points]
    above = [increase.most - increase.median for _, increase in points]
    axes.errorbar(
        [x for x, _ in at],
        [y for _, y in at],
        yerr=[below, above],
        fmt=marker,
        color=colour,
        ecolor=colour,
        elinewidth=1,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )


def _name_at_the_right(axes: Axes, ends: Mapping[str, tuple[Look, Point]]) -> None:
    """Each name beside the panel at the height where its line ends, or as near as the other names leave room."""
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_panel.transform(_middle(point))[1]) for name, (_, point) in ends.items()}
    for name, height in _apart(heights, _LABEL_HEIGHT).items():
        (colour, _), point = ends[name]
        axes.annotate(
            name,
            _middle(point),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moved so that no two are nearer than the gap: up from the lowest, then down from the top."""
    names = sorted(heights, key=heights.__getitem__)
    placed: list[float] = []
    for name in names:
        placed.append(max(heights[name], placed[-1] + gap if placed else 0.0))
    ceiling = 1.0
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - gap
    return dict(zip(names, placed, strict=True))
