"""The Report as one self-contained HTML page: opened from a disk, a mail or an object store, it needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from moeprune.atomic import write_beside
from moeprune.evaluation.drawing import STYLE
from moeprune.evaluation.report import Report
from moeprune.evaluation.verdict import number, verdict

Figures = Mapping[str, tuple[Figure, str]]  # title -> (figure, caption)


def render(report: Report, figures: Figures, about: Mapping[str, str]) -> str:
    """The page. `about` is listed as it is given (run, plan, seed, ...); the same inputs give the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    drawn = [
        {"title": title, "caption": caption, "svg": _svg(figure, f"figure-{place}")}
        for place, (title, (figure, caption)) in enumerate(figures.items(), start=1)
    ]
    return template.render(
        report=report,
        headline=report.headline,
        summary=_summary(report),
        tiles=_tiles(report),
        groups=verdict(report),
        figures=drawn,
        about=about,
    )


def write(path: str | Path, report: Report, figures: Figures, about: Mapping[str, str]) -> None:
    """Write the page, whole or not at all."""
    with write_beside(Path(path)) as beside:
        beside.write_text(render(report, figures, about), encoding="utf-8", newline="\n")


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element for inside HTML; `name` keeps its ids apart from those of other figures."""
    text = io.StringIO()
    # Text stays text: it can be searched and selected, and does not depend on the fonts of the machine that drew it.
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which has no place in HTML
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    labelled = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-caption" '
    return Markup(svg.replace("<svg ", f"<svg {labelled}", 1))


def _summary(report: Report) -> str:
    """What was done, what it saved and what it cost, in one sentence."""
    original, headline = report.original, report.headline
    if headline is original:
        return f"The original was measured alone, on {len(report.domains)} domains; nothing was pruned."
    removed = original.experts - headline.experts
    condensed, layers = report.condensed_layers(headline), len(original.experts_per_layer)
    method = f"{headline.method} " if headline.method else ""
    if condensed:
        done = f"For {report.domain}, {method}condensed {condensed} of {layers} layers with experts into dense ones"
    elif removed > 0:
        share = number(100 * removed / original.experts)
        done = f"For {report.domain}, {method}removed {removed:,} of {original.experts:,} routed experts ({share}%)"
    else:
        done = f"For {report.domain}, {method}kept all {original.experts:,} routed experts"
    factor, unit = (1e9, "GB") if original.bytes_on_disk >= 1e9 else (1e6, "MB")
    saved = (
        f"the {headline.name} model needs {number(headline.bytes_on_disk / factor)} instead of "
        f"{number(original.bytes_on_disk / factor)} {unit} on disk"
    )
    if headline.bytes_on_disk == original.bytes_on_disk:
        saved = f"the {headline.name} model is as large as the original"
    cost = f"its loss on {report.domain} is {_nats(report.loss_increase(headline))}"
    others = [report.loss_increase(headline, domain) for domain in report.domains[1:]]
    if others:
        low, high = min(others), max(others)
        between = f"{low:+.2f}" if f"{low:+.2f}" == f"{high:+.2f}" else f"{low:+.2f} to {high:+.2f}"
        cost += f", against {between} on {'the other domain' if len(others) == 1 else 'the other domains'}"
    return f"{done}: {saved}, and {cost}."


def _nats(increase: float) -> str:
    if not math.isfinite(increase):
        return "no longer a finite number"
    if abs(increase) < 0.0005:
        return "the original's"
    return f"{abs(increase):.3f} nats per token {'higher' if increase > 0 else 'lower'} than the original's"


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The four changes to take away, of the headline candidate: (change, of what)."""
    at = report.candidates.index(report.headline)
    if at == 0:
        return []
    resources, target = verdict(report)[:2]
    chosen = [(row, "") for row in resources.rows if row.label.startswith(("on disk", "tokens per second"))]
    chosen += [(row, f" on {report.domain}") for row in target.rows]
    tiles = []
    for row, where in chosen:
        measure, _, unit = row.label.partition(", ")
        tiles.append(
            (row.cells[at].change, f"{measure}{where}: {row.cells[0].value} to {row.cells[at].value} {unit}".strip())
        )
    return tiles
