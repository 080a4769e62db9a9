"""What a real MLflow server holds after a step: which run, nested where, ended how; and what promotion registers."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import tiny
from masking import plain_logits
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.utils.rest_utils import MlflowHostCreds

from moeprune import tracking
from moeprune.checkpoint.identity import close_fingerprint
from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError, ServiceError
from moeprune.evaluation.report import Candidate, DataSet, Quality, Report
from moeprune.promotion import judge
from moeprune.services import Services
from moeprune.steps import promote as step
from moeprune.steps.close_run import close_run

PARENT = "mlflow.parentRunId"


@pytest.fixture
def client(connected: Services, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Of the real server, with an experiment of this test's own."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"test-{uuid4().hex[:8]}")
    return MlflowClient(connected.mlflow, connected.mlflow)


def runs(client: MlflowClient) -> list[Run]:
    """Of the test's experiment, the first to start first."""
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []


class TestWhichRun:
    def test_none_where_mlflow_is_not_configured(self, tmp_path: Path) -> None:
        assert not tracking.is_configured()
        with tracking.step("calibrate", {"a": 1}) as run:
            run.metrics({"b": 1.0})
            run.tags({"c": "d"})
            run.artifact(tmp_path)
            run.text("e", "f")
            run.dataset("name", "address", "0" * 32, "calibration", 3)
            assert run.url is None

    def test_one_of_its_own(self, client: MlflowClient) -> None:
        with tracking.step("calibrate", {"model": "M", "ratio": 0.5}) as run:
            assert client.get_run(run.run_id).info.status == "RUNNING"
            assert run.parent.run_id == run.run_id
        (found,) = runs(client)
        assert found.info.run_id == run.run_id
        assert (found.info.run_name, found.info.status) == ("calibrate", "FINISHED")
        assert found.data.params == {"model": "M", "ratio": "0.5"}
        assert found.data.tags["moeprune.step"] == "calibrate"
        assert PARENT not in found.data.tags
        assert run.url == f"{os.environ['MLFLOW_TRACKING_URI']}/#/experiments/{run.experiment_id}/runs/{run.run_id}"

    def test_nested_under_the_pipeline_s(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        with tracking.pipeline_run("prune", {"ratio": 0.5}) as parent:
            for name in ("calibrate", "cluster"):
                with tracking.step(name, {}) as run:
                    assert run.parent.run_id == parent.run_id
        assert tracking.PARENT_RUN_VARIABLE not in os.environ
        found = {run.info.run_name: run for run in runs(client)}
        assert found.keys() == {"prune", "calibrate", "cluster"}
        assert PARENT not in found["prune"].data.tags
        assert found["prune"].data.params == {"ratio": "0.5"}
        assert {found[name].data.tags[PARENT] for name in ("calibrate", "cluster")} == {parent.run_id}
        assert {run.info.status for run in found.values()} == {"FINISHED"}

    def test_under_the_parent_that_the_environment_names(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tracking.step("outer", {}) as outer:
            monkeypatch.setenv("MOEPRUNE_PARENT_RUN_ID", outer.run_id)
            monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", "would otherwise be used")
            with tracking.step("inner", {}):
                pass
        assert {run.info.run_name: run.data.tags.get(PARENT) for run in runs(client)} == {
            "outer": None,
            "inner": outer.run_id,
        }

    def test_the_one_that_kubeflow_made(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        experiment = client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        parent = client.create_run(experiment).info.run_id
        made = client.create_run(experiment, run_name="kubeflow's", tags={PARENT: parent}).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        monkeypatch.setenv("MOEPRUNE_PARENT_RUN_ID", "another")
        with tracking.step("calibrate", {"model": "M"}) as run:
            run.metrics({"seconds": 3.0})
            assert (run.run_id, run.parent.run_id) == (made, parent)
        assert {run.info.run_id for run in runs(client)} == {made, parent}
        found = client.get_run(made)
        assert (found.info.status, found.info.run_name) == ("RUNNING", "kubeflow's")
        assert (found.data.params, found.data.metrics) == ({"model": "M"}, {"seconds": 3.0})

    def test_kubeflow_s_is_not_ended_by_a_failure_either(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = client.create_run(client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        with pytest.raises(InputError), tracking.step("calibrate", {}):
            raise InputError("the text is too short")
        found = client.get_run(made)
        assert found.info.status == "RUNNING"
        assert found.data.tags["error"] == "the text is too short"

    def test_one_for_each_kubeflow_run(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracking, "_SECONDS_FOR_OTHERS", 0.0)
        for pipeline_run in ("11111111-aaaa", "22222222-bbbb"):
            monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", pipeline_run)
            for name in ("calibrate", "cluster"):
                with tracking.step(name, {}):
                    pass
        found = runs(client)
        parents = {
            run.data.tags["moeprune.pipeline_run"]: run.info.run_id
            for run in found
            if "moeprune.pipeline_run" in run.data.tags
        }
        assert parents.keys() == {"11111111-aaaa", "22222222-bbbb"}
        nested = [(run.info.run_name, run.data.tags[PARENT]) for run in found if PARENT in run.data.tags]
        assert sorted(nested) == sorted((name, run) for run in parents.values() for name in ("calibrate", "cluster"))
        assert len(found) == 6

    def test_one_for_a_kubeflow_run_whose_steps_come_at_once(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each looks before any has made a run, and makes one; whichever they choose, it is the same."""
        monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", "33333333-cccc")
        together = threading.Barrier(4)
        look = tracking._runs_of_pipeline
        seen: list[str] = []

        def look_together(*arguments: Any) -> list[str]:
            found = look(*arguments)
            if not found:
                together.wait(30)
            return found

        def run_step(name: str) -> None:
            with tracking.step(name, {}) as run:
                seen.append(run.parent_id)

        monkeypatch.setattr(tracking, "_runs_of_pipeline", look_together)
        clock = SimpleNamespace(time=time.time, sleep=lambda seconds: together.wait(30))
        monkeypatch.setattr(tracking, "time", clock)
        client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        steps = [threading.Thread(target=run_step, args=(f"calibrate-{number}",)) for number in range(4)]
        for thread in steps:
            thread.start()
        for thread in steps:
            thread.join()
        assert len(seen) == 4
        assert len(set(seen)) == 1
        parents = [run.info.run_id for run in runs(client) if "moeprune.pipeline_run" in run.data.tags]
        assert parents == seen[:1]

    @pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
    def test_one_of_a_kubeflow_run_ends_as_that_does(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        monkeypatch.setattr(tracking, "_SECONDS_FOR_OTHERS", 0.0)
        monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", f"44444444-{status}")
        with tracking.step("calibrate", {}) as step:
            pass
        orphan = client.create_run(step.experiment_id, tags={PARENT: step.parent_id}).info.run_id
        assert client.get_run(step.parent_id).info.status == "RUNNING"
        close_run(status, "out of memory" if status == "FAILED" else "")
        parent = client.get_run(step.parent_id)
        assert parent.info.status == status
        assert parent.data.tags.get("error") == ("out of memory" if status == "FAILED" else None)
        assert client.get_run(step.run_id).info.status == "FINISHED"
        assert client.get_run(orphan).info.status == "KILLED"

    def test_none_is_made_to_be_ended(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", "55555555")
        close_run("FAILED")
        assert not runs(client)

    def test_in_the_experiment_that_the_environment_names(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = client.create_experiment(f"given-{uuid4().hex}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", given)
        with tracking.step("calibrate", {}) as run:
            assert client.get_run(run.run_id).info.experiment_id == given


class TestHowItEnds:
    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (InputError("the ratio is too large"), "FAILED", "the ratio is too large"),
            (RuntimeError("out of memory"), "FAILED", "out of memory"),
            (KeyboardInterrupt(), "KILLED", None),
            (SystemExit(143), "KILLED", None),
        ],
    )
    def test_a_step_and_its_pipeline(
        self, client: MlflowClient, error: BaseException, status: str, said: str | None
    ) -> None:
        with pytest.raises(type(error)), tracking.pipeline_run("prune", {}), tracking.step("calibrate", {}):
            raise error
        found = runs(client)
        assert len(found) == 2
        assert {run.info.status for run in found} == {status}
        assert {run.data.tags.get("error") for run in found} == {said}
        assert tracking.PARENT_RUN_VARIABLE not in os.environ

    def test_a_step_that_had_no_time_to_end_its_run(self, client: MlflowClient) -> None:
        with pytest.raises(KeyboardInterrupt), tracking.pipeline_run("prune", {}) as parent:  # noqa: PT012
            client.create_run(parent.experiment_id, run_name="orphan", tags={PARENT: parent.run_id})
            raise KeyboardInterrupt
        assert {run.info.run_name: run.info.status for run in runs(client)} == {"prune": "KILLED", "orphan": "KILLED"}

    def test_a_parent_of_before_is_the_parent_again(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MOEPRUNE_PARENT_RUN_ID", "of before")
        with tracking.pipeline_run("prune", {}):
            pass
        assert os.environ["MOEPRUNE_PARENT_RUN_ID"] == "of before"


class TestWhatIsLogged:
    def test_everything_is_there(self, client: MlflowClient, tmp_path: Path) -> None:
        (tmp_path / "some").mkdir()
        (tmp_path / "some" / "file.json").write_text("{}")
        (tmp_path / "page.html").write_text("<html>")
        with tracking.step("evaluate", {"long": "x" * 7000}) as run:
            run.metrics({"loss_nats": 1.5, "perplexity": math.inf})
            for step, error in enumerate([0.5, 0.25]):
                run.metrics({"training_error": error}, step)
            run.artifact(tmp_path / "page.html")
            run.artifact(tmp_path / "some", "folder")
            run.text("content", "plan.json")
            figure = Figure()
            figure.subplots().plot([1, 2])
            run.figure(figure, "use")
            run.dataset("code", "builtin://code", "0123456789abcdef" * 2, "calibration", 99)
        found = client.get_run(run.run_id)
        assert found.data.metrics["loss_nats"] == 1.5
        assert found.data.metrics["perplexity"] > 1e300
        history = client.get_metric_history(run.run_id, "training_error")
        assert [(metric.step, metric.value) for metric in history] == [(0, 0.5), (1, 0.25)]
        assert set(found.data.params["long"]) == {"x"}
        stored = {
            item.path for folder in (None, "folder", "figures") for item in client.list_artifacts(run.run_id, folder)
        }
        assert {"page.html", "folder/file.json", "plan.json", "figures/use.png"} <= stored
        (data,) = found.inputs.dataset_inputs
        assert (data.dataset.name, data.dataset.digest) == ("code", "0123456789abcdef" * 2)
        assert "builtin://code" in data.dataset.source
        assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "calibration")]

    def test_names_that_mlflow_does_not_take(self, client: MlflowClient) -> None:
        with tracking.step("evaluate", {}) as run:
            run.metrics({"pruned.code+prose.loss_nats": 1.0, "été/x-y z.w": 2.0})
        assert client.get_run(run.run_id).data.metrics == {"pruned.code_prose.loss_nats": 1.0, "été/x-y z.w": 2.0}


class TestServersThatDoNotServe:
    @pytest.mark.parametrize(
        ("uri", "manager"),
        [
            ("http://127.0.0.1:9", tracking.step),
            ("http://no.such.host.invalid:5000", tracking.pipeline_run),
            ("nonsense://x", tracking.step),
        ],
    )
    def test_one_that_does_not_answer_is_told_in_seconds(
        self, uri: str, manager: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        started = time.monotonic()
        with pytest.raises(ServiceError, match=re.escape(uri)) as raised, manager("calibrate", {}):
            pytest.fail("work was begun")
        assert "\n" not in str(raised.value)
        assert time.monotonic() - started < 15

    def test_a_run_that_does_not_exist(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
        with pytest.raises(ServiceError, match="0000"), tracking.step("calibrate", {}):
            pytest.fail("work was begun")

    def test_a_deleted_experiment(self, client: MlflowClient) -> None:
        client.delete_experiment(client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"]))
        for manager in (tracking.step("calibrate", {}), tracking.pipeline_run("prune", {})):
            with pytest.raises(ServiceError, match="is deleted; restore it"), manager:
                pytest.fail("work was begun")

    def test_a_parameter_of_another_value(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        made = client.create_run(client.create_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])).info.run_id
        client.log_param(made, "model", "one")
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        with pytest.raises(ServiceError, match="does not take"), tracking.step("calibrate", {"model": "other"}):
            pytest.fail("work was begun")

    @pytest.mark.parametrize(("error", "expected"), [(InputError("too short"), "too short"), (None, "does not take")])
    def test_one_that_goes_away_does_not_hide_what_went_wrong(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, error: InputError | None, expected: str
    ) -> None:
        gone = MlflowHostCreds("http://127.0.0.1:9")
        kind = type(error) if error else ServiceError
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(kind, match=expected), tracking.step("calibrate", {}) as run:  # noqa: PT012
            assert run.client is not None
            monkeypatch.setattr(run.client._tracking_client.store, "get_host_creds", lambda: gone)
            if error:
                raise error
            run.metrics({"seconds": 1.0})


# Promotion


def report(loss: float, weights: str = "") -> Report:
    def candidate(name: str, loss_nats: float) -> Candidate:
        quality = Quality(loss_nats=loss_nats, perplexity=math.exp(loss_nats), accuracy=0.5, tokens=10)
        return Candidate(
            name=name,
            address=name,
            weights=weights,
            experts_per_layer={"layer": 4},
            parameters=10,
            bytes_on_disk=10,
            tokens_per_second=1.0,
            quality={"code": quality},
        )

    data = [DataSet(name="code", address="builtin://code", blocks=1, tokens=10, fingerprint="0")]
    return Report(domain="code", data=data, candidates=[candidate("original", 1.0), candidate("pruned", loss)])


@pytest.mark.parametrize(
    ("loss", "allowed", "passes"),
    [(1.2, 0.25, True), (1.25, 0.25, True), (1.26, 0.25, False), (0.5, 0.0, True), (math.inf, 9.0, False)],
)
def test_the_gate(loss: float, allowed: float, passes: bool) -> None:
    verdict = judge(report(loss), "pruned", allowed)
    assert verdict.passed == passes
    assert verdict.loss_increase_nats == pytest.approx(loss - 1)
    assert ("nothing was registered" in verdict.sentence) != passes


def test_a_model_whose_loss_is_no_number_does_not_pass() -> None:
    assert not judge(report(math.nan), "pruned", 100.0).passed


@pytest.mark.parametrize(("candidate", "said"), [("original", "is the original"), ("distilled", "original, pruned")])
def test_what_cannot_be_judged(candidate: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        judge(report(1.1), candidate, 0.25)


def test_promotion_needs_a_registry(tmp_path: Path, qwen: Path) -> None:
    report(1.1).save(tmp_path / "report.json")
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        step.promote(str(tmp_path / "report.json"), str(qwen), "model")


class TestPromotion:
    @pytest.fixture
    def name(self) -> str:
        return f"model-{uuid4().hex[:8]}"

    @pytest.fixture
    def promote(self, client: MlflowClient, qwen: Path, tmp_path: Path, name: str) -> Callable[..., Any]:
        def run(loss: float, **options: Any) -> Any:
            report(loss, close_fingerprint(Checkpoint(qwen).files)).save(tmp_path / "report.json")
            return step.promote(str(tmp_path / "report.json"), str(qwen), name, max_loss_increase_nats=0.25, **options)

        return run

    def test_a_good_model_is_registered_and_can_be_fetched(
        self, client: MlflowClient, promote: Callable[..., Any], name: str, qwen: Path, tmp_path: Path
    ) -> None:
        verdict = promote(1.1)
        assert (verdict.passed, verdict.version) == (True, "1")
        version = client.get_model_version_by_alias(name, "champion")
        assert str(version.version) == "1"
        fetched = download_artifacts(artifact_uri=f"models:/{name}@champion", dst_path=str(tmp_path))
        ids_BS = tiny.token_ids(0)
        expected = plain_logits(Checkpoint(qwen).load(), ids_BS)
        assert (plain_logits(Checkpoint(Path(fetched)).load(), ids_BS) == expected).all()
        (run,) = runs(client)
        assert run.data.metrics == {"gate_passed": 1.0, "loss_increase_nats": pytest.approx(0.1)}
        assert "registered as" in run.data.tags["gate"]
        assert version.run_id == run.info.run_id

    def test_a_better_one_takes_the_alias_over(
        self, client: MlflowClient, promote: Callable[..., Any], name: str
    ) -> None:
        promote(1.2)
        assert promote(1.1).version == "2"
        assert str(client.get_model_version_by_alias(name, "champion").version) == "2"
        assert promote(1.1, alias="challenger").version == "3"
        assert str(client.get_model_version_by_alias(name, "champion").version) == "2"
        assert str(client.get_model_version_by_alias(name, "challenger").version) == "3"

    def test_a_bad_one_is_not_registered_and_the_runs_say_so(
        self, client: MlflowClient, promote: Callable[..., Any], name: str
    ) -> None:
        with tracking.pipeline_run("prune", {}):
            verdict = promote(1.5)
        assert (verdict.passed, verdict.version) == (False, "")
        assert not client.search_registered_models(f"name = '{name}'")
        for run in runs(client):
            assert "gate failed" in run.data.tags["gate"]
            assert "nothing was registered" in run.data.tags["gate"]
            assert run.info.status == "FINISHED"
            assert not client.list_artifacts(run.info.run_id)

    def test_a_bad_one_leaves_the_champion_where_it_is(
        self, client: MlflowClient, promote: Callable[..., Any], name: str
    ) -> None:
        promote(1.1)
        promote(1.5)
        assert str(client.get_model_version_by_alias(name, "champion").version) == "1"
        assert len(client.search_model_versions(f"name = '{name}'")) == 1

    def test_another_than_was_measured_is_not_registered(
        self, client: MlflowClient, checkpoint_of: Callable[[str], Path], qwen: Path, tmp_path: Path, name: str
    ) -> None:
        report(1.1, close_fingerprint(Checkpoint(qwen).files)).save(tmp_path / "report.json")
        with pytest.raises(InputError, match="is not what was measured as 'pruned'"):
            step.promote(str(tmp_path / "report.json"), str(checkpoint_of("mixtral")), name)
        assert not client.search_registered_models(f"name = '{name}'")

    def test_a_name_that_the_registry_refuses(self, connected: Services, qwen: Path, tmp_path: Path) -> None:
        report(1.1, close_fingerprint(Checkpoint(qwen).files)).save(tmp_path / "report.json")
        with pytest.raises(ServiceError, match="refuses"):
            step.promote(str(tmp_path / "report.json"), str(qwen), "a/b:c")
