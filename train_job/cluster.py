"""A door to the Kubernetes API: the few things that are asked of it, asked again where that helps, refused in a
sentence where it does not.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from moeprune.errors import InputError, ServiceError, in_one_line
from moeprune.train_job.manifest import CONTAINER

T = TypeVar("T")

_SECONDS_TO_CONNECT_AND_ANSWER = (10, 60)
_LONGEST_PAUSE = 30.0
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT, _TOO_MANY = 401, 403, 404, 409, 429
_SERVER_ERRORS = 500
_PERMISSIONS = "give its service account the permissions that docs/distillation.md lists"


class NotThereError(ServiceError):
    """The object that was asked for does not exist."""


class ExistsError(ServiceError):
    """There is an object of this name."""


class NoAnswerError(ServiceError):
    """The API was silent, or broken, for longer than we wait."""


class Cluster:
    """One namespace of a cluster.

    Where this process runs in a pod, the cluster and the namespace are the pod's; elsewhere they are those of the
    current context of the kubeconfig (KUBECONFIG). An API that does not answer, is overloaded or no longer accepts the
    token, which may have been renewed, is asked again, ever more slowly.

    Its methods raise ServiceError: `NotThereError`, `NoAnswerError`, or with what the cluster has against it.
    """

    def __init__(self, namespace: str = "", patience_seconds: float = 600.0, first_pause_seconds: float = 0.5) -> None:
        """Args:
        namespace: another than the default.
        patience_seconds: for how long one thing is asked for.
        first_pause_seconds: before it is asked for again.

        Raises:
            InputError: the SDK is not installed, or there is no cluster to speak to.
        """
        self._wanted_namespace = namespace
        self.patience_seconds = patience_seconds
        self._first_pause_seconds = first_pause_seconds
        self._backend = self._connect()
        self.namespace: str = self._backend.namespace

    def _connect(self) -> Any:
        try:
            from kubeflow.common.types import KubernetesBackendConfig
            from kubeflow.trainer.backends.kubernetes.backend import KubernetesBackend
            from kubernetes.config import ConfigException, list_kube_config_contexts
        except ImportError as error:
            raise InputError(
                "training on several nodes needs the Kubeflow SDK: pip install 'moeprune[cluster]'"
            ) from error
        # Which version of Kubeflow Trainer is there, it wants to know, and warns where it may not.
        logging.getLogger(KubernetesBackend.__module__).setLevel(logging.ERROR)
        try:
            file, namespace = os.environ.get("KUBECONFIG"), self._wanted_namespace
            if file and not namespace:  # the SDK would look for it in the default file
                namespace = list_kube_config_contexts(file)[1]["context"].get("namespace", "default")
            return KubernetesBackend(KubernetesBackendConfig(namespace=namespace or None, config_file=file))
        except (ConfigException, OSError) as error:
            raise InputError(
                f"there is no Kubernetes cluster to train on: {in_one_line(error)}; run this in a pod of the cluster, "
                "or set KUBECONFIG"
            ) from error

    def runtime_kind(self, name: str) -> str:
        """Whether a training runtime is one of the namespace (TrainingRuntime) or of the cluster.

        Raises:
            InputError: there is none of this name, or it is not for PyTorch.
        """
        try:
            runtime = self._ask(f"read the training runtime {name}", lambda backend: backend.get_runtime(name))
        except NotThereError as error:
            raise InputError(
                f"there is no TrainingRuntime {name} in the namespace {self.namespace}, and no such "
                "ClusterTrainingRuntime; apply manifests/base/train-runtime.yaml, or name another"
            ) from error
        if runtime.trainer.framework != "torch":
            raise InputError(f"the training runtime {name} is for {runtime.trainer.framework}, not for torch")
        return str(runtime.kind.value)

    def create(self, job: dict[str, Any]) -> None:
        """Create a TrainJob. Raises ExistsError where there is one of its name."""
        try:
            # Strict: what this cluster's Trainer does not know is refused, not dropped.
            self._ask_for_jobs(
                "create TrainJobs", "create_namespaced_custom_object", body=job, field_validation="Strict"
            )
        except NotThereError as error:
            raise ServiceError(
                f"a TrainJob cannot be created in the namespace {self.namespace}: {error}; is that namespace there, "
                "and Kubeflow Trainer 2.2 or later installed?"
            ) from error

    def job(self, name: str) -> dict[str, Any]:
        """A TrainJob as it stands."""
        found: dict[str, Any] = self._ask_for_jobs("read TrainJobs", "get_namespaced_custom_object", name=name)
        return found

    def delete(self, name: str, *, and_wait: bool = False) -> None:
        """Delete a TrainJob with all that belongs to it, if it is there; the pods have their time to end.

        Args:
            and_wait: until they have ended.
        """
        policy = "Foreground" if and_wait else "Background"
        deadline = time.monotonic() + self.patience_seconds
        try:
            self._ask_for_jobs(
                "delete TrainJobs", "delete_namespaced_custom_object", name=name, propagation_policy=policy
            )
            while and_wait:
                self.job(name)
                if time.monotonic() > deadline:
                    raise NoAnswerError(
                        f"the TrainJob {name} is still being deleted after {self.patience_seconds:.0f} s"
                    )
                time.sleep(min(2.0, 4 * self._first_pause_seconds))
        except NotThereError:
            return

    def pod(self, name: str) -> Any:
        """A pod (kubernetes.client.V1Pod)."""
        return self._ask(
            "read pods", lambda backend: backend.core_api.read_namespaced_pod(name, self.namespace, **self._timeout)
        )

    def nodes_of(self, name: str) -> list[Any]:
        """The pods of a TrainJob that train, of each node the newest, in order."""
        from kubeflow.trainer.constants import constants

        selector = f"{constants.JOBSET_NAME_LABEL}={name},{constants.JOBSET_RJOB_NAME_LABEL}={CONTAINER}"
        pods = self._ask(
            "list pods",
            lambda backend: backend.core_api.list_namespaced_pod(
                self.namespace, label_selector=selector, **self._timeout
            ),
        ).items
        newest: dict[int, Any] = {}
        for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
            newest[int(pod.metadata.labels[constants.JOB_INDEX_LABEL])] = pod
        return [newest[index] for index in sorted(newest)]

    def log(self, pod: str, **which: Any) -> str:
        """What a node's container has said, each line behind its time; asked for once.

        Args:
            which: `since_seconds`, `tail_lines`.
        """
        said: bytes = self._ask(
            "read the log of pods",
            lambda backend: (
                # Undecoded: the client takes text for JSON where it can.
                backend.core_api.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=CONTAINER,
                    timestamps=True,
                    _preload_content=False,
                    **which,
                    **self._timeout,
                ).data
            ),
            patience_seconds=0.0,
        )
        return said.decode("utf-8", "replace")

    @property
    def _timeout(self) -> dict[str, Any]:
        return {"_request_timeout": _SECONDS_TO_CONNECT_AND_ANSWER}

    def _ask_for_jobs(self, what: str, call: str, **arguments: Any) -> Any:
        from kubeflow.trainer.constants import constants

        return self._ask(
            what,
            lambda backend: getattr(backend.custom_api, call)(
                constants.GROUP,
                constants.VERSION,
                self.namespace,
                constants.TRAINJOB_PLURAL,
                **arguments,
                **self._timeout,
            ),
        )

    def _ask(self, what: str, call: Callable[[Any], T], patience_seconds: float | None = None) -> T:
        """What `call` of the SDK's backend returns.

        Args:
            what: this is for, to follow "may not".
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline, pause = time.monotonic() + patience, self._first_pause_seconds
        while True:
            try:
                return call(self._backend)
            except Exception as error:  # the SDK makes a RuntimeError of everything
                cause = error.__cause__ if type(error) is RuntimeError else error
                if isinstance(cause, ApiException) and not _worth_asking_again(cause.status):
                    raise self._refusal(what, cause) from error
                if not isinstance(cause, ApiException | HTTPError | TimeoutError | OSError):
                    raise InputError(in_one_line(cause or error)) from error
                if time.monotonic() + pause > deadline:
                    raise NoAnswerError(
                        f"Kubernetes has not let us {what} in {patience:.0f} s: {_message(cause)}"
                    ) from error
                if isinstance(cause, ApiException) and cause.status == _UNAUTHORIZED:
                    self._backend = self._connect()  # reads the token again
            # Not all at once, where many wait for the same server.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refusal(self, what: str, error: Any) -> ServiceError:
        message = _message(error)
        if error.status == _NOT_FOUND:
            return NotThereError(message)
        if error.status == _CONFLICT:
            return ExistsError(message)
        if error.status == _FORBIDDEN:
            return ServiceError(
                f"this task may not {what} in the namespace {self.namespace}: {message}; {_PERMISSIONS}"
            )
        return ServiceError(f"the cluster refuses to {what}: {message}")


def _worth_asking_again(status: int) -> bool:
    return status in (_UNAUTHORIZED, _TOO_MANY) or status >= _SERVER_ERRORS


def _message(error: Any) -> str:
    """What the API says for people, else what there is."""
    try:
        return str(json.loads(error.body)["message"])
    except (AttributeError, TypeError, ValueError, KeyError):
        status = getattr(error, "status", None)
        return f"{status} {error.reason}" if status else in_one_line(error)
