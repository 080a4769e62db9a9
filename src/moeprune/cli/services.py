"""`moeprune up` and `moeprune down`: the MLflow and S3 servers of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.app import app, console
from moeprune.services import MLFLOW_PORT, S3_PORT, running
from moeprune.services import down as stop
from moeprune.services import up as start

StateOption = Annotated[Path, typer.Option(metavar="DIR", help="where runs and servers keep what they make")]
MlflowPortOption = Annotated[int, typer.Option(envvar="MLFLOW_PORT", help="of the MLflow server")]
S3PortOption = Annotated[int, typer.Option(envvar="S3_PORT", help="of the S3 server")]
STATE = Path(".moeprune")


def services_in(state: Path) -> Path:
    """Where the servers of a state directory keep their things."""
    return state / "services"


@app.command()
def up(
    state: StateOption = STATE, mlflow_port: MlflowPortOption = MLFLOW_PORT, s3_port: S3PortOption = S3_PORT
) -> None:
    """Start an MLflow server and an S3 server on this machine, and leave them running."""
    services = start(services_in(state), mlflow_port, s3_port)
    console.print(f"MLflow  {services.mlflow}", highlight=False)
    console.print(f"S3      {services.s3}  (its key is in {services_in(state) / 's3.json'})", highlight=False)
    console.print(f"to log single steps there: export MLFLOW_TRACKING_URI={services.mlflow}", highlight=False)


@app.command()
def down(state: StateOption = STATE) -> None:
    """Stop them; what they stored stays."""
    was_up = running(services_in(state)) is not None
    stop(services_in(state))
    console.print("stopped" if was_up else "nothing was running")
