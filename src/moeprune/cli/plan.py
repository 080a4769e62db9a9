"""`moeprune plan ...`: make a Plan, and look at it. What the commands do is in `steps` and `plan_views`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

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

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="the Plan, from `moeprune plan make`")]
LayerOption = Annotated[str | None, typer.Option(metavar="N", help="this layer alone, in full, by its number or name")]


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
    recover: Annotated[
        bool, typer.Option("--recover", help="have what stays fitted after the cut, whichever method decides")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Decide which experts stay, by a method."""
    from moeprune.plan_views import wording
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
        recover=recover,
        trust_remote_code=trust_remote_code,
    )
    counts = sorted(decided.experts_per_layer.values())
    keep = f"; layers keep {counts[0]}" + (f" to {counts[-1]}" if counts[-1] > counts[0] else "") if counts else ""
    condensed = f"; {len(decided.condensed)} layers are condensed" if decided.condensed else ""
    zeros = f"; {wording.sparsity(decided)}" if decided.sparsity else ""
    console.print(f"{out}: removes {decided.removed:.1%} of the experts{keep}{condensed}{zeros}")


@plan.command()
def show(file: PlanArgument, layer: LayerOption = None) -> None:
    """Show what a plan keeps of each layer, and how close it was."""
    from moeprune.plan_views import wording
    from moeprune.plan_views.show import one_layer, overview
    from moeprune.steps import plans as step

    shown = step.load(file)
    _print(one_layer(shown, wording.find_layer(shown, layer)) if layer else overview(shown))


@plan.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="a Plan")],
    other: Annotated[str, typer.Argument(metavar="B", help="another")],
    layer: LayerOption = None,
) -> None:
    """Show what one plan keeps and another does not."""
    from moeprune.plan_views import wording
    from moeprune.plan_views.diff import diff as differences
    from moeprune.steps import plans as step

    in_one, in_other = step.load(one), step.load(other)
    name = wording.find_layer(in_one, layer) if layer else None
    if name:
        wording.find_layer(in_other, name)
    _print(differences(in_one, in_other, name))


@plan.command()
def export(
    file: PlanArgument,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="json: layer number -> experts that go; vllm: the profile of its pull requests 37824, 42613",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the list")],
) -> None:
    """Write the list of experts that go, for engines that leave them out as they load the original."""
    from moeprune.steps import plans as step

    step.export(file, out, form)
    console.print(f"{out}: written")


@plan.command()
def figure(
    file: PlanArgument,
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the figure, for example plan.png")],
) -> None:
    """Draw what becomes of every expert of every layer."""
    from moeprune.steps import plans as step

    step.figure(file, out)
    console.print(f"{out}: written")


def _print(shown: RenderableType) -> None:
    console.print(shown, soft_wrap=False, highlight=False)
