"""`moeprune run`: the whole pipeline on this machine, with a real MLflow and a real S3 server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import tracking
from moeprune.atomic import write_beside
from moeprune.budget import Budget
from moeprune.cli.app import (
    ALGORITHM_HELP,
    CLUSTERS_HELP,
    DTYPE_HELP,
    SEQUENCES_HELP,
    SIMILARITY_HELP,
    BlockOption,
    DataOption,
    FieldOption,
    MethodOption,
    ModelOption,
    ParametersRatioOption,
    RatioOption,
    SettingOption,
    SizeOption,
    TrustOption,
    app,
    parse_names,
    parse_settings,
)
from moeprune.cli.distill import OBJECTIVE_HELP, TRAIN_HELP
from moeprune.cli.screen import Screen
from moeprune.cli.services import STATE, MlflowPortOption, S3PortOption, StateOption, services_in
from moeprune.clustering import PUBLISHED
from moeprune.distillation.layer_local.settings import Settings
from moeprune.errors import InputError
from moeprune.evaluation.report import Report
from moeprune.evaluation.table import show
from moeprune.methods import BASELINES, DEFAULT
from moeprune.places import REFERENCE_MODEL
from moeprune.services import MLFLOW_PORT, S3_PORT, Services, running, session
from moeprune.sources import parse_sources, with_addresses

if TYPE_CHECKING:
    from moeprune.pipelines.containers import Containers

RATIO = 0.5  # where nothing is said of how much goes


class Runner(StrEnum):
    PROCESS = "process"
    DOCKER = "docker"


@app.command()
def run(
    model: ModelOption = REFERENCE_MODEL,
    data: DataOption = "builtin://code",
    evaluation_data: Annotated[
        str,
        typer.Option(
            metavar="DATA,...",
            help="held-out texts to measure on, separated by commas, that of the domain first; needed where --data is "
            "not one of the built-in texts, each of which has its own",
        ),
    ] = "",
    method: MethodOption = DEFAULT,
    ratio: RatioOption = None,
    parameters_ratio: ParametersRatioOption = 0.0,
    size: SizeOption = "",
    method_options: SettingOption = None,
    baselines: Annotated[
        str,
        typer.Option(metavar="METHOD,...", help="methods to hold the result against at the same ratio; '' for none"),
    ] = ",".join(BASELINES),
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    calibration_blocks: Annotated[int, typer.Option(min=1, help="blocks to calibrate on at most")] = 128,
    calibration_sequences: Annotated[str, typer.Option(help=SEQUENCES_HELP)] = "packed",
    calibration_shards: Annotated[
        int, typer.Option(min=1, help="shards that calibration is split into; here they run one after another")
    ] = 1,
    calibration_dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    calibration_memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="calibrate below SIZE, for example 2GiB, a layer at a time")
    ] = "",
    trial_blocks: Annotated[
        int, typer.Option(min=1, help="blocks to try decisions on at most (cd-moe, fuse-by-need)")
    ] = 8,
    recovery_blocks: Annotated[
        int, typer.Option(min=1, help="blocks to fit what stays on at most, where the method asks for that (fuse, ...)")
    ] = 128,
    cluster_similarity: Annotated[str, typer.Option(help=SIMILARITY_HELP)] = "outputs",
    cluster_algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "ward",
    clusters_per_layer: Annotated[str, typer.Option(help=CLUSTERS_HELP)] = PUBLISHED,
    distillation_blocks: Annotated[int, typer.Option(min=1, help="blocks to recover on at most")] = 384,
    distillation_objective: Annotated[str, typer.Option(metavar="NAME=WEIGHT", help=OBJECTIVE_HELP)] = str(
        Settings.objective
    ),
    distillation_parts: Annotated[str, typer.Option(metavar="PART", help=TRAIN_HELP)] = "",
    distillation_epochs: Annotated[int, typer.Option(min=1, help="times that each of them is seen at most")] = (
        Settings.epochs
    ),
    distillation_shards: Annotated[
        int, typer.Option(min=1, help="tasks that share the layers; here they run one after another")
    ] = 1,
    distillation_memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="distill below SIZE, for example 2GiB, whatever the model's")
    ] = "",
    evaluation_blocks: Annotated[
        int, typer.Option(min=1, help="blocks of each held-out text to measure on at most")
    ] = 32,
    learning_rate: Annotated[
        float, typer.Option(help="of the distillation, its peak, as a fraction of the size of the weights")
    ] = Settings.learning_rate,
    registered_model: Annotated[str, typer.Option(metavar="NAME", help="of the model in the registry")] = "moeprune",
    max_loss_increase_nats: Annotated[
        float,
        typer.Option(
            "--max-loss-increase", metavar="NATS", help="most it may lose on the domain, per token, to be registered"
        ),
    ] = 0.25,
    trust_remote_code: TrustOption = False,
    runner: Annotated[Runner, typer.Option(help="what a step is: a process of this Python, or a container")] = (
        Runner.PROCESS
    ),
    image: Annotated[str, typer.Option(metavar="IMAGE", help="of the containers; empty for that of this release")] = "",
    state: StateOption = STATE,
    mlflow_port: MlflowPortOption = MLFLOW_PORT,
    s3_port: S3PortOption = S3_PORT,
) -> None:
    """Run the whole pipeline on this machine: calibrate, cluster, prune, distill, evaluate, promote.

    It has an MLflow and an S3 server of its own, or those that `moeprune up` started. What an earlier run calibrated is
    used again, as long as the model, the data and the code are the same. s3:// addresses are on that S3 server, or,
    where AWS_ACCESS_KEY_ID or AWS_PROFILE is set, on yours.
    """
    _require_kubeflow()
    from moeprune.cli.checks import check_run, evaluation_texts
    from moeprune.pipelines import forked_steps

    if ratio is not None or parameters_ratio or size:
        Budget.of(ratio, parameters_ratio, size)  # refuses more than one; the pipeline's ratio gives way to the others
    arguments = {
        "model": _absolute(model),
        "data": with_addresses(data, _absolute),
        "evaluation_data": [with_addresses(text, _absolute) for text in evaluation_texts(evaluation_data, data)],
        "method": method,
        "ratio": RATIO if ratio is None else ratio,
        "parameters_ratio": parameters_ratio,
        "size": size,
        "method_options": parse_settings(method_options),
        "baselines": parse_names(baselines),
        "text_field": text_field,
        "block_tokens": block_tokens,
        "calibration_blocks": calibration_blocks,
        "calibration_sequences": calibration_sequences,
        "calibration_shards": calibration_shards,
        "calibration_dtype": calibration_dtype,
        "calibration_memory_limit": calibration_memory_limit,
        "trial_blocks": trial_blocks,
        "recovery_blocks": recovery_blocks,
        "cluster_similarity": cluster_similarity,
        "cluster_algorithm": cluster_algorithm,
        "clusters_per_layer": clusters_per_layer,
        "distillation_blocks": distillation_blocks,
        "distillation_objective": distillation_objective,
        "distillation_parts": distillation_parts,
        "distillation_epochs": distillation_epochs,
        "distillation_shards": distillation_shards,
        "distillation_memory_limit": distillation_memory_limit,
        "evaluation_blocks": evaluation_blocks,
        "learning_rate": learning_rate,
        "registered_model": registered_model,
        "max_loss_increase_nats": max_loss_increase_nats,
        "trust_remote_code": trust_remote_code,
    }
    check_run(arguments)
    containers = _containers(image, arguments) if runner is Runner.DOCKER else None
    asked = size or f"{parameters_ratio or arguments['ratio']:g}"
    name = f"{method}-{asked}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not containers:
        forked_steps.load()  # while the servers start
    with Screen() as screen:
        screen.started("services")
        with session(services_in(state), mlflow_port, s3_port) as services, _environment(services):
            screen.finished("services", f"MLflow {services.mlflow}, S3 {services.s3}")
            _run(name, arguments, state, screen, containers)
        if running(services_in(state)) is None:
            again = _up_again(state, mlflow_port, s3_port)
            screen.console.print(f"The servers are stopped; to open the MLflow run, start them again: {again}")


def _containers(image: str, arguments: dict[str, Any]) -> Containers:
    from moeprune.components.image import IMAGE
    from moeprune.pipelines.containers import Containers, image_id

    if not os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_PROFILE"):
        raise InputError("containers do not see the profiles of ~/.aws: give the key itself, as AWS_ACCESS_KEY_ID, ...")
    texts = [
        source.address for text in (arguments["data"], *arguments["evaluation_data"]) for source in parse_sources(text)
    ]
    here = [Path(address) for address in (arguments["model"], *texts) if Path(address).exists()]
    return Containers(image_id(image or IMAGE), tuple(here))


def _run(name: str, arguments: dict[str, Any], state: Path, screen: Screen, containers: Containers | None) -> None:
    from moeprune.pipelines.freshness import state_of
    from moeprune.pipelines.local_run import StepError, run_locally
    from moeprune.pipelines.prune import prune

    made_by = state_of(arguments["model"], arguments["data"])
    if containers:
        made_by += f"-{containers.image.removeprefix('sha256:')}"
    log_path = state / "logs" / f"{name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log, tracking.pipeline_run(name, arguments) as tracked:
        try:
            outputs = run_locally(
                prune(),
                arguments,
                outputs=state / "runs",
                cache=state / "cache" / made_by,
                log=log,
                watcher=screen,
                containers=containers,
            )
        except StepError as error:
            raise StepError(f"{error}\nIts whole output is in {log_path}") from None
        tracked.tags({"moeprune.reused": ", ".join(dict.fromkeys(screen.reused_steps)) or "nothing"})
        mlflow_address = tracked.url
    folder = state / "reports" / name
    for kind, output in {"report.json": "report", "report.html": "page"}.items():
        with write_beside(folder / kind) as beside:
            shutil.copyfile(outputs[output].path, beside)
    console = screen.console
    console.print()
    show(Report.load(folder / "report.json"), console)
    console.print()
    console.print(outputs["verdict"])
    console.print(f"MLflow run    {mlflow_address}")
    console.print(f"report        {folder / 'report.html'}")
    console.print(f"model         {outputs['model'].path}")


def _up_again(state: Path, mlflow_port: int, s3_port: int) -> str:
    chosen = {"--state": (state, STATE), "--mlflow-port": (mlflow_port, MLFLOW_PORT), "--s3-port": (s3_port, S3_PORT)}
    options = [f"{option} {value}" for option, (value, default) in chosen.items() if value != default]
    return " ".join(["moeprune up", *options]) + ("" if options else " (or make up)")


def _require_kubeflow() -> None:
    try:
        import moeprune.pipelines.prune  # noqa: F401
    except ImportError as error:
        if not (error.name or "").startswith("kfp"):
            raise
        raise InputError("`moeprune run` needs the SDK of Kubeflow Pipelines: pip install 'moeprune[local]'") from error


def _absolute(address: str) -> str:
    """A path from the root, so that the record of the run says which file it was; other addresses as they are."""
    return str(Path(address).absolute()) if Path(address).exists() else address


@contextmanager
def _environment(services: Services) -> Iterator[None]:
    """This process's environment, which the steps inherit, with the services in it and no other run of MLflow's."""
    before = dict(os.environ)
    own_s3 = not before.keys().isdisjoint({"AWS_ACCESS_KEY_ID", "AWS_PROFILE"})
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", tracking.PIPELINE_RUN_VARIABLE):
        os.environ.pop(variable, None)
    os.environ.update(
        {key: value for key, value in services.environment().items() if not (own_s3 and key.startswith("AWS_"))}
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
