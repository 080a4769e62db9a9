"""The figures that people look at, of the Report, the Clusters and the Plan.

Each function returns a matplotlib Figure that belongs to nobody: no pyplot, no window, no global state. They are laid
out for 6 to 60 layers and 8 to 256 experts. `all_of` gives each its title and the caption that says how to read it.

Legend of shapes: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from moeprune import layer_names
from moeprune.evaluation import drawing
from moeprune.evaluation.drawing import WIDTH, short
from moeprune.evaluation.report import Candidate, Report

Similarity = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]  # layer -> (cosine_EE, cluster label_E)
Keep = Mapping[str, Sequence[int]]  # layer -> experts that were kept
Use = Mapping[str, Mapping[str, Sequence[float]]]  # domain -> layer -> each expert's share of the tokens

MAX_PANELS = 60  # of one figure; of more layers, evenly spaced ones are shown
RASTER_BUDGET = 400_000  # cells of all heat maps of a figure together, so that the page stays small


def all_of(
    report: Report, similarity: Similarity | None = None, keep: Keep | None = None
) -> dict[str, tuple[Figure, str]]:
    """Every figure that the report, and where given the Clusters and the Plan, can fill: title -> (figure, caption)."""
    figures: dict[str, tuple[Figure, str]] = {}
    domain = report.domain
    if len(report.candidates) > 1:
        figures["What each domain lost"] = (
            loss_increase(report),
            "How much worse than the original each candidate predicts held-out text, in nats per token: short bars on "
            f"{domain}, the domain pruned for, are what one wants; long bars elsewhere are what was given up for it.",
        )
        figures["Quality against size"] = (
            quality_and_size(report),
            f"Each point is a model: further left is smaller, further down predicts {domain} better, and the grey "
            "line joins the models that no other one beats in both.",
        )
        figures["Experts kept per layer"] = (
            experts_kept(report),
            "How many routed experts each layer has left, against the original's (dashed); candidates with the same "
            "counts share a line.",
        )
    if report.expert_use:
        struck = "; a line through experts means that they were removed" if keep else ""
        figures["Which experts each domain uses"] = (
            expert_use(report, keep),
            f"A row is a layer of the original, its experts ordered by their use on {domain}, in every panel alike: "
            f"dark cells on the right are experts that another domain needs and {domain} does not{struck}.",
        )
    if similarity:
        figures["Experts that resemble each other"] = (
            expert_similarity(similarity),
            "The cosine similarity of every two experts of a layer, ordered by cluster: an outlined square is a "
            "cluster, and the darker it is inside, the better its experts can stand in for one another.",
        )
    return figures


@drawing.styled
def loss_increase(report: Report) -> Figure:
    """Nats per token above the original: a panel per domain, a bar per candidate, the pruned-for domain highlighted."""
    candidates, domains = report.candidates[1:], report.domains
    columns = next((columns for columns in (4, 3) if len(domains) % columns == 0), min(len(domains), 4))
    panel_height = 0.45 + 0.3 * max(len(candidates), 2)
    figure, axes = drawing.panels(
        len(domains), columns, height=math.ceil(len(domains) / columns) * panel_height + 0.35, share=True
    )
    values = {domain: [report.loss_increase(candidate, domain) for candidate in candidates] for domain in domains}
    finite = [value for each in values.values() for value in each if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    room = (high - low or 1.0) * 0.28  # for the numbers at the ends of the bars
    for panel, domain in zip(axes, domains, strict=True):
        target = domain == report.domain
        for row, value in enumerate(values[domain]):
            length = value if math.isfinite(value) else high
            panel.barh(row, length, height=0.62, color=drawing.ACCENT if target else "#b3bdc8")
            panel.annotate(
                f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}",
                (length, row),
                xytext=(4 if length >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if length >= 0 else "right",
                va="center",
                fontsize=8,
            )
        panel.axvline(0, color="#9aa5b1", linewidth=0.8)
        drawing.domain_title(panel, domain, report.domain)
        panel.set_facecolor(drawing.TINT if target else "white")
        panel.grid(axis="x")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.locator_params(axis="x", nbins=4)
    for lowest in axes[-columns:]:  # sharing hides the numbers of those with an empty place below
        lowest.tick_params(axis="x", labelbottom=True)
    names = [short(candidate.name) for candidate in candidates]
    axes[0].set_yticks(range(len(names)), names)
    for panel in axes[::columns]:
        panel.tick_params(axis="y", labelcolor=drawing.INK)
    axes[0].set_ylim(len(candidates) - 0.4, -0.6)
    axes[0].set_xlim(low - (room if low < 0 else 0), high + room)
    figure.supxlabel("loss above the original, nats per token (less is better)", fontsize=9, color=drawing.MUTED)
    return figure


@drawing.styled
def quality_and_size(report: Report) -> Figure:
    """Loss on the pruned-for domain against bytes on disk, a labelled point per candidate, and the Pareto front."""
    factor, unit = (1e9, "GB") if report.original.bytes_on_disk >= 1e9 else (1e6, "MB")
    points = []
    for index, candidate in enumerate(report.candidates):
        loss = candidate.quality[report.domain].loss_nats
        if math.isfinite(loss):  # a model whose loss is not a number has no place on paper; the table says so
            points.append((index, short(candidate.name), candidate.bytes_on_disk / factor, loss))
    front = [
        (candidate.bytes_on_disk / factor, candidate.quality[report.domain].loss_nats) for candidate in report.front
    ]
    figure = drawing.sheet(height=4.4)
    axes = figure.subplots()
    axes.plot([size for size, _ in front], [loss for _, loss in front], color=drawing.FAINT, linewidth=2.5, zorder=1)
    for index, _, size, loss in points:
        color, marker = drawing.look(index)
        axes.plot(size, loss, marker, color=color, markersize=9, markeredgecolor="white", zorder=3)
    axes.margins(x=0.08, y=0.12)
    axes.grid()
    axes.set_xlabel(f"on disk, {unit} (further left is smaller)")
    axes.set_ylabel(f"loss on {short(report.domain)}, nats per token\n(further down is better)")
    drawing.label_points(figure, axes, [point[1:] for point in points])
    return figure


@drawing.styled
def experts_kept(report: Report) -> Figure:
    """Routed experts per layer, a line for each set of counts among the candidates."""
    layers = sorted(
        {layer for candidate in report.candidates for layer in candidate.experts_per_layer}, key=layer_names.natural
    )

    def counts(candidate: Candidate) -> tuple[float, ...]:
        return tuple(candidate.experts_per_layer.get(layer, 0) for layer in layers)

    alike: dict[tuple[float, ...], list[int]] = {}
    for index, candidate in enumerate(report.candidates[1:], start=1):
        alike.setdefault(counts(candidate), []).append(index)
    figure = drawing.sheet(height=3.4)
    axes = figure.subplots()
    x = range(len(layers))
    lines = axes.plot(x, counts(report.original), color=drawing.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    names = [report.original.name]
    for kept, indices in alike.items():
        color, marker = drawing.look(indices[0])
        lines += axes.plot(
            x,
            kept,
            color=color,
            marker=marker,
            markersize=7 if len(layers) <= 16 else 4,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.3,
        )
        names.append(", ".join(report.candidates[index].name for index in indices))
    # A legend drops labels that begin with an underscore; a space before it is not seen.
    figure.legend(lines, [f" {short(name, 60)}" for name in names], loc="outside upper left", ncols=3, handlelength=1.8)
    axes.set_ylim(0, max(counts(report.original), default=1) * 1.08)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.locator_params(axis="y", integer=True)
    axes.grid(axis="y")
    axes.set_ylabel("routed experts")
    axes.set_xlabel("layer")
    drawing.layer_ticks(axes.xaxis, layers, WIDTH)
    return figure


def expert_use(report: Report, keep: Keep | None = None) -> Figure:
    """`use_by_domain` of the report's original, the pruned-for domain first."""
    return use_by_domain(report.expert_use, report.domain, keep, target_is="pruned for")


@drawing.styled
def use_by_domain(use: Use, target: str, keep: Keep | None = None, *, target_is: str = "") -> Figure:
    """A heat map per domain, layers by experts: how much each expert is used, as a multiple of an even share.

    Each layer's experts are in the order of their use on the target domain, in every panel. A line goes through the
    experts of a layer in `keep` that are not kept.

    Args:
        target_is: said of the target in its title.
    """
    domains = sorted(use, key=lambda domain: domain != target)  # stable: that one first
    layers = sorted(use[domains[0]], key=layer_names.natural)
    order = {layer: np.argsort(-np.asarray(use[domains[0]][layer]), kind="stable") for layer in layers}
    widest = max(len(each) for each in order.values())
    columns = 1 if widest > 40 else min(len(domains), 2 if widest > 20 else 3)
    rows = math.ceil(len(domains) / columns)
    panel_height = min(max(len(layers) * min(WIDTH / columns / widest, 0.24), 0.8), 4.5)
    figure, axes = drawing.panels(len(domains), columns, height=rows * (panel_height + 0.45) + 0.7)
    for panel, domain in zip(axes, domains, strict=True):
        use_LE = np.full((len(layers), widest), np.nan)
        for row, layer in enumerate(layers):
            use_E = np.asarray(use[domain][layer], dtype=float)[order[layer]]
            use_LE[row, : use_E.size] = use_E / (use_E.mean() or 1.0)
        image = panel.imshow(use_LE, cmap=drawing.colours(), vmin=0, vmax=3, aspect="auto")
        if keep is not None:
            kept = [np.isin(order[layer], keep.get(layer, order[layer])) for layer in layers]
            drawing.strike_removed(panel, kept, linewidth=min(0.8, panel_height / len(layers) * 9))
        if widest <= 16 and len(layers) <= 16:
            for row, layer in enumerate(layers):
                for place, expert in enumerate(order[layer]):
                    ink = "white" if use_LE[row, place] > 1.8 else drawing.INK
                    panel.text(place, row, str(expert), ha="center", va="center", fontsize=6.5, color=ink)
        drawing.layer_ticks(panel.yaxis, layers, panel_height)
        panel.set_xticks([])
        panel.set_xlabel(f"experts, most used on {short(target)} first", loc="left", fontsize=7.5)
        panel.spines[:].set_visible(False)
        drawing.domain_title(panel, domain, target, target_is)
    for first in axes[::columns]:
        first.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.35, aspect=45, extend="max", pad=0.02)
    bar.set_ticks([0, 1, 2, 3], labels=["never used", "even share", "twice that", "3 times"])
    bar.outline.set_visible(False)
    return figure


@drawing.styled
def expert_similarity(similarity: Similarity) -> Figure:
    """Small multiples, a heat map per layer, its experts reordered by cluster and each cluster outlined."""
    layers = sorted(similarity, key=layer_names.natural)
    labels = layer_names.labels(layers)
    shown = drawing.spread(len(layers), MAX_PANELS)
    columns = next(
        columns for most, columns in ((2, 2), (6, 3), (12, 4), (24, 6), (48, 8), (60, 10)) if len(shown) <= most
    )
    side = WIDTH / columns
    figure, axes = drawing.panels(len(shown), columns, height=math.ceil(len(shown) / columns) * (side + 0.1) + 0.6)
    # Every cosine of an expert with itself is 1: the scale is that of the others, or all clusters would look alike.
    others = np.concatenate([_off_diagonal(similarity[layers[index]][0]).ravel() for index in shown])
    others = others[np.isfinite(others)]
    low, high = np.percentile(others, [1, 99]) if others.size else (0.0, 1.0)
    cells = max(40, math.isqrt(RASTER_BUDGET // len(shown)))
    for panel, index in zip(axes, shown, strict=True):
        cosine_EE, label_E = similarity[layers[index]]
        image = _similarity_panel(panel, np.asarray(cosine_EE, dtype=float), np.asarray(label_E), cells, side)
        image.set_clim(low, high)
        clusters = len(np.unique(label_E))
        title = f"layer {labels[index]}" + (f": {clusters} cluster{'s' * (clusters != 1)}" if columns <= 6 else "")
        panel.set_title(title, fontsize=9 if columns <= 4 else 7, pad=3)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.35, aspect=45, extend="both", pad=0.02)
    bar.outline.set_visible(False)
    of_layers = f"; {len(shown)} of {len(layers)} layers" if len(shown) < len(layers) else ""
    bar.set_label(f"cosine similarity of two different experts{of_layers}")
    return figure


def _similarity_panel(
    panel: Axes, cosine_EE: NDArray[Any], label_E: NDArray[Any], cells: int, side: float
) -> AxesImage:
    experts = len(label_E)
    members = sorted(
        (np.flatnonzero(label_E == label) for label in np.unique(label_E)), key=lambda each: (-len(each), each[0])
    )
    order = np.concatenate(members)
    image_EE, block = _shrunk(_off_diagonal(cosine_EE)[np.ix_(order, order)], cells)
    reach = len(image_EE) * block - 0.5
    image = panel.imshow(image_EE, cmap=drawing.colours(), extent=(-0.5, reach, reach, -0.5))
    panel.set_xlim(-0.5, experts - 0.5)
    panel.set_ylim(experts - 0.5, -0.5)
    edges = np.concatenate([[0], np.cumsum([len(each) for each in members])]) - 0.5
    corners: list[tuple[float, float]] = []
    for start, end in pairwise(edges):
        corners += [(start, start), (end, start), (end, end), (start, end), (start, start), (math.nan, math.nan)]
    # One line for all outlines, broken by the not-a-numbers: a fraction of the bytes of one shape per cluster.
    panel.plot(*zip(*corners, strict=True), color=drawing.MARK, linewidth=1.0 if side > 2 else 0.4, clip_on=False)
    if experts <= side * 10:
        panel.set_xticks(range(experts), order, fontsize=6)
        panel.set_yticks(range(experts), order, fontsize=6)
        panel.tick_params(length=0, pad=1.5)
    else:
        panel.set_xticks([])
        panel.set_yticks([])
    panel.spines[:].set_visible(False)
    return image


def _off_diagonal(cosine_EE: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.eye(len(cosine_EE), dtype=bool), np.nan, cosine_EE)


def _shrunk(values_EE: NDArray[Any], cells: int) -> tuple[NDArray[Any], int]:
    """The matrix as at most cells x cells means of square blocks, and how many experts wide a block is."""
    block = math.ceil(len(values_EE) / cells)
    if block == 1:
        return values_EE, 1
    blocks = math.ceil(len(values_EE) / block)
    padded = np.full((blocks * block, blocks * block), np.nan)
    padded[: len(values_EE), : len(values_EE)] = values_EE
    squares = padded.reshape(blocks, block, blocks, block)
    measured = np.isfinite(squares)
    counts = measured.sum(axis=(1, 3))
    sums = np.where(measured, squares, 0).sum(axis=(1, 3))
    return np.where(counts, sums / np.maximum(counts, 1), np.nan), block
