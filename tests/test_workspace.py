"""The volume that tasks of a run share: what is on it, who reads it, and that a run by `kfp.local` goes by it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import yaml  # type: ignore[import-untyped]  # kfp brings it
from google.protobuf import json_format
from kfp import dsl
from kfp.pipeline_spec import pipeline_spec_pb2 as specs
from test_sweep import Heard

from moeprune import places, s3
from moeprune.errors import InputError
from moeprune.evaluation.report import Report
from moeprune.pipelines.compile import PIPELINES, compiled, main
from moeprune.pipelines.local_run import run_locally
from moeprune.pipelines.sweep import Outputs, sweep
from moeprune.pipelines.workspace import Workspace, bring_model
from moeprune.services import BUCKET

VOLUME = Workspace("200Gi", storage_class="shared")
READ_THE_MODEL = {"calibrate", "cluster", "global-prune", "distill", "distill-on-nodes", "evaluate"}


@pytest.fixture(scope="module", params=PIPELINES)
def documents(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(compiled(request.param, workspace=VOLUME))
    return spec, platform


class TestCompiled:
    def test_kubeflow_can_read_what_is_asked_for(self, documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
        spec, platform = documents
        json_format.ParseDict(spec, specs.PipelineSpec())
        json_format.ParseDict(spec["deploymentSpec"], specs.PipelineDeploymentConfig())
        json_format.ParseDict(platform, specs.PlatformSpec())
        assert platform["platforms"]["kubernetes"]["pipelineConfig"]["workspace"] == {
            "size": "200Gi",
            "kubernetes": {"pvcSpecPatch": {"accessModes": ["ReadWriteMany"], "storageClassName": "shared"}},
        }

    def test_the_original_is_brought_once_and_read_where_it_was_put(
        self, documents: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        tasks = dict(_tasks(documents[0]))
        assert READ_THE_MODEL & tasks.keys()
        for name in READ_THE_MODEL & tasks.keys():
            assert set(_given(tasks[name], "model", "teacher", "original")) <= {"model", "pipelinechannel--model"}
        whole = next(task for name, task in tasks.items() if name in PIPELINES)
        assert _given(whole, "model") == ["bring"]
        assert {name for name, task in tasks.items() if "bring" in _given(task, *task["inputs"]["parameters"])} == {
            *PIPELINES
        } & tasks.keys()
        assert tasks["bring"]["cachingOptions"] == {}, "what another run brought is on another volume"
        assert tasks["bring"]["inputs"]["parameters"]["workspace"] == {
            "runtimeValue": {"constant": "{{$.workspace_path}}"}
        }

    def test_without_one_nothing_asks_for_it(self) -> None:
        for name in PIPELINES:
            text = compiled(name)
            assert "workspace" not in yaml.safe_load_all(text).__next__()["deploymentSpec"]
            assert "workspace_path" not in text

    def test_by_the_command_that_compiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            sys, "argv", ["compile", str(tmp_path), "--workspace", "200Gi", "--workspace-class", "shared"]
        )
        main()
        assert (tmp_path / "prune.yaml").read_text() == compiled("prune", workspace=VOLUME)

    @pytest.mark.parametrize(
        ("options", "said"),
        [(["--workspace", "much"], "'much'"), (["--workspace-class", "shared"], "has a size, too")],
    )
    def test_it_refuses_what_is_none(
        self, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["compile", "out", *options])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert said in capsys.readouterr().err

    def test_what_brings_is_tried_again_and_is_nobody_s_root(
        self, documents: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        tasks, executors = dict(_tasks(documents[0])), documents[0]["deploymentSpec"]["executors"]
        assert tasks["bring"]["retryPolicy"]["maxRetryCount"] == 2
        assert executors["exec-bring"]["container"]["resources"]["resourceMemoryLimit"]
        pods = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert pods["exec-bring"]["securityContext"]["runAsNonRoot"]

    @pytest.mark.parametrize(
        "wrong", [{"size": ""}, {"size": "0Gi"}, {"size": "200 GB"}, {"size": "1Gi", "access_mode": "Many"}]
    )
    def test_of_no_size_or_mode(self, wrong: dict[str, str]) -> None:
        with pytest.raises(InputError, match="a workspace"):
            Workspace(**wrong)


class TestBringing:
    @pytest.fixture
    def remote(self, client: Any, qwen: Path, request: pytest.FixtureRequest) -> str:
        address = f"s3://{BUCKET}/workspace/{request.node.name}/model"
        with places.output(address) as path:
            path.symlink_to(qwen)
        return address

    def test_a_model_from_elsewhere_is_there_as_it_was(self, remote: str, qwen: Path, tmp_path: Path) -> None:
        now = Path(places.brought(remote, tmp_path))
        assert now.is_relative_to(tmp_path)
        assert {p.name: p.read_bytes() for p in now.iterdir()} == {p.name: p.read_bytes() for p in qwen.iterdir()}
        assert places.origin(str(now)) == remote

    def test_it_is_brought_once(self, remote: str, tmp_path: Path) -> None:
        first = Path(places.brought(remote, tmp_path))
        (first / "config.json").write_text("kept")
        assert places.brought(remote, tmp_path) == str(first)
        assert (first / "config.json").read_text() == "kept"

    def test_another_version_is_another_model(self, remote: str, qwen: Path, tmp_path: Path) -> None:
        first = places.brought(remote, tmp_path)
        (tmp_path / "config.json").write_text("{}")
        s3.upload(tmp_path / "config.json", f"{remote}/config.json")
        second = places.brought(remote, tmp_path)
        assert second != first
        assert (Path(second) / "config.json").read_text() == "{}"

    def test_what_a_killed_one_left_is_not_taken_for_it(self, remote: str, qwen: Path, tmp_path: Path) -> None:
        now = Path(places.brought(remote, tmp_path)).parent
        left = now.with_name(f".{now.name}.unfinished") / now.name
        left.parent.mkdir()
        now.rename(left)
        (left / "model" / "model.safetensors.half").write_text("half")
        (left / "model" / "config.json").unlink()
        again = Path(places.brought(remote, tmp_path))
        assert {p.name for p in again.iterdir()} == {p.name for p in qwen.iterdir()}
        assert [p.name for p in now.parent.iterdir()] == [now.name]

    def test_from_the_hub(self, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot(repository: str, *, local_dir: Path, **_: object) -> str:
            assert repository == "owner/name"
            return str(shutil.copytree(qwen, local_dir))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        now = Path(places.brought("owner/name", tmp_path))
        assert (now / "config.json").read_bytes() == (qwen / "config.json").read_bytes()
        assert places.origin(str(now)) == "owner/name"

    def test_one_that_is_here_stays_where_it_is(self, qwen: Path, tmp_path: Path) -> None:
        for address in (str(qwen), places.REFERENCE_MODEL):
            assert places.brought(address, tmp_path) == address
            assert places.origin(address) == address
        assert not list(tmp_path.iterdir())

    def test_there_is_none(self, client: Any, tmp_path: Path) -> None:
        for address in (f"s3://{BUCKET}/none", str(tmp_path / "none")):
            with pytest.raises(InputError):
                places.brought(address, tmp_path / "workspace")
        assert not list(tmp_path.glob("workspace/models/*"))


class _Thief(Heard):
    """Takes the model away once it was brought."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def finished(self, step: str) -> None:
        super().finished(step)
        if step == "bring":
            s3.remove(self._address)


def test_a_run_reads_nothing_but_what_was_brought(client: Any, qwen: Path, tmp_path: Path) -> None:
    address = f"s3://{BUCKET}/workspace/run/model"
    with places.output(address) as path:
        path.symlink_to(qwen)
    text = tiny.write_jsonl(tmp_path / "domain.jsonl", tiny.sentences(1, 40))
    arguments = {
        "model": address,
        "data": str(text),
        "evaluation_data": [str(text)],
        "methods": ["reap"],
        "ratios": [0.5],
        "block_tokens": tiny.BLOCK_TOKENS,
        "calibration_blocks": 8,
        "distillation_blocks": 8,
        "distillation_epochs": 1,
        "evaluation_blocks": 8,
    }

    steps = sweep()

    def around() -> Any:
        made = steps(**arguments | {"model": bring_model(address)})
        return Outputs(**{name: made.outputs[name] for name in Outputs._fields})

    around.__annotations__["return"] = Outputs  # kfp wants the type, not its name
    pipeline = dsl.pipeline(around, name="around", pipeline_config=dsl.PipelineConfig(VOLUME.config()))
    heard = _Thief(address)
    with (tmp_path / "log").open("w") as log:
        made = run_locally(pipeline, {}, outputs=tmp_path / "out", cache=tmp_path / "cache", log=log, watcher=heard)
    assert heard.finished_steps[0] == "bring"
    report = Report.load(Path(made["report"].path))
    assert report.candidates[0].address == address, "the record says where the model is from"
    original, pruned = (candidate.experts for candidate in report.candidates)
    assert pruned * 2 == original


def _tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).items()


def _given(task: dict[str, Any], *names: str) -> list[str]:
    """What each of these inputs of a task is from: the task that makes it, or the input that is handed on."""
    parameters = task["inputs"]["parameters"]
    given = [parameters[name] for name in names if name in parameters]
    return [
        str(it.get("taskOutputParameter", {}).get("producerTask", it.get("componentInputParameter"))) for it in given
    ]
