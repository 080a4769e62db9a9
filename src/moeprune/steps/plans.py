"""plan show, diff, export and figure: a Plan, wherever it lies, for people and for serving engines."""

from __future__ import annotations

from pathlib import PurePosixPath

from matplotlib.backend_bases import FigureCanvasBase

from moeprune import places
from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.plan_views.export import export as exported
from moeprune.plan_views.figure import figure as drawn


def load(address: str) -> Plan:
    """The Plan at an address. Raises as `Plan.load` and `places.local_file` do."""
    with places.local_file(address) as path:
        return Plan.load(path)


def export(address: str, out: str, form: str) -> None:
    """Put the list of experts that a plan drops at `out`. See `plan_views.export.export`."""
    with places.output(out) as path, write_beside(path) as beside:
        beside.write_text(exported(load(address), form))


def figure(address: str, out: str) -> None:
    """Draw a plan and put the figure at `out`, in the format that its name ends with.

    Raises:
        InputError: a format that matplotlib does not write; else as `load`.
    """
    form, known = PurePosixPath(out).suffix.removeprefix(".").lower(), FigureCanvasBase.get_supported_filetypes()
    if form not in known:
        raise InputError(f"a figure's name ends with its format, one of {', '.join(sorted(known))}; {out} does not")
    with places.output(out) as path, write_beside(path) as beside:
        drawn(load(address)).savefig(beside, format=form)
