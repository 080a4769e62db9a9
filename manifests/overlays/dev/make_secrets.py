"""The secrets of the overlay `dev`, made up at random, as Kubernetes takes them:

    python3 manifests/overlays/dev/make_secrets.py | kubectl create -f -

`create`, not `apply`: passwords that databases were made with must not change under them. Where Kubeflow Pipelines is
installed for a single user, tasks run in its own namespace: `make_secrets.py --tasks kubeflow`. To have them read gated
models of the Hugging Face hub, set HF_TOKEN.
"""

import argparse
import json
import os
import secrets
import sys
from typing import Any

MLFLOW = "moeprune-mlflow"


def made_up(tasks: str = "moeprune") -> list[dict[str, Any]]:
    """The Secrets, with values that nobody has seen.

    Args:
        tasks: the namespace in which the pipeline's tasks run.
    """
    database, administrator, pipeline, csrf = (secrets.token_urlsafe(24) for _ in range(4))
    key = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
    address = f"postgresql+psycopg2://mlflow:{database}@postgres:5432"
    endpoint = f"http://seaweedfs.{MLFLOW}:8333"
    environment = key | {
        "AWS_ENDPOINT_URL": endpoint,
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": f"http://mlflow.{MLFLOW}:5000",
        "MLFLOW_TRACKING_USERNAME": "moeprune",
        "MLFLOW_TRACKING_PASSWORD": pipeline,
        "MLFLOW_EXPERIMENT_NAME": "moeprune",
        "MOEPRUNE_WORK": "s3://moeprune/unfinished",
    }
    if token := os.environ.get("HF_TOKEN"):
        environment["HF_TOKEN"] = token
    auth = {
        "admin-username": "admin",
        "admin-password": administrator,
        "pipeline-username": "moeprune",
        "pipeline-password": pipeline,
        "csrf-key": csrf,
        "basic_auth.ini": "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {address}/mlflow_auth\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    }
    return [
        _secret(tasks, "moeprune", environment),
        _secret(tasks, "kfp-mlflow-credentials", {"username": "moeprune", "password": pipeline}),
        _secret(MLFLOW, "postgres", {"password": database}),
        _secret(MLFLOW, "mlflow-database", {"tracking-uri": f"{address}/mlflow"}),
        _secret(MLFLOW, "mlflow-auth", auth),
        _secret(MLFLOW, "mlflow-s3", key),
    ]


def _secret(namespace: str, name: str, values: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "moeprune"}},
        "stringData": values,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", metavar="NAMESPACE", default="moeprune", help="in which the pipeline's tasks run")
    secrets_made = made_up(parser.parse_args().tasks)
    json.dump({"apiVersion": "v1", "kind": "List", "items": secrets_made}, sys.stdout, indent=1)
