"""A server that speaks as much of the API of Kubeflow Pipelines as submitting uses, over HTTP, with faults on demand.

Everything it takes and gives is a model of Kubeflow's own client: a body with a field that the model does not know is
refused, and an answer is what the client makes of a model.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import kfp_server_api as api
import yaml  # type: ignore[import-untyped]  # kfp brings it

ROOT = "/pipeline/apis/v2beta1"
_START = datetime(2026, 1, 1, tzinfo=UTC)
_JSON = api.ApiClient()
_AT_ONCE = 2  # entries on a page, whatever was asked for


class RefusedError(Exception):
    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def as_json(model: Any) -> Any:
    return _JSON.sanitize_for_serialization(model)


def strictly(model: str, body: Any) -> Any:
    """The body as a model; ValueError where it has a field that the model does not know."""
    made = _JSON.deserialize(SimpleNamespace(data=json.dumps(body)), model)
    if as_json(made) != body:
        raise ValueError(f"unknown field in {model}: {body}")
    return made


class PipelinesApi:
    """One installation.

    Attributes:
        namespaces: that there are; none: it has one user.
        pipelines, versions, experiments, runs: what is there, by id; `files` are the bytes of the versions.
        on_look: called with a run before it is read; what goes on in the cluster goes on here.
        faults: methods and paths (regular expressions) -> what to answer instead: statuses, or None to hang up; each
            is used up.
        before: the same -> called once, before the request is dealt with.
        requests: methods and paths, as they came.
        tokens: that are accepted.
    """

    def __init__(self) -> None:
        self.namespaces: set[str] = set()
        self.pipelines: dict[str, api.V2beta1Pipeline] = {}
        self.versions: dict[str, api.V2beta1PipelineVersion] = {}
        self.files: dict[str, bytes] = {}
        self.experiments: dict[str, api.V2beta1Experiment] = {}
        self.runs: dict[str, api.V2beta1Run] = {}
        self.on_look: Callable[[api.V2beta1Run], None] = lambda run: None
        self.faults: dict[str, list[int | None]] = {}
        self.before: dict[str, list[Callable[[], None]]] = {}
        self.requests: list[str] = []
        self.tokens = {"first"}
        self.on_unauthorized: Callable[[], None] = lambda: None
        self.lock = threading.RLock()

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Any:
        """The model to answer with. Raises RefusedError."""
        match method, *path.strip("/").split("/"):
            case "GET", "healthz":
                return api.V2beta1GetHealthzResponse(multi_user=bool(self.namespaces))
            case "GET", "pipelines", "names", name:
                found = [it for it in self.pipelines.values() if it.name == unquote(name)]
                return self._one([it for it in found if (it.namespace or "") == self._allowed(query.get("namespace"))])
            case "POST", "pipelines":
                return self.add_pipeline(strictly("V2beta1Pipeline", body))
            case "GET", "pipelines", pipeline, "versions":
                return self._versions_of(pipeline, query)
            case "POST", "pipelines", "upload_version":
                return self.add_version(query["pipelineid"], query["name"], body)
            case "GET", "experiments":
                return self._experiments_named(query)
            case "POST", "experiments":
                return self.add_experiment(strictly("V2beta1Experiment", body))
            case "POST", "runs":
                return self._start(strictly("V2beta1Run", body))
            case "GET", "runs", run:
                found_run = self._one([self.runs[run]] if run in self.runs else [])
                self.on_look(found_run)
                return found_run
        raise RefusedError(404, 5, f"there is no {path}")

    def add_pipeline(self, pipeline: api.V2beta1Pipeline) -> api.V2beta1Pipeline:
        self._allowed(pipeline.namespace)
        same = [it for it in self.pipelines.values() if (it.name, it.namespace) == (pipeline.name, pipeline.namespace)]
        if same:
            raise RefusedError(409, 6, f"Already exist error: The name {pipeline.name} already exist")
        pipeline.pipeline_id, pipeline.created_at = f"pipeline-{len(self.pipelines) + 1}", _START
        self.pipelines[pipeline.pipeline_id] = pipeline
        return pipeline

    def add_version(self, pipeline: str, name: str, file: bytes) -> api.V2beta1PipelineVersion:
        self._one([self.pipelines[pipeline]] if pipeline in self.pipelines else [])
        if any((it.pipeline_id, it.name) == (pipeline, name) for it in self.versions.values()):
            raise RefusedError(409, 6, f"Already exist error: The name {name} already exist")
        documents = list(yaml.safe_load_all(file))
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline,
            pipeline_version_id=f"version-{len(self.versions) + 1}",
            name=name,
            display_name=name,
            created_at=_START,
            pipeline_spec={"pipeline_spec": documents[0], "platform_spec": documents[1] if documents[1:] else {}},
        )
        self.versions[version.pipeline_version_id], self.files[version.pipeline_version_id] = version, file
        return version

    def add_experiment(self, experiment: api.V2beta1Experiment) -> api.V2beta1Experiment:
        self._allowed(experiment.namespace)
        if any(
            (it.display_name, it.namespace) == (experiment.display_name, experiment.namespace)
            for it in self.experiments.values()
        ):
            raise RefusedError(409, 6, f"Already exist error: The name {experiment.display_name} already exist")
        experiment.experiment_id = f"experiment-{len(self.experiments) + 1}"
        experiment.storage_state = experiment.storage_state or api.V2beta1ExperimentStorageState.AVAILABLE
        self.experiments[experiment.experiment_id] = experiment
        return experiment

    def _start(self, run: api.V2beta1Run) -> api.V2beta1Run:
        if run.experiment_id not in self.experiments:
            raise RefusedError(400, 3, "Invalid input error: the experiment does not exist")
        version = self.versions.get(run.pipeline_version_reference.pipeline_version_id)
        if version is None or version.pipeline_id != run.pipeline_version_reference.pipeline_id:
            raise RefusedError(404, 5, "ResourceNotFoundError: PipelineVersion not found")
        run.run_id, run.state, run.created_at = f"run-{len(self.runs) + 1}", api.V2beta1RuntimeState.PENDING, _START
        self.runs[run.run_id] = run
        return run

    def _versions_of(self, pipeline: str, query: Mapping[str, str]) -> api.V2beta1ListPipelineVersionsResponse:
        those = [it for it in self.versions.values() if it.pipeline_id == pipeline]
        assert query.get("sort_by") == "created_at desc"
        first = int(query.get("page_token") or 0)
        after = first + _AT_ONCE
        return api.V2beta1ListPipelineVersionsResponse(
            pipeline_versions=those[first:after] or None,
            total_size=len(those),
            next_page_token=str(after) if after < len(those) else None,
        )

    def _experiments_named(self, query: Mapping[str, str]) -> api.V2beta1ListExperimentsResponse:
        namespace = self._allowed(query.get("namespace"))
        wanted = strictly("V2beta1Filter", json.loads(query["filter"]))
        (predicate,) = wanted.predicates
        assert (predicate.operation, predicate.key) == (api.V2beta1PredicateOperation.EQUALS, "display_name")
        found = [
            it
            for it in self.experiments.values()
            if it.display_name == predicate.string_value and (it.namespace or "") == namespace
        ]
        return api.V2beta1ListExperimentsResponse(experiments=found or None, total_size=len(found))

    def _allowed(self, namespace: str | None) -> str:
        if namespace and namespace not in self.namespaces:
            raise RefusedError(404, 5, f'namespaces "{namespace}" not found')
        if self.namespaces and not namespace:
            raise RefusedError(400, 3, "Invalid input error: a namespace is needed in multi-user mode")
        return namespace or ""

    def _one(self, found: list[Any]) -> Any:
        if not found:
            raise RefusedError(404, 5, "ResourceNotFoundError: not found")
        return found[0]


@contextmanager
def serving(it: PipelinesApi) -> Iterator[str]:
    """The API on a port of its own; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            url = urlsplit(self.path)
            body = self._body()
            assert url.path.startswith(ROOT)
            path = url.path.removeprefix(ROOT)
            line = f"{self.command} {path}"
            with it.lock:
                it.requests.append(line)
                try:
                    if self.headers.get("Authorization") not in {f"Bearer {token}" for token in it.tokens}:
                        it.on_unauthorized()
                        raise RefusedError(401, 16, "Unauthenticated: there is no user identity in the request")
                    for pattern, calls in it.before.items():
                        if calls and re.fullmatch(pattern, line):
                            calls.pop(0)()
                    for pattern, answers in it.faults.items():
                        if answers and re.fullmatch(pattern, line):
                            status = answers.pop(0)
                            if status is None:
                                self.close_connection = True
                                return
                            raise RefusedError(status, 2, f"fault {status}")
                    self._reply(200, it.answer(self.command, path, dict(parse_qsl(url.query)), body))
                except RefusedError as refused:
                    self._reply(refused.status, api.GoogleRpcStatus(code=refused.code, message=str(refused)))

        def _body(self) -> Any:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = self.headers.get("Content-Type") or ""
            if kind.startswith("multipart/form-data"):
                whole = b"Content-Type: " + kind.encode() + b"\r\n\r\n" + data
                (part,) = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(whole).iter_parts()
                assert part.get_param("name", header="Content-Disposition") == "uploadfile"
                return part.get_payload(decode=True)
            return json.loads(data) if data else None

        def _reply(self, status: int, model: Any) -> None:
            answer = json.dumps(as_json(model)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/pipeline"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
