"""A real MLflow server and a real S3 server (SeaweedFS) on this machine, for `make run` and to look around afterwards.

Everything they keep is in one directory (`state`): the servers' data, their logs, the S3 key and what is running. Both
listen on 127.0.0.1 only. They outlive the process that starts them; `down`, or the end of a `session`, stops them.
"""

from __future__ import annotations

from moeprune.services.addresses import BUCKET, Services
from moeprune.services.local import MLFLOW_PORT, S3_PORT, down, running, session, up

__all__ = ["BUCKET", "MLFLOW_PORT", "S3_PORT", "Services", "down", "running", "session", "up"]
