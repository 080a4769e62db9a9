"""`moeprune compare`: several Reports side by side."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import typer

from moeprune.cli.app import app, console
from moeprune.errors import InputError


@app.command()
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]REPORT...", help="of the same original on the same texts; without a name: its directory's"
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write them as one Report (JSON)")],
    page: Annotated[str | None, typer.Option(metavar="FILE", help="where to write its page (HTML)")] = None,
) -> None:
    """Put Reports side by side: what each is about, and which of them no other is smaller and better than."""
    from moeprune.evaluation.table import show
    from moeprune.steps import compare as step

    named: dict[str, str] = {}
    for given in reports:
        name, equals, address = given.partition("=")
        if not equals:
            name, address = PurePosixPath(given).parent.name or given, given
        if name in named:
            raise InputError(f"two reports are called {name}; name them apart, NAME=REPORT")
        named[name] = address
    report = step.compare(named, out, page_out=page)
    show(report, console)
    console.print(f"on the front: {', '.join(it.name for it in report.front)}", highlight=False)
    console.print(f"{out}: written" + (f", and its page {page}" if page else ""))
