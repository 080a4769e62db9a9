"""A server that speaks as much of the Kubernetes API as training on a cluster uses, over HTTP, with faults on demand.

What it answers is made of the models of Kubernetes' client and of Kubeflow's SDK, and a TrainJob that they do not know
every field of is refused, as the real one refuses it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml  # type: ignore[import-untyped]  # kfp brings it
from kubeflow_trainer_api import models
from kubernetes import client

NAMESPACE = "team"
_GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
_JOBS = f"{_GROUP}/namespaces/{NAMESPACE}/trainjobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_MOST_LOOKS = 1000  # nobody is to follow a job for ever
_START = datetime(2026, 1, 1, tzinfo=UTC)


class RefusedError(Exception):
    def __init__(self, status: int, message: str, **details: str) -> None:
        super().__init__(message)
        self.status, self.details = status, details


def strictly(model: Any, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a manifest does not fit a model of the SDK, or has a field that it does not know."""
    known = json.loads(model.from_dict(manifest).to_json())
    if unknown := _fields(manifest) - _fields(known):
        raise ValueError(f"unknown field: {sorted(unknown)}")


def _fields(value: Any, path: str = "") -> set[str]:
    if isinstance(value, Mapping):
        return {path}.union(*(_fields(item, f"{path}.{name}") for name, item in value.items()))
    if isinstance(value, list):
        return {path}.union(*(_fields(item, f"{path}[{index}]") for index, item in enumerate(value)))
    return {f"{path}={value!r}"}


class KubernetesApi:
    """One namespace of it.

    Attributes:
        jobs, pods, logs: what is there, by name. A log is a list of its lines; each gets a time of its own.
        on_look: called whenever a TrainJob is read, before it is; what goes on in the cluster goes on here.
        faults: methods and paths (regular expressions) -> what to answer instead: statuses, or None to hang up; each
            is used up.
        requests: methods and paths, as they came.
        tokens: that are accepted.
        runtimes: of the namespace, and of the cluster.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, Any] = {}
        self.logs: dict[str, list[str]] = {}
        self.on_look: Callable[[dict[str, Any]], None] = lambda job: None
        self.faults: dict[str, list[int | None]] = {}
        self.requests: list[str] = []
        self.tokens = {"first"}
        self.on_unauthorized: Callable[[], None] = lambda: None
        self.runtimes: dict[str, dict[str, dict[str, Any]]] = {"trainingruntimes": {}, "clustertrainingruntimes": {}}
        self.looks = 0
        self.lock = threading.RLock()

    def add_runtime(self, plural: str, name: str, framework: str = "torch") -> None:
        kind = {"trainingruntimes": "TrainingRuntime", "clustertrainingruntimes": "ClusterTrainingRuntime"}[plural]
        container = {"name": "node", "image": "image"}
        labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        job = {"metadata": {"labels": labels}, "spec": {"template": {"spec": {"containers": [container]}}}}
        self.runtimes[plural][name] = {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": framework}},
            "spec": {
                "mlPolicy": {"numNodes": 1, "torch": {}},
                "template": {"spec": {"replicatedJobs": [{"name": "node", "template": job}]}},
            },
        }

    def add_pod(self, name: str, job: str = "", index: int = 0, **status: Any) -> None:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        self.pods[name] = client.V1Pod(
            metadata=client.V1ObjectMeta(
                name=name, labels=labels, creation_timestamp=_START + timedelta(seconds=len(self.pods))
            ),
            spec=client.V1PodSpec(containers=[client.V1Container(name="main", image="registry/moeprune:7")]),
            status=client.V1PodStatus(**status),
        )
        self.logs.setdefault(name, [])

    def set_status(self, job: str, kind: str, reason: str = "", message: str = "") -> None:
        condition = {
            "type": kind,
            "status": "True",
            "reason": reason or kind,
            "message": message,
            "lastTransitionTime": _START.isoformat(),
        }
        self.jobs[job]["status"] = {"conditions": [condition]}
        models.TrainerV1alpha1TrainJob.from_dict(self.jobs[job])

    def answer(self, method: str, path: str, query: Mapping[str, list[str]], body: Any) -> Any:
        """What the API answers, as JSON or, for a log, as text. Raises RefusedError."""
        if method == "POST" and path == _JOBS:
            return self._create(query, body)
        if found := re.fullmatch(f"{_JOBS}/([^/]+)", path):
            return self._job(method, found[1])
        if path == _PODS:
            return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self._selected(query)}
        if found := re.fullmatch(f"{_PODS}/([^/]+)", path):
            return _as_json(self._named("pods", self.pods, found[1]))
        if found := re.fullmatch(f"{_PODS}/([^/]+)/log", path):
            return self._log(self._named("pods", self.logs, found[1]), query)
        if found := re.fullmatch(f"{_GROUP}(/namespaces/{NAMESPACE})?/(\\w+runtimes)/([^/]+)", path):
            return self._named(found[2], self.runtimes[found[2]], found[3])
        raise RefusedError(404, f'namespaces "{path}" not found', kind="namespaces")

    def _create(self, query: Mapping[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
        assert query.get("fieldValidation") == ["Strict"]
        try:
            strictly(models.TrainerV1alpha1TrainJob, body)
        except ValueError as error:
            raise RefusedError(400, f"strict decoding error: {error}") from error
        name = body["metadata"]["name"]
        if name in self.jobs:
            raise RefusedError(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        body["metadata"] |= {"namespace": NAMESPACE, "uid": "1", "creationTimestamp": _START.isoformat()}
        self.jobs[name] = body
        return body

    def _job(self, method: str, name: str) -> dict[str, Any]:
        if method == "GET" and name in self.jobs:
            self.on_look(self.jobs[name])
            self.looks += 1
            if self.looks > _MOST_LOOKS and name in self.jobs:
                self.set_status(name, "Failed", "TheStoryHasNoEnd")
        job: dict[str, Any] = self._named("trainjobs", self.jobs, name)
        if method == "DELETE":
            del self.jobs[name]
            self.pods = {
                pod: it for pod, it in self.pods.items() if it.metadata.labels["jobset.sigs.k8s.io/jobset-name"] != name
            }
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return job

    def _selected(self, query: Mapping[str, list[str]]) -> list[Any]:
        wanted = dict(term.split("=") for term in query["labelSelector"][0].split(","))
        return [_as_json(pod) for pod in self.pods.values() if wanted.items() <= pod.metadata.labels.items()]

    def _log(self, lines: list[str], query: Mapping[str, list[str]]) -> str:
        assert query["timestamps"] == ["True"]
        assert query["container"] == ["node"]
        # Without the zeros that end a fraction, so that texts do not sort as times do: .01Z comes after .009Z, but
        # before .011Z.
        fractions = [f"{index + 1:03}".rstrip("0") for index in range(len(lines))]
        stamped = [f"2026-01-01T00:00:00.{fraction}Z {line}" for fraction, line in zip(fractions, lines, strict=True)]
        return "\n".join(stamped[-int(query["tailLines"][0]) :] if "tailLines" in query else stamped)

    def _named(self, plural: str, those: Mapping[str, Any], name: str) -> Any:
        if name not in those:
            raise RefusedError(404, f'{plural} "{name}" not found', kind=plural)
        return those[name]


def _as_json(model: Any) -> Any:
    return client.ApiClient().sanitize_for_serialization(model)


@contextmanager
def serving(api: KubernetesApi, kubeconfig: Path) -> Iterator[None]:
    """The API on a port of its own, which `kubeconfig` leads to."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with api.lock:
                api.requests.append(f"{self.command} {url.path}")
                try:
                    for pattern, answers in api.faults.items():
                        if answers and re.search(pattern, f"{self.command} {url.path}"):
                            status = answers.pop(0)
                            if status is None:
                                self.close_connection = True
                                return
                            raise RefusedError(status, f"fault {status}")
                    if self.headers.get("Authorization") not in {f"Bearer {token}" for token in api.tokens}:
                        api.on_unauthorized()
                        raise RefusedError(401, "Unauthorized")
                    self._reply(200, api.answer(self.command, url.path, parse_qs(url.query), body))
                except RefusedError as refused:
                    self._reply(
                        refused.status,
                        {
                            "kind": "Status",
                            "apiVersion": "v1",
                            "status": "Failure",
                            "message": str(refused),
                            "code": refused.status,
                            "details": refused.details,
                        },
                    )

        def _reply(self, status: int, answer: Any) -> None:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.server_port}", "first")
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_kubeconfig(path: Path, server: str, token: str) -> None:
    context = {"cluster": "it", "user": "me", "namespace": NAMESPACE}
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "it",
                "clusters": [{"name": "it", "cluster": {"server": server}}],
                "users": [{"name": "me", "user": {"token": token}}],
                "contexts": [{"name": "it", "context": context}],
            }
        )
    )
