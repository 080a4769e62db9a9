"""A Plan as a figure: a row per layer, a column per expert.

Legend of shapes: L layers, E experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from moeprune.evaluation import drawing
from moeprune.plan import LayerPlan, Plan
from moeprune.plan_views import wording
from moeprune.plan_views.wording import Fate

_NUMBERED = 32  # experts at most of which each has its number below it
_UNSCORED = 0.4  # shade of an expert without a score
_LOOKS = {Fate.MERGED: ("P", "merged with others"), Fate.CONSTANT: ("o", "its mean output stays")}


@drawing.styled
def figure(plan: Plan) -> Figure:
    """What becomes of every expert, shaded by its score's rank in its layer, and how many stay in each layer.

    A line goes through experts that go, a sign tells those that are merged or leave their mean output.
    """
    layers = list(plan.layers.values())
    widest = max(layer.experts for layer in layers)
    height = min(max(0.24 * len(layers), 1.2), 10.0)
    sheet = drawing.sheet(height + 1.6)
    experts, counts = sheet.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    experts.imshow(_shades(layers, widest), cmap=drawing.colours(), vmin=0, vmax=1.2, aspect="auto")
    stays = [np.isin(range(layer.experts), layer.keep) for layer in layers]
    drawing.strike_removed(experts, stays, linewidth=min(1.0, height / len(layers) * 9))
    for fate in (Fate.MERGED, Fate.CONSTANT):
        _sign(experts, layers, fate, widest)
    step = 1 if widest <= _NUMBERED else 2 ** int(np.ceil(np.log2(widest / 16)))
    experts.set_xticks(range(0, widest, step))
    experts.set_xlabel("expert" + (f"; the darker, the more in its layer: {plan.score}" if plan.score else ""))
    experts.set_ylabel("layer")
    experts.set_title(drawing.short(wording.how_it_was_made(plan), 100))
    drawing.layer_ticks(experts.yaxis, list(plan.layers), height)
    _bars(counts, layers, widest)
    for panel in (experts, counts):
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    _legend(sheet, layers)
    return sheet


def _shades(layers: Sequence[LayerPlan], widest: int) -> NDArray[Any]:
    """The share of a layer's experts that score no higher; not a number where a layer has no such expert."""
    shade_LE = np.full((len(layers), widest), np.nan)
    for row, layer in enumerate(layers):
        score_E = np.asarray(layer.scores or [], dtype=float)
        rank_E = np.searchsorted(np.sort(score_E), score_E, side="right") / layer.experts
        shade_LE[row, : layer.experts] = rank_E if layer.scores else _UNSCORED
    return shade_LE


def _sign(panel: Axes, layers: Sequence[LayerPlan], fate: Fate, widest: int) -> None:
    cells = [
        (expert, row)
        for row, layer in enumerate(layers)
        for expert, own in enumerate(wording.fates(layer))
        if own == fate
    ]
    inches = drawing.WIDTH * 0.75 / widest
    panel.plot(
        [expert for expert, _ in cells],
        [row for _, row in cells],
        _LOOKS[fate][0],
        color="white",
        markersize=min(7.0, inches * 40),
        markeredgecolor=drawing.INK,
        markeredgewidth=min(0.7, inches * 5),
    )


def _bars(panel: Axes, layers: Sequence[LayerPlan], widest: int) -> None:
    rows = range(len(layers))
    colours = [drawing.MARK if layer.condensed is not None else drawing.ACCENT for layer in layers]
    panel.barh(rows, [len(layer.keep) for layer in layers], height=0.7, color=colours)
    panel.set_xlim(0, widest)
    panel.set_xticks([0, widest])
    panel.set_xlabel("stay")
    panel.tick_params(axis="y", labelleft=False)
    panel.grid(axis="x")


def _legend(sheet: Figure, layers: Sequence[LayerPlan]) -> None:
    """Of what occurs in this plan."""
    used = {fate for layer in layers for fate in wording.fates(layer)}
    lines = [Line2D([], [], color=drawing.MARK, linewidth=1.5, label="goes")] * (Fate.GOES in used)
    for fate, (marker, label) in _LOOKS.items():
        if fate in used:
            lines.append(
                Line2D([], [], marker=marker, linestyle="", color="white", markeredgecolor=drawing.INK, label=label)
            )
    if any(layer.condensed is not None for layer in layers):
        lines.append(Line2D([], [], color=drawing.MARK, linewidth=5, label="condensed: no router"))
    if lines:
        sheet.legend(handles=lines, loc="outside upper right", ncols=len(lines), handlelength=1.4)
