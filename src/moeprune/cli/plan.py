"""`moeprune plan ...`: make a Plan, and look at it. What the commands do is in `steps` and `plans`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeprune.cli.app import MethodOption, RatioOption, SettingOption, StatsOption, app, console, parse_settings

plan = typer.Typer(
    help="Decide what becomes of the experts (a Plan: JSON to read, edit and apply).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(plan, name="plan")


@plan.command()
def make(
    method: MethodOption,
    ratio: RatioOption,
    stats: StatsOption,
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the Plan (JSON)")],
    clusters: Annotated[
        str | None, typer.Option(metavar="FILE", help="Clusters; made on the way where not given")
    ] = None,
    settings: SettingOption = None,
) -> None:
    """Decide which experts stay, by a method."""
    from moeprune.steps import prune as step

    decided = step.plan(method, ratio, stats, out, clusters=clusters, options=parse_settings(settings))
    counts = decided.experts_per_layer.values()
    console.print(f"{out}: removes {decided.removed:.1%} of the experts; layers keep {min(counts)} to {max(counts)}")
