"""The style and the small parts that the figures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from moeprune import layer_names

WIDTH = 10.0  # inches, of every figure
MAX_HEIGHT = 13.0

INK, MUTED, FAINT = "#1f2933", "#616e7c", "#d5dae0"
ACCENT, TINT, MARK = "#1d5fbf", "#eef4fd", "#d1490c"
# Distinguishable to colour-blind eyes (after Okabe and Ito, without the yellow that white paper swallows).
SERIES = ("#1d5fbf", "#d1490c", "#00896a", "#a8478a", "#3a9bd0", "#8a6d00", "#555555")
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # names are the user's, and may hold a $
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#9aa5b1",
    "ytick.color": "#9aa5b1",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.interpolation": "none",
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the style of the house, then freeze the layout, so that each rendering of the figure is the same."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure

    return drawn


def sheet(height: float) -> Figure:
    """An empty figure of the page's width, `height` in inches."""
    layout = ConstrainedLayoutEngine(wspace=0.04)  # so that the numbers of neighbouring panels do not touch
    return Figure(figsize=(WIDTH, min(height, MAX_HEIGHT)), layout=layout, dpi=150)


def panels(count: int, columns: int, height: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of `columns`."""
    figure = sheet(height)
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False, sharex=share, sharey=share)
    axes: list[Axes] = list(grid.ravel())
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def colours() -> Colormap:
    """White to dark blue: what is more is darker, on paper too. What was not measured is grey."""
    return matplotlib.colormaps["Blues"].with_extremes(bad="#e9ecef")


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count-1, evenly spaced, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most)).tolist()})


def layer_ticks(axis: Axis, layers: Sequence[str], inches: float, per_inch: float = 5.0) -> None:
    """Label as many layers as fit that length of axis."""
    labels = layer_names.labels(layers)
    step = math.ceil(len(layers) / (inches * per_inch))
    axis.set_ticks(range(0, len(layers), step), labels=labels[::step], fontsize=7.5)


def domain_title(panel: Axes, domain: str, target: str, target_is: str = "pruned for") -> None:
    if domain == target:
        told = f" ({target_is})" if target_is else ""
        panel.set_title(short(domain) + told, color=ACCENT, fontweight="bold")
    else:
        panel.set_title(short(domain))


def short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def strike_removed(panel: Axes, kept_by_layer: Sequence[NDArray[Any]], linewidth: float) -> None:
    """A line through each run of experts that were removed."""
    x: list[float] = []
    y: list[float] = []
    for row, kept in enumerate(kept_by_layer):
        turns = np.flatnonzero(np.diff(np.concatenate([[True], kept, [True]])))
        for start, end in zip(turns[::2], turns[1::2], strict=True):
            x += [start - 0.35, end - 0.65, math.nan]
            y += [row, row, math.nan]
    panel.plot(x, y, color=MARK, linewidth=linewidth, solid_capstyle="butt", scalex=False, scaley=False)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of a report's candidate, the same in every figure; the first is the original."""
    if index == 0:
        return INK, "o"
    return SERIES[(index - 1) % len(SERIES)], MARKERS[(index - 1) // len(SERIES) % len(MARKERS)]


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]], fontsize: float = 9.0) -> None:
    """Write each name beside its point (name, x, y), moved up or down where it would cover another name or point."""
    figure.draw_without_rendering()  # until then, where the points are on paper is not known
    per_point = figure.dpi / 72
    height, gap = fontsize * 1.35 * per_point, 8 * per_point
    on_paper = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - gap / 2, y - gap / 2, gap, gap) for x, y in on_paper]
    for (name, x, y), (px, py) in sorted(zip(points, on_paper, strict=True), key=lambda each: (each[1][1], each[0][0])):
        width = len(name) * fontsize * 0.62 * per_point
        to_left = px + gap + width > axes.bbox.x1
        left = px - gap - width if to_left else px + gap
        tries = (place * height * 0.5 * sign for place in range(200) for sign in (1, -1))
        boxes = ((move, Bbox.from_bounds(left, py + move - height / 2, width, height)) for move in tries)
        inside = ((move, box) for move, box in boxes if axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1)
        move, box = next(
            (each for each in inside if not any(each[1].overlaps(other) for other in taken)),
            (0.0, Bbox.from_bounds(left, py - height / 2, width, height)),
        )
        taken.append(box)
        axes.annotate(
            name,
            (x, y),
            xytext=((-gap if to_left else gap) / per_point, move / per_point),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            fontsize=fontsize,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4} if move else None,
        )
