"""`moeprune run`, `up` and `down`: real servers, real steps, each in its process."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import tiny
from mlflow import MlflowClient
from mlflow.entities import Run

from moeprune.evaluation.report import Report
from moeprune.services import Services, down, running, up
from moeprune.services.ports import free_ports

PROGRAM = [sys.executable, "-c", "from moeprune.cli import main; main()", "run"]
BLOCKS = ("--block-tokens", tiny.BLOCK_TOKENS)
STEPS = ["calibrate", "cluster", "prune", "distill", "evaluate", "promote"]  # of which MLflow is told


@dataclass(frozen=True)
class House:
    """A state directory with its servers running, a model, and texts."""

    state: Path
    services: Services
    model: Path
    texts: Path

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return start(self.state, self.model, self.texts, *arguments)

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(self.services.mlflow)


class Outcome:
    """What a run said, and what MLflow knows of it."""

    def __init__(self, house: House, process: subprocess.Popen[str]) -> None:
        self.out, self.err = process.communicate(timeout=300)
        self.code = process.returncode
        named = re.search(r"fuse-[\d.]+-\d{8}-\d{6}", self.out + self.err)
        assert named, self.out + self.err
        (experiment,) = house.mlflow.search_experiments(filter_string="name = 'moeprune'")
        found = house.mlflow.search_runs([experiment.experiment_id])
        (self.parent,) = (run for run in found if run.info.run_name == named[0])
        self.steps = {
            run.info.run_name: run
            for run in found
            if run.data.tags.get("mlflow.parentRunId") == self.parent.info.run_id
        }


def start(state: Path, model: Path, texts: Path, *arguments: object) -> subprocess.Popen[str]:
    """`moeprune run` as a shell on a terminal starts it: as the leader of a process group."""
    given = (
        "--data",
        texts / "domain.jsonl",
        "--evaluation-data",
        f"{texts / 'held-out.jsonl'},{texts / 'other.jsonl'}",
    )
    command = [*PROGRAM, "--state", state, "--model", model, *given, *BLOCKS, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"COLUMNS": "140"},  # as wide as the table of a run
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def write_texts(directory: Path) -> Path:
    for seed, (name, count) in enumerate({"domain": 60, "held-out": 30, "other": 30}.items()):
        tiny.write_jsonl(directory / f"{name}.jsonl", tiny.sentences(seed, count))
    return directory


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, qwen: Path) -> Iterator[House]:
    state = tmp_path_factory.mktemp("state of runs")
    try:
        services = up(state / "services", *free_ports(2))
        yield House(state, services, qwen, write_texts(tmp_path_factory.mktemp("texts")))
    finally:
        down(state / "services")


GATE = ("--registered-model", "tiny", "--max-loss-increase")


@pytest.fixture(scope="module")
def at_work(house: House) -> Iterator[subprocess.Popen[str]]:
    """The first run, on its way: a run leaves a core to others, and the tests that need no result of it come first."""
    with house.start("--ratio", 0.5, "--baselines", "frequency", *GATE, 100) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def first(house: House, at_work: subprocess.Popen[str]) -> Outcome:
    """A run that passes the gate."""
    return Outcome(house, at_work)


@pytest.fixture(scope="module")
def second(house: House, first: Outcome) -> Outcome:
    """One at another ratio, with nothing to compare with, that does not pass the gate."""
    return Outcome(house, house.start("--ratio", 0.25, "--baselines", "", *GATE, -100))


def artifacts(house: House, run: Run) -> set[str]:
    """What is stored on S3 for a run."""
    client = boto3.client(
        "s3",
        endpoint_url=house.services.s3,
        aws_access_key_id=house.services.access_key,
        aws_secret_access_key=house.services.secret_key,
        region_name="us-east-1",
    )
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="mlflow").get("Contents", [])]
    return {key.partition(f"{run.info.run_id}/artifacts/")[2] for key in keys if run.info.run_id in key}


def report_of(house: House, outcome: Outcome) -> Report:
    return Report.load(house.state / "reports" / outcome.parent.info.run_name / "report.json")


def test_a_step_that_fails_is_one_sentence(house: House, at_work: object, tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    rows = (texts / "domain.jsonl").read_text().splitlines()
    # Further down than the checks before the run look.
    (texts / "domain.jsonl").write_text("\n".join([*rows[:40], '{"id": 41, "body": "no text"}', *rows[40:]]) + "\n")
    outcome = Outcome(house, start(house.state, house.model, texts, "--ratio", 0.125))
    assert outcome.code == 1
    sentence, log = outcome.err.splitlines()
    assert sentence.startswith("moeprune: calibrate: ")
    assert "row 41" in sentence
    assert "Traceback" in (house.state / "logs" / f"{outcome.parent.info.run_name}.log").read_text()
    assert outcome.parent.info.run_name in log
    assert "Traceback" not in outcome.out
    assert outcome.parent.info.status == "FAILED"
    assert "row 41" in outcome.parent.data.tags["error"]
    assert {name: run.info.status for name, run in outcome.steps.items()} == {"calibrate": "FAILED"}


def test_ctrl_c_in_a_step_leaves_nothing(at_work: object, tmp_path: Path, qwen: Path) -> None:
    texts, state = write_texts(tmp_path), tmp_path / "state"
    tiny.write_jsonl(texts / "domain.jsonl", tiny.sentences(0, 30_000))  # takes longer than this test
    mlflow_port, s3_port = free_ports(2)
    ports = ("--mlflow-port", mlflow_port, "--s3-port", s3_port)
    process = start(state, qwen, texts, *ports, "--calibration-blocks", 20_000)
    assert process.stdout
    assert any("calibrate: " in line for line in process.stdout)  # it is at work
    of_run = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.splitlines() == ["moeprune: interrupted; nothing was left half-written"]
    assert len(of_run) > 3  # the servers, what steps are forked from, and the step
    assert not of_run & parents().keys()
    assert processes_that_mention(str(tmp_path), f"port={mlflow_port}", f"port={s3_port}") == []
    assert not [*state.rglob("*writing*"), *state.rglob("*unfinished*")]
    assert not list(state.glob("runs/*/*/calibrate/stats"))
    with sqlite3.connect(state / "services" / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("KILLED",), ("KILLED",)]


def parents() -> dict[int, int]:
    """Of each living process."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listing.splitlines())
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(of: int) -> set[int]:
    """The processes that one has started, and those that these have."""
    found, parent_of = {of}, parents()
    while more := {pid for pid, parent in parent_of.items() if parent in found} - found:
        found |= more
    return found - {of}


def processes_that_mention(*words: str) -> list[str]:
    """Command lines of living processes with one of the words in them."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    return [row for row in listing.splitlines() if any(word in row for word in words) and not row.startswith("Z")]


class TestARun:
    def test_ends_with_the_table_and_addresses(self, house: House, first: Outcome) -> None:
        assert first.code == 0, first.out + first.err
        assert first.err == ""
        for step in (
            "services",
            "prepare",
            "calibrate",
            "merge-stats",
            "cluster",
            "global-prune",
            "spread",
            "distill",
            "merge-distilled",
            "evaluate",
            "promote",
        ):
            assert re.search(rf"^{step} +\d+\.\d s", first.out, re.MULTILINE), step
        assert re.search(r"original +pruned +distilled +frequency", first.out)
        assert "held-out (pruned for)" in first.out
        assert "registered as tiny version 1" in first.out
        assert f"{house.services.mlflow}/#/experiments/1/runs/{first.parent.info.run_id}" in first.out
        assert f"reports/{first.parent.info.run_name}/report.html" in first.out

    def test_leaves_nothing_half_written(self, house: House, first: Outcome) -> None:
        """Nor does the run that failed meanwhile."""
        assert not [*house.state.rglob("*writing*"), *house.state.rglob("*unfinished*")]

    def test_is_quiet(self, first: Outcome) -> None:
        for noise in ("KFP", "Executing", "INFO", "WARN", "Warning", "Traceback", "executor_input", "View run"):
            assert noise not in first.out, noise

    def test_says_how_far_a_step_is(self, first: Outcome) -> None:
        assert re.search(r"^  evaluate: 4/4$", first.out, re.MULTILINE)

    def test_report(self, house: House, first: Outcome) -> None:
        report = report_of(house, first)
        assert [candidate.name for candidate in report.candidates] == ["original", "pruned", "distilled", "frequency"]
        assert [candidate.experts for candidate in report.candidates] == [24, 12, 12, 12]
        assert report.domains == ["held-out", "other"]
        page = (house.state / "reports" / first.parent.info.run_name / "report.html").read_text()
        assert page.lstrip().startswith("<!")
        assert "frequency" in page

    def test_the_log_has_what_the_screen_has_not(self, house: House, first: Outcome) -> None:
        log = (house.state / "logs" / f"{first.parent.info.run_name}.log").read_text()
        assert log.count("KFP Executor") > len(STEPS)
        assert "\x1b" not in log
        for secret in (house.services.access_key, house.services.secret_key):
            assert secret not in log

    def test_mlflow_has_a_run_of_the_pipeline_and_one_of_each_step(self, first: Outcome) -> None:
        assert first.parent.info.status == "FINISHED"
        assert first.parent.data.params["ratio"] == "0.5"
        assert first.parent.data.metrics["distilled.held-out.perplexity"] > 1
        assert first.parent.data.tags["moeprune.reused"] == "nothing"
        assert sorted(first.steps) == sorted(STEPS)
        assert {run.info.status for run in first.steps.values()} == {"FINISHED"}
        assert first.steps["promote"].data.metrics["gate_passed"] == 1

    def test_artifacts_are_on_s3(self, house: House, first: Outcome) -> None:
        stored = artifacts(house, first.parent)
        assert {"report.json", "report.html"} <= stored
        assert any(name.startswith("figures/") for name in stored)
        assert {"plan.json", "baselines/frequency.json"} <= artifacts(house, first.steps["prune"])
        assert {"model/config.json", "model/tokenizer.json"} <= artifacts(house, first.steps["promote"])

    def test_the_alias_points_to_the_model(self, house: House, first: Outcome) -> None:
        version = house.mlflow.get_model_version_by_alias("tiny", "champion")
        assert version.run_id == first.steps["promote"].info.run_id


class TestASecondRun:
    def test_does_not_calibrate_again(self, second: Outcome) -> None:
        assert second.code == 0, second.out + second.err
        assert re.search(r"^calibrate: +reused", second.out, re.MULTILINE)
        assert second.parent.data.tags["moeprune.reused"] == "calibrate, merge-stats, cluster"
        assert sorted(second.steps) == ["distill", "evaluate", "promote", "prune"]

    def test_has_its_own_results(self, house: House, second: Outcome) -> None:
        report = report_of(house, second)
        assert [candidate.name for candidate in report.candidates] == ["original", "pruned", "distilled"]
        assert [candidate.experts for candidate in report.candidates] == [24, 18, 18]

    def test_a_gate_that_is_not_passed_registers_nothing(self, house: House, second: Outcome) -> None:
        assert "gate failed" in second.out
        assert "nothing was registered" in second.parent.data.tags["gate"]
        assert [version.version for version in house.mlflow.search_model_versions("name = 'tiny'")] == ["1"]

    def test_leaves_servers_running_that_it_did_not_start(self, house: House, second: Outcome) -> None:
        assert running(house.state / "services")
        assert "servers are stopped" not in second.out


RunCli = Callable[..., tuple[int, str, str]]


class TestBadInput:
    """Told before anything is started: there is not even a state directory."""

    @pytest.fixture
    def refused(self, run_cli: RunCli, qwen: Path, tmp_path: Path) -> Callable[..., str]:
        texts = write_texts(tmp_path)

        def run(*arguments: object, **replaced: object) -> str:
            given = {
                "--model": qwen,
                "--data": texts / "domain.jsonl",
                "--evaluation-data": texts / "held-out.jsonl",
                "--block-tokens": tiny.BLOCK_TOKENS,
                "--state": tmp_path / "state",
            } | {f"--{name.replace('_', '-')}": value for name, value in replaced.items()}
            flat = [part for option, value in given.items() if value is not None for part in (option, value)]
            code, out, err = run_cli("run", *flat, *arguments)
            assert code == 1, out + err
            assert (out, err.count("\n")) == ("", 1)
            assert not (tmp_path / "state").exists()
            return err

        return run

    def test_unknown_method(self, refused: Callable[..., str]) -> None:
        assert "c-prune, cd-moe" in refused("--method", "magic")
        assert "c-prune, cd-moe" in refused("--baselines", "random,magic")

    @pytest.mark.parametrize("ratio", [-0.1, 1])
    def test_ratio_out_of_range(self, refused: Callable[..., str], ratio: float) -> None:
        assert "ratio" in refused("--ratio", ratio)

    def test_ratio_that_leaves_too_few(self, refused: Callable[..., str]) -> None:
        assert "the largest ratio for this model is 0.75" in refused("--ratio", 0.9)

    def test_unknown_option(self, refused: Callable[..., str]) -> None:
        assert "layerwise_share" in refused("--method", "c-prune", "--set", "layerwise=1")

    def test_no_such_model(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "nowhere" in refused(model=tmp_path / "nowhere")

    def test_a_model_without_experts(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "not a Mixture-of-Experts" in refused(model=tiny.write(tmp_path / "dense", tiny.dense_config()))

    def test_no_such_data(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "nowhere.jsonl" in refused(data=tmp_path / "nowhere.jsonl")

    def test_empty_data(self, refused: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").touch()
        assert "is empty" in refused(evaluation_data=tmp_path / "empty.jsonl")

    def test_a_text_shorter_than_a_block(self, refused: Callable[..., str], tmp_path: Path) -> None:
        short = tiny.write_jsonl(tmp_path / "short.jsonl", ["few words"])
        assert "less than one block" in refused(evaluation_data=short)

    def test_texts_of_the_same_name(self, refused: Callable[..., str], tmp_path: Path) -> None:
        twice = f"{tmp_path / 'other.jsonl'},{tmp_path / 'other.jsonl'}"
        assert "same name" in refused(evaluation_data=twice)

    def test_data_without_a_held_out_text(self, refused: Callable[..., str]) -> None:
        assert "--evaluation-data" in refused(evaluation_data=None)

    def test_kubeflow_is_not_installed(self, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith(("moeprune.pipelines", "moeprune.components"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "kfp", None)
        assert "moeprune[local]" in refused()


class TestUpAndDown:
    """The last tests: they stop the servers."""

    def test_up_leaves_what_runs_as_it_is(self, house: House, run_cli: RunCli) -> None:
        code, out, err = run_cli("up", "--state", house.state)
        assert code == 0, err
        assert house.services.mlflow in out
        assert house.services.s3 in out
        assert house.services.secret_key not in out

    def test_a_port_that_is_taken(self, house: House, run_cli: RunCli, tmp_path: Path) -> None:
        ports = ("--mlflow-port", house.services.mlflow.rpartition(":")[2], "--s3-port", *free_ports(1))
        code, _, err = run_cli("up", "--state", tmp_path, *ports)
        assert code == 1
        assert err.startswith("moeprune: port ")
        assert "MLFLOW_PORT" in err

    def test_down(self, house: House, run_cli: RunCli, tmp_path: Path) -> None:
        assert run_cli("down", "--state", tmp_path) == (0, "nothing was running\n", "")
        assert run_cli("down", "--state", house.state) == (0, "stopped\n", "")
        assert running(house.state / "services") is None
