"""The MLflow server: runs and models in SQLite (`state/mlflow.db`), artifacts on S3."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from importlib import metadata
from pathlib import Path

from moeprune.errors import InputError
from moeprune.services.addresses import HOST, Services, inherited
from moeprune.services.process import Launch
from moeprune.services.weed import MLFLOW_BUCKET


def launch(state: Path, port: int, services: Services) -> Launch:
    """How to start it on the port. Raises InputError if it is not installed."""
    for package in ("mlflow", "boto3"):  # mlflow-skinny would be the client only
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise InputError(
                f"the local MLflow server needs the package {package}, which is not in this environment: "
                "pip install 'moeprune[local]'"
            ) from error
    options = {
        "host": HOST,
        "port": port,
        "workers": 1,  # it answers from threads; each further worker costs 250 MB
        "backend-store-uri": "sqlite:///mlflow.db",
        # Artifacts go through the server: a client, and a browser that shows them, need its address and no S3 key.
        # With --default-artifact-root every client would need both.
        "artifacts-destination": f"s3://{MLFLOW_BUCKET}",
    }
    own = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Background jobs (of the gen-AI evaluation, which is not used here) are nine more processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return Launch(
        name="MLflow",
        # The server's own rules for Host and Origin stay as they are: they let localhost and 127.0.0.1 in.
        command=[sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())],
        environment=inherited() | services.environment() | own,
        directory=state,
        log=state / "logs" / "mlflow.log",
        port=port,
    )


def probe(services: Services) -> Callable[[], str | None]:
    """A check that asks the server for its health and its database; returns what hinders it, None if nothing."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def check() -> str | None:
        try:
            for path in ("/health", "/api/2.0/mlflow/experiments/search?max_results=1"):
                with opener.open(services.mlflow + path, timeout=10):
                    pass
        except (OSError, HTTPException) as error:
            return str(error)
        return None

    return check
