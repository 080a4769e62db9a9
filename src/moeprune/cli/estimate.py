"""`moeprune estimate`: what a run will need, before it starts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moeprune.budget import Budget
from moeprune.cli.app import (
    BlockOption,
    MethodOption,
    ModelOption,
    ParametersRatioOption,
    RatioOption,
    SettingOption,
    SizeOption,
    TrustOption,
    app,
    console,
    parse_names,
    parse_settings,
)
from moeprune.cli.run import RATIO
from moeprune.errors import InputError
from moeprune.estimation.machines import GPUS
from moeprune.estimation.work import END_TO_END, LAYER_LOCAL, Work
from moeprune.methods import BASELINES, DEFAULT
from moeprune.streaming.room import parse_bytes


@app.command()
def estimate(
    model: ModelOption,
    method: MethodOption = DEFAULT,
    ratio: RatioOption = None,
    parameters_ratio: ParametersRatioOption = 0.0,
    size: SizeOption = "",
    method_options: SettingOption = None,
    plan: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="a Plan to carry out, instead of one of the size asked for; what is calibrated is still what --method "
            "and the baselines need",
        ),
    ] = "",
    baselines: Annotated[
        str, typer.Option(metavar="METHOD,...", help="methods that the result is held against; '' for none")
    ] = ",".join(BASELINES),
    block_tokens: BlockOption = Work.block_tokens,
    calibration_blocks: Annotated[int, typer.Option(help="blocks to calibrate on")] = Work.calibration_blocks,
    calibration_shards: Annotated[int, typer.Option(help="tasks that share the calibration")] = (
        Work.calibration_shards
    ),
    calibration_memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="calibrate below SIZE, for example 16GiB, a layer at a time")
    ] = "",
    trial_blocks: Annotated[
        int, typer.Option(help="blocks to try decisions on (cd-moe, fuse-by-need)")
    ] = Work.trial_blocks,
    recovery_blocks: Annotated[
        int, typer.Option(help="blocks to fit what stays on, where the method asks for that (fuse, ...)")
    ] = Work.recovery_blocks,
    how: Annotated[
        str, typer.Option(help=f"to distill: {LAYER_LOCAL}, a layer at a time, or {END_TO_END}, the whole model")
    ] = Work.how,
    distillation_blocks: Annotated[int, typer.Option(help="blocks to distill on")] = Work.distillation_blocks,
    distillation_epochs: Annotated[int, typer.Option(help="times that each of them is seen")] = (
        Work.distillation_epochs
    ),
    distillation_shards: Annotated[int, typer.Option(help=f"tasks that share the layers ({LAYER_LOCAL})")] = (
        Work.distillation_shards
    ),
    distillation_memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help=f"distill below SIZE ({LAYER_LOCAL})")
    ] = "",
    distillation_processes: Annotated[
        int, typer.Option(help=f"processes that share the model, a GPU each ({END_TO_END})")
    ] = Work.distillation_processes,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help=f"fewer activations, more computing ({END_TO_END})")
    ] = False,
    evaluation_blocks: Annotated[int, typer.Option(help="blocks of each held-out text")] = Work.evaluation_blocks,
    evaluation_texts: Annotated[int, typer.Option(help="held-out texts to measure on")] = Work.evaluation_texts,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"that each pod has, of {', '.join(GPUS)}; default: none but what this machine has, whose speed is "
            "measured",
            show_default=False,
        ),
    ] = "",
    explain: Annotated[
        str, typer.Option(metavar="STEP,...", help="show what these steps' numbers are made of; all: of every step")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    parameters_out: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="where to write the run and what its pods ask for: a file for `moeprune submit`"
        ),
    ] = "",
    trust_remote_code: TrustOption = False,
) -> None:
    """Say what memory, disk, time and pods each step of a run will need. Reads config and headers, and no weights."""
    from moeprune.estimation import table
    from moeprune.pipelines import requests
    from moeprune.steps import estimate as step

    if plan and parameters_out:
        raise InputError(
            "the pipeline makes a plan of its own, so a run cannot be that of a given one; leave --plan or "
            "--parameters-out out"
        )
    other = parameters_ratio or size
    work = Work(
        budget=Budget.of(RATIO if ratio is None and not other else ratio, parameters_ratio, size),
        method=method,
        options=parse_settings(method_options),
        baselines=tuple(parse_names(baselines)),
        block_tokens=block_tokens,
        calibration_blocks=calibration_blocks,
        calibration_shards=calibration_shards,
        calibration_memory_limit=parse_bytes(calibration_memory_limit) if calibration_memory_limit else None,
        trial_blocks=trial_blocks,
        recovery_blocks=recovery_blocks,
        how=how,
        distillation_blocks=distillation_blocks,
        distillation_epochs=distillation_epochs,
        distillation_shards=distillation_shards,
        distillation_memory_limit=parse_bytes(distillation_memory_limit) if distillation_memory_limit else None,
        distillation_processes=distillation_processes,
        gradient_checkpointing=gradient_checkpointing,
        evaluation_blocks=evaluation_blocks,
        evaluation_texts=evaluation_texts,
    )
    made = step.estimate(
        model,
        work,
        plan=plan or None,
        gpu=gpu,
        trust_remote_code=trust_remote_code,
    )
    if parameters_out:
        requests.write(made, work, parameters_out)
    if as_json:
        console.print_json(json.dumps(made.model_dump(mode="json")))
        return
    for shown in table.show(made, parse_names(explain)):
        console.print(shown, soft_wrap=False, highlight=False)
        console.print()
    if parameters_out:
        console.print(f"{parameters_out}: written; `moeprune submit --parameters {parameters_out}` starts the run")
