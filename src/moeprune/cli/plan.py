"""`moeprune plan ...`: make a Plan, and look at it. What the commands do is in `steps` and `plans`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeprune.cli.app import (
    BlockOption,
    FieldOption,
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
    parameters_ratio: ParametersRatioOption = 0.0,
    size: SizeOption = "",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="the original model; needed for --parameters-ratio, --size and a method that tries what it decides",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="text to try it on, for such a method: that of the calibration"),
    ] = None,
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(min=1, help="blocks of that text at most")] = 8,
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
        data=data,
        text_field=text_field,
        block_tokens=block_tokens,
        trial_blocks=max_blocks,
        clusters=clusters,
        options=parse_settings(settings),
        trust_remote_code=trust_remote_code,
    )
    counts = sorted(decided.experts_per_layer.values())
    keep = f"; layers keep {counts[0]} to {counts[-1]}" if counts else ""
    condensed = f"; {len(decided.condensed)} layers are condensed" if decided.condensed else ""
    console.print(f"{out}: removes {decided.removed:.1%} of the experts{keep}{condensed}")
