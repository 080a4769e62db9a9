"""Where the services are and the key to them, as the environment variables that boto3 and MLflow's client read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

HOST = "127.0.0.1"
BUCKET = "moeprune"  # for the pipeline's own things; MLflow keeps its artifacts in a bucket of its own


@dataclass(frozen=True)
class Services:
    """A running MLflow server and a running S3 server."""

    mlflow: str  # address, http://127.0.0.1:<port>
    s3: str  # address, http://127.0.0.1:<port>
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use both; also overrides what would lead it to other servers."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            # A session token or a service's own endpoint in the user's environment would win over the three above.
            "AWS_SESSION_TOKEN": "",
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ENDPOINT_URL_S3": self.s3,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.s3,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_EXPERIMENT_NAME": os.environ.get("MLFLOW_EXPERIMENT_NAME") or "moeprune",
            **direct(),
        }


def direct() -> dict[str, str]:
    """The variables that keep requests to this machine away from a proxy; the user's own exceptions are kept."""
    present = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in present.split(",") if host.strip()]
    value = present if hosts == ["*"] else ",".join(dict.fromkeys([*hosts, HOST, "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def inherited() -> dict[str, str]:
    """This process's environment without what would configure a server behind our back (MLFLOW_STATIC_PREFIX, say)."""
    foreign = ("AWS_", "MLFLOW_", "_MLFLOW_", "UVICORN_", "WEED_", "S3_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | direct()
