"""`moeprune experts`: what each domain's experts are, in a terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from moeprune import layer_names
from moeprune.cli.app import app, console
from moeprune.domain_experts import TIMES, DomainExperts, LayerUse

_MOST_LISTED = 8  # own experts of a layer; the JSON has all


@app.command()
def experts(
    stats: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE", help="Stats of a domain, from `moeprune calibrate`; repeatable, the domain first"
        ),
    ],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="where to write all that was found (JSON)")] = None,
    figure: Annotated[
        str | None, typer.Option(metavar="FILE", help="where to draw who is used how much (.png, .svg or .pdf)")
    ] = None,
    times: Annotated[
        float, typer.Option(min=1, help="an expert is a domain's own if used there so many times as much as elsewhere")
    ] = TIMES,
) -> None:
    """Show which experts each domain uses, which are its own, and how much domains share."""
    from moeprune.steps import experts as step

    found = step.experts(stats, times=times, out=out, figure_out=figure)
    for shown in _shown(found):
        console.print(shown)
        console.print()
    for place in filter(None, (out, figure)):
        console.print(f"{place}: written")


def _shown(found: DomainExperts) -> list[Table | str]:
    alone = len(found.domains) == 1
    shown: list[Table | str] = [_domain(name, found, with_own=not alone) for name in found.domains]
    if alone:
        return [*shown, "Give the Stats of other data, too, to see which of these experts are this domain's own."]
    own = (
        f"own: used at least as much as an even share, and {found.times:g} times as much as by the other data; in "
        "brackets how many times."
    )
    return [*shown, _overlaps(found), own]


def _domain(name: str, found: DomainExperts, *, with_own: bool) -> Table:
    used = found.domains[name]
    experts = sum(len(use.share) for use in used.layers.values())
    own = f"; its own are {sum(len(use.own) for use in used.layers.values())} of {experts} experts" if with_own else ""
    table = Table(
        title=Text(f"{name}: {used.tokens:,} tokens{own}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("layer")
    table.add_column("tokens of the\nbusier half", justify="right")
    table.add_column("spread as over\nso many experts", justify="right")
    if with_own:
        table.add_column("own experts")
    for layer, use in zip(layer_names.labels(list(used.layers)), used.layers.values(), strict=True):
        cells = [f"{use.top_half:.0%}", f"{use.effective_experts:.1f} of {len(use.share)}"]
        table.add_row(Text(layer), *cells, *([_own(use)] if with_own else []))
    return table


def _own(use: LayerUse) -> str:
    told = [
        f"{own.expert} (only here)" if own.times is None else f"{own.expert} ({own.times:.1f}x)"
        for own in use.own[:_MOST_LISTED]
    ]
    left = len(use.own) - len(told)
    return ", ".join(told + ([f"and {left} more"] if left else [])) or "-"


def _overlaps(found: DomainExperts) -> Table:
    table = Table(
        title=Text("how much of their choices two domains share", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("domains")
    table.add_column("mean", justify="right")
    table.add_column("least, in layer", justify="right")
    table.add_column("most, in layer", justify="right")
    for overlap in found.overlaps:
        named = dict(zip(layer_names.labels(list(overlap.layers)), overlap.layers.values(), strict=True))
        ends = (choose(named, key=named.__getitem__) for choose in (min, max))
        extremes = [f"{named[layer]:.0%}, {layer}" for layer in ends]
        table.add_row(Text(" and ".join(overlap.domains)), f"{overlap.mean:.0%}", *extremes)
    return table
