"""`moeprune plan ...`: make a Plan, and look at it. What the commands do is in `steps` and `plans`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeprune.cli.app import (
    MethodOption,
    ParametersRatioOption,
    RatioOption,
    SettingOption,
    SizeOption,
    StatsOption,
    TrustOption,
    app,
    console,
    parse_settings,
)

plan = typer.Typer(
    help="Decide what becomes of the experts (a Plan: JSON to read, edit and apply).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(plan, name="plan")


@plan.command()
def make(
    method: MethodOption,
    stats: StatsOption,
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the Plan (JSON)")],
    ratio: RatioOption = None,
    parameters_ratio: ParametersRatioOption = None,
    size: SizeOption = "",
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the original model; needed for --parameters-ratio and --size"),
    ] = None,
    clusters: Annotated[
        str | None, typer.Option(metavar="FILE", help="Clusters; made on the way where not given")
    ] = None,
    settings: SettingOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Decide which experts stay, by a method."""
    from moeprune.steps import prune as step

    decided = step.plan(
        method,
        ratio,
        stats,
        out,
        parameters_ratio=parameters_ratio,
        size=size,
        model=model,
        clusters=clusters,
        options=parse_settings(settings),
        trust_remote_code=trust_remote_code,
    )
    counts = decided.experts_per_layer.values()
    console.print(f"{out}: removes {decided.removed:.1%} of the experts; layers keep {min(counts)} to {max(counts)}")
