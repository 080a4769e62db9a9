"""MLflow behind one small door: a run per step, nested under the run of the pipeline, or nothing where MLflow is not
configured.

Which run a step logs to, first that applies:

    MLFLOW_RUN_ID            the run that whoever started the step made for it, and will end
    MOEPRUNE_PARENT_RUN_ID   a run nested under that one, as `moeprune run` sets it
    MOEPRUNE_PIPELINE_RUN    a run nested under the one that all steps with the same value share, which the first step
                             to come makes, and `end_run_of_pipeline` ends
    MLFLOW_TRACKING_URI      a run of its own
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import InputError, MoepruneError, ServiceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

PARENT_RUN_VARIABLE = "MOEPRUNE_PARENT_RUN_ID"
PIPELINE_RUN_VARIABLE = "MOEPRUNE_PIPELINE_RUN"
_PIPELINE_RUN_TAG = "moeprune.pipeline_run"
_PARENT_TAG = "mlflow.parentRunId"
_DEFAULT_EXPERIMENT = "moeprune"
# The UI shows runs, metrics and figures first, not the evaluation of prompts.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_LONGEST_PARAM = 6000  # MLflow's limit
_SECONDS_FOR_OTHERS = 3.0  # longer than MLflow takes to make a run
_MOST_POINTS = 500  # of a curve; MLflow takes 1000 at once, and a screen shows no more


@contextmanager
def _plainly() -> Iterator[None]:
    """Make a ServiceError of whatever MLflow's client, its HTTP library or its artifact store raise."""
    try:
        yield
    except MoepruneError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        where = os.environ.get("MLFLOW_TRACKING_URI")
        raise ServiceError(f"the MLflow server at {where} does not take what the step tells it: {reason}") from error


@dataclass(frozen=True)
class TrackedRun:
    """One MLflow run to log to; without a client, logging does nothing. Its methods raise ServiceError."""

    client: MlflowClient | None = None
    run_id: str = ""
    experiment_id: str = ""
    parent_id: str = ""

    @property
    def parent(self) -> TrackedRun:
        """The run of the whole pipeline; the run itself where it has no parent."""
        return TrackedRun(self.client, self.parent_id or self.run_id, self.experiment_id)

    @property
    def url(self) -> str | None:
        """Where a browser shows the run."""
        if not self.client:
            return None
        return f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @_plainly()
    def params(self, values: Mapping[str, Any]) -> None:
        if self.client:
            from mlflow.entities import Param

            self.client.log_batch(self.run_id, params=[Param(k, str(v)[:_LONGEST_PARAM]) for k, v in values.items()])

    @_plainly()
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if self.client:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            # Names of data are part of some names, and MLflow does not take every character.
            named = {re.sub(r"[^\w. :/-]", "_", key): float(value) for key, value in values.items()}
            self.client.log_batch(self.run_id, metrics=[Metric(k, v, now, step) for k, v in named.items()])

    @_plainly()
    def curve(self, name: str, values: Sequence[float]) -> None:
        """A metric at steps from 0 on; of a long curve, points at equal distances."""
        if self.client and values:
            from mlflow.entities import Metric

            now, apart = int(time.time() * 1000), -(-len(values) // _MOST_POINTS)
            points = [Metric(name, float(values[step]), now, step) for step in range(0, len(values), apart)]
            self.client.log_batch(self.run_id, metrics=points)

    @_plainly()
    def tags(self, values: Mapping[str, str]) -> None:
        if self.client:
            for key, value in values.items():
                self.client.set_tag(self.run_id, key, value)

    @_plainly()
    def figure(self, figure: Figure, name: str) -> None:
        """Store a figure as `figures/<name>.png`."""
        if self.client:
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png")

    @_plainly()
    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or everything in a directory."""
        if self.client and path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        elif self.client:
            self.client.log_artifact(self.run_id, str(path), folder)

    @_plainly()
    def text(self, text: str, name: str) -> None:
        if self.client:
            self.client.log_text(self.run_id, text, name)

    @_plainly()
    def dataset(self, name: str, address: str, fingerprint: str, context: str, tokens: int) -> None:
        """Log which data went in. MLflow shows it beside the run, and whether two runs saw the same."""
        if self.client:
            import json

            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = json.dumps({"uri": address})
            profile = json.dumps({"tokens": tokens})
            # MLflow takes digests of at most 36 characters.
            dataset = Dataset(name, fingerprint[:36], "local", source, schema=None, profile=profile)
            self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    @_plainly()
    def end(self, status: str) -> None:
        if self.client:
            self.client.set_terminated(self.run_id, status)


def is_configured() -> bool:
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def connect() -> MlflowClient:
    """A client of the configured server, which has just answered.

    Raises:
        InputError: MLflow is not installed.
        ServiceError: it does not answer, or refuses.
    """
    # A server that is not there is told in seconds, not after MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # we say it ourselves, where it helps
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError(
            "MLFLOW_TRACKING_URI is set, but MLflow is not installed: pip install 'moeprune[tracking]'"
        ) from error
    try:
        client = MlflowClient()
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise ServiceError(
            f"the MLflow server at {os.environ['MLFLOW_TRACKING_URI']} does not answer "
            f"({str(error).splitlines()[0][:200]}); start it, or unset MLFLOW_TRACKING_URI to run without"
        ) from error
    return client


def _experiment(client: MlflowClient) -> str:
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _DEFAULT_EXPERIMENT
    for _ in range(2):  # another step may make it between our look and our try
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage != "active":
                raise ServiceError(f"the MLflow experiment {name} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME")
            return found.experiment_id
        try:
            return client.create_experiment(name, tags=_EXPERIMENT_TAGS)
        except MlflowException:
            continue
    raise ServiceError(f"the MLflow experiment {name} can neither be found nor made")


@contextmanager
def step(name: str, params: Mapping[str, Any]) -> Iterator[TrackedRun]:
    """The run of one step. It ends as FINISHED, FAILED (with the error as a tag) or, on Ctrl-C, KILLED.

    Raises:
        ServiceError: MLflow is configured and does not answer; told before the step spends time.
    """
    if not is_configured():
        yield TrackedRun()
        return
    client = connect()
    given = os.environ.get("MLFLOW_RUN_ID")
    with _plainly():
        if given:
            run = client.get_run(given)
            tracked = TrackedRun(client, given, run.info.experiment_id, run.data.tags.get(_PARENT_TAG, ""))
        else:
            experiment = _experiment(client)
            parent = os.environ.get(PARENT_RUN_VARIABLE) or _run_of_pipeline(client, experiment)
            tags = {_PARENT_TAG: parent} if parent else {}
            made = client.create_run(experiment, run_name=name, tags=tags)
            tracked = TrackedRun(client, made.info.run_id, experiment, parent)
    with _ending(tracked, owned=not given):
        tracked.tags({"moeprune.step": name})
        tracked.params(params)
        yield tracked


@contextmanager
def pipeline_run(name: str, params: Mapping[str, Any]) -> Iterator[TrackedRun]:
    """The parent run of a whole pipeline; the steps started inside the block nest under it."""
    client = connect()
    with _plainly():
        experiment = _experiment(client)
        made = client.create_run(experiment, run_name=name)
    tracked = TrackedRun(client, made.info.run_id, experiment)
    before = os.environ.get(PARENT_RUN_VARIABLE)
    os.environ[PARENT_RUN_VARIABLE] = tracked.run_id
    try:
        with _ending(tracked, owned=True), _no_orphans(tracked):
            tracked.params(params)
            yield tracked
    finally:
        os.environ.pop(PARENT_RUN_VARIABLE)
        if before is not None:
            os.environ[PARENT_RUN_VARIABLE] = before


@contextmanager
def _ending(run: TrackedRun, owned: bool) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # SystemExit is how SIGTERM may come. That MLflow does not answer any more must not hide the error itself.
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(ServiceError):
            if not interrupted:
                run.tags({"error": str(error)[:500]})
            if owned:
                run.end("KILLED" if interrupted else "FAILED")
        raise
    if owned:
        run.end("FINISHED")


@contextmanager
def _no_orphans(parent: TrackedRun) -> Iterator[None]:
    """After an error, end the runs of steps that had no time to do so themselves."""
    try:
        yield
    except BaseException:
        with suppress(ServiceError), _plainly():
            _end_orphans(parent)
        raise


def _end_orphans(parent: TrackedRun) -> None:
    assert parent.client is not None
    query = f"tags.`{_PARENT_TAG}` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    for run in parent.client.search_runs([parent.experiment_id], query):
        parent.client.set_terminated(run.info.run_id, "KILLED")


def _run_of_pipeline(client: MlflowClient, experiment: str) -> str:
    """The parent run of this pipeline's run, made by whichever step comes first; empty outside a pipeline.

    Steps that come at once each make one. None looks again before what the others made can be seen, so that all choose
    the same of them, whatever their clocks say, and the others are removed.
    """
    pipeline_run = os.environ.get(PIPELINE_RUN_VARIABLE)
    if not pipeline_run:
        return ""
    found = _runs_of_pipeline(client, experiment, pipeline_run)
    if found:
        return found[0]
    made = client.create_run(
        experiment, run_name=f"prune-{pipeline_run[:8]}", tags={_PIPELINE_RUN_TAG: pipeline_run}
    ).info.run_id
    time.sleep(_SECONDS_FOR_OTHERS)
    chosen = next(iter(_runs_of_pipeline(client, experiment, pipeline_run)), made)
    if chosen != made:
        client.delete_run(made)
    return chosen


def _runs_of_pipeline(client: MlflowClient, experiment: str, pipeline_run: str) -> list[str]:
    """The parent runs that were made for a run of a pipeline, in an order that all steps see alike."""
    found = client.search_runs([experiment], f"tags.`{_PIPELINE_RUN_TAG}` = '{pipeline_run}'")
    return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]


def end_run_of_pipeline(status: str, error: str = "") -> TrackedRun:
    """End the parent run of this pipeline's run, and what its steps had no time to end.

    A run that somebody else made for the step, or that no step has made, is left alone; what comes back then logs
    nothing.

    Args:
        status: FINISHED, FAILED or KILLED.
        error: what went wrong, for its tag.

    Raises:
        ServiceError: MLflow is configured and does not answer, or refuses.
    """
    pipeline_run = os.environ.get(PIPELINE_RUN_VARIABLE)
    if not is_configured() or not pipeline_run:
        return TrackedRun()
    client = connect()
    with _plainly():
        experiment = _experiment(client)
        found = _runs_of_pipeline(client, experiment, pipeline_run)
        if not found:
            return TrackedRun()
        run = TrackedRun(client, found[0], experiment)
        _end_orphans(run)
    if error:
        run.tags({"error": error[:500]})
    run.end(status)
    return run
