"""`moeprune distill` and `moeprune merge-distilled`: what pruning lost is won back by training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune.cli.app import BlockOption, FieldOption, PlanOption, TrustOption, app, console
from moeprune.distillation.end_to_end.job import Training
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.objective import DEFAULT, ERRORS
from moeprune.distillation.parts import PARTS

if TYPE_CHECKING:
    from moeprune.steps.distill import Distilled

LAYER_LOCAL, END_TO_END = "layer-local", "end-to-end"
HOW_HELP = (
    f"{LAYER_LOCAL}: one layer at a time, in the memory of a layer; {END_TO_END}: the whole model, which must fit into "
    "the memory of all processes, by gradients through all layers"
)
OBJECTIVE_HELP = (
    f"what the student is asked for, NAME=WEIGHT separated by commas: {', '.join(ERRORS)}; of a layer alone, the first "
    f"two; default: {DEFAULT}, end to end logits=1"
)
TRAIN_HELP = (
    f"what learns, separated by commas: {', '.join(PARTS)}, the last two end to end; default: experts and router, and "
    "the layers that the Plan condenses"
)


def _default(option: str) -> Any:
    return Training.model_fields[option].default


def _end_to_end(option: str, *names: str) -> Any:
    """An option of `Training`, with what it says of itself."""
    told = f"{Training.model_fields[option].description}; default: {_default(option)}"
    return typer.Option(*names, help=told, show_default=False)


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="the original model")],
    student: Annotated[str, typer.Option(metavar="MODEL", help="the pruned model")],
    plan: PlanOption,
    data: Annotated[str, typer.Option(metavar="DATA", help="text of the domain")],
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the recovered model")],
    how: Annotated[str, typer.Option(help=HOW_HELP)] = LAYER_LOCAL,
    objective: Annotated[str, typer.Option(metavar="NAME=WEIGHT", help=OBJECTIVE_HELP, show_default=False)] = "",
    train: Annotated[str, typer.Option(metavar="PART", help=TRAIN_HELP, show_default=False)] = "",
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(help="blocks to read at most; an eighth of them is held out")] = 384,
    batch_blocks: Annotated[
        int | None,
        typer.Option(
            help=f"blocks per step of the optimizer; default: {Settings.batch_blocks}, end to end "
            f"{_default('batch_blocks')}",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="its peak; layer-local, as a fraction of the size of the weights, which suits models of any width "
            f"(default: {Settings.learning_rate:g}); end to end, as Adam takes it (default: "
            f"{_default('learning_rate'):g})",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help=f"times that each block is seen, at most; default: {Settings.epochs}, end to end {_default('epochs')}",
            show_default=False,
        ),
    ] = None,
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
        typer.Option(
            envvar="MOEPRUNE_WORK",
            metavar="DIR",
            help="where to keep finished work on the way (layer-local: or s3:// address); default: beside the output",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[int | None, _end_to_end("processes")] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON that says which nodes of a cluster are to train, as a TrainJob of Kubeflow Trainer (see "
            "docs/distillation.md)",
        ),
    ] = None,
    teacher_outputs: Annotated[str | None, _end_to_end("teacher_outputs")] = None,
    accumulation: Annotated[int | None, _end_to_end("accumulation")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _end_to_end("gradient_checkpointing", "--gradient-checkpointing")
    ] = None,
    precision: Annotated[str | None, _end_to_end("precision")] = None,
    warmup: Annotated[float | None, _end_to_end("warmup")] = None,
    evaluations: Annotated[int | None, _end_to_end("evaluations")] = None,
    patience: Annotated[int | None, _end_to_end("patience")] = None,
    lora_rank: Annotated[int | None, _end_to_end("lora_rank")] = None,
    seed: Annotated[int | None, _end_to_end("seed")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Teach the pruned model to answer as the original does. Interrupted, the same command goes on where it was."""
    both: dict[str, Any] = {
        "text_field": text_field,
        "block_tokens": block_tokens,
        "max_blocks": max_blocks,
        "work": work,
    }
    both |= {"train": train, "trust_remote_code": trust_remote_code}
    of_both = {
        "batch_blocks": batch_blocks,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "objective": objective,
        "seed": seed,
    }
    of_layers = {"layers": layers, "memory_limit": memory_limit}
    of_whole = {
        "processes": processes,
        "teacher_outputs": teacher_outputs,
        "accumulation": accumulation,
        "gradient_checkpointing": gradient_checkpointing,
        "precision": precision,
        "warmup": warmup,
        "evaluations": evaluations,
        "patience": patience,
        "lora_rank": lora_rank,
    }
    both |= _given(of_both)
    if how == END_TO_END:
        from moeprune.steps.distill_end_to_end import distill_end_to_end
        from moeprune.train_job import Nodes, OnNodes

        _refuse_given(of_layers, how)
        elsewhere = OnNodes(Nodes.load(nodes)) if nodes else None
        outcome = distill_end_to_end(teacher, student, plan, data, out, elsewhere=elsewhere, **both, **_given(of_whole))
        told = f"the loss on text held out: {outcome.before:.4f} -> {outcome.after:.4f}"
    elif how == LAYER_LOCAL:
        from moeprune.steps import distill as step

        _refuse_given(of_whole | {"nodes": nodes}, how)
        part, parts = _part(layers)
        told = _told(
            step.distill(teacher, student, plan, data, out, part=part, parts=parts, memory_limit=memory_limit, **both)
        )
    else:
        raise typer.BadParameter(f"{how!r} is not known; known: {LAYER_LOCAL}, {END_TO_END}", param_hint="--how")
    console.print(f"{out}: {told}")


@app.command()
def merge_distilled(
    parts: Annotated[list[str], typer.Argument(metavar="DIR...", help="all parts of a distillation")],
    student: Annotated[str, typer.Option(metavar="MODEL", help="the pruned model that they were made from")],
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the recovered model")],
    trust_remote_code: TrustOption = False,
) -> None:
    """Put together what `distill --layers I/N` has trained: the same as one call over all layers would have given."""
    from moeprune.steps import merge_distilled as step

    result = step.merge_distilled(parts, student, out, trust_remote_code=trust_remote_code)
    console.print(f"{out}: {_told(result)}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were not left at what is default."""
    return {name: value for name, value in options.items() if value not in (None, "")}


def _refuse_given(options: dict[str, Any], how: str) -> None:
    """Raise for an option that says nothing of what was asked for."""
    for name in _given(options):
        other = LAYER_LOCAL if how == END_TO_END else END_TO_END
        hint = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(f"it is for `--how {other}`, and this is {how}", param_hint=hint)


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
