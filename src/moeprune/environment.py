"""What a pod needs to reach MLflow, S3 and the hub: the variables, and the Kubernetes secret that holds them."""

from __future__ import annotations

# A secret of this name, in the namespace of the run. Where it is not there, or lacks an entry, a variable is not set;
# MLflow is then not used, unless Kubeflow itself sets it up.
SECRET = "moeprune"
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_EXPERIMENT_NAME",
    "HF_TOKEN",
)
