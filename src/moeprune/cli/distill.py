"""`moeprune distill` and `moeprune merge-distilled`: what pruning lost is won back by training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moeprune.cli.app import BlockOption, FieldOption, PlanOption, TrustOption, app, console
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.objective import DEFAULT, ERRORS
from moeprune.distillation.parts import PARTS

if TYPE_CHECKING:
    from moeprune.steps.distill import Distilled

OBJECTIVE_HELP = (
    f"what the student is asked for, NAME=WEIGHT separated by commas: {', '.join(ERRORS)}; of a layer alone, the first "
    "two"
)
TRAIN_HELP = (
    f"what learns, separated by commas: {', '.join(PARTS)}; default: experts and router, and the layers that the Plan "
    "condenses"
)


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="the original model")],
    student: Annotated[str, typer.Option(metavar="MODEL", help="the pruned model")],
    plan: PlanOption,
    data: Annotated[str, typer.Option(metavar="DATA", help="text of the domain")],
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the recovered model")],
    objective: Annotated[str, typer.Option(metavar="NAME=WEIGHT", help=OBJECTIVE_HELP)] = str(DEFAULT),
    train: Annotated[str, typer.Option(metavar="PART", help=TRAIN_HELP, show_default=False)] = "",
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(help="blocks to read at most; an eighth of them is held out")] = 384,
    batch_blocks: Annotated[int, typer.Option(help="blocks per step of the optimizer")] = Settings.batch_blocks,
    learning_rate: Annotated[
        float, typer.Option(help="its peak, as a fraction of the size of the weights: one suits models of any width")
    ] = Settings.learning_rate,
    epochs: Annotated[int, typer.Option(help="times that each block is seen, at most")] = Settings.epochs,
    layers: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="train every N-th layer, from the I-th on (counted from 0), and write what they learn, for "
            "`merge-distilled`",
        ),
    ] = "",
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="stay below SIZE, for example 2GiB, whatever the model's; what is on S3 stays there"
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="where to keep finished layers on the way; default: beside the output"),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Teach the pruned model's MoE blocks to answer as the original's do. Interrupted, the same command goes on."""
    from moeprune.steps import distill as step

    part, parts = _part(layers)
    result = step.distill(
        teacher,
        student,
        plan,
        data,
        out,
        objective=objective,
        train=train,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        learning_rate=learning_rate,
        epochs=epochs,
        part=part,
        parts=parts,
        memory_limit=memory_limit,
        work=work,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"{out}: {_told(result)}")


@app.command()
def merge_distilled(
    parts: Annotated[list[str], typer.Argument(metavar="DIR...", help="all parts of a distillation")],
    student: Annotated[str, typer.Option(metavar="MODEL", help="the pruned model that they were made from")],
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the recovered model")],
    trust_remote_code: TrustOption = False,
) -> None:
    """Put together what `distill --layers I/N` has trained: the same as one call over all layers would have given."""
    from moeprune.steps import distill as step

    result = step.merge_distilled(parts, student, out, trust_remote_code=trust_remote_code)
    console.print(f"{out}: {_told(result)}")


def _part(layers: str) -> tuple[int, int]:
    """`I/N` as two numbers; 0 parts where nothing is said."""
    if not layers:
        return 0, 0
    part, slash, parts = layers.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(parts)):
        raise typer.BadParameter(f"{layers!r} is not of the form I/N, such as 0/4", param_hint="--layers")
    return int(part), int(parts)


def _told(result: Distilled) -> str:
    return (
        f"{len(result.layers)} layers; on text held out their outputs miss {result.error_before:.3f} -> "
        f"{result.error_after:.3f} of what the original's are (squares)"
    )
