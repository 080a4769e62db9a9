"""The pipeline as Kubeflow gets it: what the launch form shows, what the components call, what is in the YAML."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml  # type: ignore[import-untyped]  # kfp brings it
from kfp import components

from moeprune import places
from moeprune.cli.run import RATIO
from moeprune.cli.run import run as run_command
from moeprune.components.calibrate import calibrate
from moeprune.components.close_run import close_run
from moeprune.components.cluster import cluster
from moeprune.components.combine import combine
from moeprune.components.compare import compare
from moeprune.components.distill import distill
from moeprune.components.distill_on_nodes import distill_on_nodes
from moeprune.components.evaluate import evaluate
from moeprune.components.global_prune import global_prune
from moeprune.components.image import IMAGE
from moeprune.components.merge_distilled import merge_distilled
from moeprune.components.merge_stats import merge_stats
from moeprune.components.prepare import prepare
from moeprune.components.promote import promote
from moeprune.components.spread import spread
from moeprune.errors import InputError
from moeprune.evaluation.report import Quality
from moeprune.pipelines import freshness, processes
from moeprune.pipelines.compile import compiled
from moeprune.pipelines.on_a_cluster import SECRET, VARIABLES
from moeprune.pipelines.prune import prune
from moeprune.promotion import Verdict
from moeprune.services.signals import announced
from moeprune.statistics import Stats
from moeprune.steps.evaluate import models_in
from moeprune.train_job import Nodes, OnNodes
from moeprune.train_job.pod import POD_VARIABLE

REUSABLE = {"prepare", "calibrate", "merge-stats", "cluster"}
STEPS = REUSABLE | {
    "global-prune",
    "spread",
    "distill",
    "merge-distilled",
    "distill-on-nodes",
    "evaluate",
    "promote",
    "close-run",
}
GROUPS = {  # the compiler makes components of them
    "exit-handler-1": {"prune"},
    "prune": {
        "prepare",
        "for-loop-1",
        "merge-stats",
        "cluster",
        "global-prune",
        "condition-branches-2",
        "importer",
        "evaluate",
        "promote",
    },
    "for-loop-1": {"calibrate"},
    "condition-branches-2": {"condition-4", "condition-5"},
    "condition-4": {"spread", "for-loop-3", "merge-distilled"},
    "for-loop-3": {"distill"},
    "condition-5": {"distill-on-nodes"},
}
IMPORTER = "importer"  # Kubeflow's own
SIZES = ("cpus", "memory", "gpus")
CLUSTER_ONLY = {
    "distillation_nodes",
    "distillation_gpus_per_node",
    "distillation_volume",
    "distillation_node_options",
    "distillation_training",
    *(f"{what}_{of}" for what in ("calibration", "pruning", "distillation", "evaluation") for of in SIZES),
    "merging_cpus",
    "merging_memory",
    "gpu_type",
    "node_selector",
    "tolerations",
}

ANOTHER_IMAGE = "registry.example/team/moeprune:7"


@pytest.fixture(scope="module")
def text() -> str:
    return compiled("prune")


@pytest.fixture(scope="module")
def with_another_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled in a process of its own, which draws other hashes."""
    path = tmp_path_factory.mktemp("compiled") / "new"
    command = [sys.executable, "-m", "moeprune.pipelines.compile", str(path)]
    environment = {"MOEPRUNE_IMAGE": ANOTHER_IMAGE, "PYTHONHASHSEED": "2"}
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return (path / "prune.yaml").read_text()


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    return next(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def platform(text: str) -> dict[str, Any]:
    return list(yaml.safe_load_all(text))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def described(definitions: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("parameters", "artifacts"):
        yield from definitions.get(kind, {}).items()


class TestTheYaml:
    def test_every_input_and_output_is_described(self, spec: dict[str, Any]) -> None:
        of_steps = {name.removeprefix("comp-"): component for name, component in spec["components"].items()}
        for group, tasks in GROUPS.items():
            assert of_steps.pop(group)["dag"]["tasks"].keys() == tasks
        assert of_steps.pop(IMPORTER)["executorLabel"] == f"exec-{IMPORTER}"
        assert of_steps.keys() == STEPS
        for name, component in [*of_steps.items(), ("the pipeline", spec["root"])]:
            for side in ("inputDefinitions", "outputDefinitions"):
                for key, definition in described(component.get(side, {})):
                    assert len(definition.get("description", "")) > 8, f"{name}: {key}"
                    assert "\n\n" not in definition["description"], f"{name}: {key}"

    def test_every_parameter_has_a_default(self, spec: dict[str, Any]) -> None:
        """A run can be started from the launch form as it is."""
        for name, definition in spec["root"]["inputDefinitions"]["parameters"].items():
            assert definition.get("isOptional"), name

    def test_the_same_source_gives_the_same_bytes_but_for_the_image(self, text: str, with_another_image: str) -> None:
        assert with_another_image.replace(ANOTHER_IMAGE, IMAGE) == text

    def test_one_image_that_can_be_chosen(self, spec: dict[str, Any], with_another_image: str) -> None:
        def images(of: dict[str, Any]) -> set[str]:
            return {
                executor["container"]["image"]
                for name, executor in of["deploymentSpec"]["executors"].items()
                if name != f"exec-{IMPORTER}"
            }

        assert {image.split(":")[0] for image in images(spec)} == {"moeprune"}
        assert images(next(yaml.safe_load_all(with_another_image))) == {ANOTHER_IMAGE}

    def test_nothing_is_installed_when_a_step_starts(self, text: str) -> None:
        assert "pip install" not in text

    def test_only_what_runs_share_is_cached(self, spec: dict[str, Any]) -> None:
        dags = [spec["root"]["dag"], *(spec["components"][f"comp-{group}"]["dag"] for group in GROUPS)]
        tasks = {name: task for dag in dags for name, task in dag["tasks"].items() if name not in GROUPS}
        assert tasks.keys() == STEPS | {IMPORTER}
        assert {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")} == REUSABLE

    def test_keys_come_from_a_secret_that_may_be_absent(self, spec: dict[str, Any], platform: dict[str, Any]) -> None:
        assert {name.removeprefix("exec-") for name in platform} == STEPS
        for executor in platform.values():
            (secret,) = executor["secretAsEnv"]
            assert secret["secretName"] == SECRET
            assert secret["optional"] is True
            assert {entry["envVar"] for entry in secret["keyToEnv"]} == set(VARIABLES)
            run_id, *_ = executor["fieldPathAsEnv"]
            assert run_id == {"name": "MOEPRUNE_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        for name, executor in spec["deploymentSpec"]["executors"].items():
            assert name == f"exec-{IMPORTER}" or "env" not in executor["container"]

    def test_the_task_of_nodes_shares_their_volume_knows_its_pod_and_is_tried_again(
        self, spec: dict[str, Any], platform: dict[str, Any]
    ) -> None:
        executor = platform["exec-distill-on-nodes"]
        assert executor["fieldPathAsEnv"][1:] == [{"name": POD_VARIABLE, "fieldPath": "metadata.name"}]
        (mount,) = executor["pvcMount"]
        group = spec["components"]["comp-condition-5"]
        volume = mount["pvcNameParameter"]["componentInputParameter"]
        assert volume in group["inputDefinitions"]["parameters"]
        assert volume.endswith("distillation_volume")
        task = group["dag"]["tasks"]["distill-on-nodes"]
        assert mount["mountPath"] == task["inputs"]["parameters"]["volume_path"]["runtimeValue"]["constant"]
        assert task["retryPolicy"]["maxRetryCount"] > 0

    def test_it_loads_again(self, text: str) -> None:
        loaded = components.load_component_from_text(text)
        assert loaded.component_spec.inputs.keys() == prune().component_spec.inputs.keys()
        assert prune().component_spec.outputs.keys() == {"report", "page", "model", "promoted", "verdict"}


class TestTheCommandLine:
    def test_has_an_option_for_every_parameter(self) -> None:
        options = inspect.signature(run_command).parameters
        assert not CLUSTER_ONLY & options.keys()
        for name, spec in prune().component_spec.inputs.items():
            if name in CLUSTER_ONLY:
                continue
            default = options[name].default
            match name:
                case "evaluation_data":  # depends on --data
                    assert default == ""
                case "method_options":
                    assert (default or {}) == spec.default
                case "ratio":  # not given, that one may say it otherwise is seen
                    assert default is None
                    assert spec.default == RATIO
                case "baselines":
                    assert default.split(",") == spec.default
                case _:
                    assert default == spec.default, name


class Artifact:
    """As much of Kubeflow's as a component uses."""

    def __init__(self, name: str, **metadata: object) -> None:
        self.path, self.uri, self.metadata = f"/artifacts/{name}", f"s3://bucket/{name}", dict(metadata)
        self.logged: dict[str, float] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.logged[name] = value


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], list[dict[str, Any]]]:
    """Let a step only note what it is called with, by the names of its parameters, and return what is given here."""

    def replace(name: str, result: object) -> list[dict[str, Any]]:
        module = importlib.import_module(f"moeprune.steps.{name}")
        signature = inspect.signature(getattr(module, name))
        calls: list[dict[str, Any]] = []

        def note(*args: object, **options: object) -> object:
            calls.append(signature.bind(*args, **options).arguments)
            return result

        monkeypatch.setattr(module, name, note)
        return calls

    return replace


class TestComponents:
    """Each makes one call; what it is given arrives under the right name."""

    def test_calibrate(self, called: Callable[..., list[dict[str, Any]]]) -> None:
        calls = called("calibrate", SimpleNamespace(tokens=5, layers=[1, 2]))
        options: dict[str, Any] = {
            "statistics": ["gate"],
            "text_field": "body",
            "sequences": "documents",
            "block_tokens": 3,
            "max_blocks": 4,
            "batch_blocks": 5,
            "shard": 1,
            "shards": 2,
            "dtype": "bfloat16",
            "stay_below": "3GiB",
            "trust_remote_code": True,
        }
        stats = Artifact("stats")
        calibrate.python_func(model="M", data="D", stats=stats, **options)
        options["memory_limit"] = options.pop("stay_below")
        assert calls == [{"model": "M", "data": "D", "out": stats.path, **options}]
        assert stats.metadata == {"model": "M", "data": "D", "tokens": 5, "layers": 2}

    @pytest.mark.parametrize("component", [calibrate, cluster, distill, evaluate, global_prune, merge_stats, promote])
    def test_no_input_has_the_name_of_a_resource(self, component: Any) -> None:
        """Where a resource is a parameter of the pipeline, kfp gives a task an input of this name, over its own."""
        resources = {f"{what}_{of}" for what in ("cpu", "memory") for of in ("limit", "request")}
        assert not resources & component.component_spec.inputs.keys()

    def test_prepare(self) -> None:
        cheap = ["gate", "probe_output", "routed_tokens"]
        assert prepare.python_func(method="frequency", baselines=["random"], shards=2) == [
            {"shard": shard, "statistics": cheap} for shard in range(2)
        ]
        assert prepare.python_func("frequency", [])[0]["statistics"] == cheap
        assert prepare.python_func("frequency", ["reap"])[0]["statistics"] == sorted([*cheap, "gated_norm"])
        with pytest.raises(InputError, match="unknown method"):
            prepare.python_func("frequency", ["magic"])
        with pytest.raises(InputError, match="0 shards"):
            prepare.python_func("frequency", [], 0)

    def test_merge_stats(self, tmp_path: Path) -> None:
        parts, merged = [Artifact("a"), Artifact("b")], Artifact("merged")
        for seed, part in enumerate(parts):
            part.path = str(tmp_path / str(seed))
            tiny.make_stats([[1, 2, 3, 4]], data=f"{seed:032x}").save(Path(part.path))
        merged.path = str(tmp_path / "merged")
        merge_stats.python_func(parts=parts, stats=merged)
        stats = Stats.load(Path(merged.path))
        assert next(iter(stats.layers.values())).count("routed_tokens").tolist() == [2, 4, 6, 8]
        assert merged.metadata == {"tokens": stats.tokens, "layers": 1, "shards": 2}

    def test_cluster(self, called: Callable[..., list[dict[str, Any]]]) -> None:
        calls = called("cluster", SimpleNamespace(counts="3 to 5", layers=[1]))
        stats, clusters = Artifact("stats"), Artifact("clusters")
        options = {
            "similarity": "both",
            "algorithm": "k-means",
            "clusters_per_layer": "auto",
            "model": "M",
            "trust_remote_code": True,
        }
        cluster.python_func(stats=stats, clusters=clusters, **options)
        assert calls == [{"stats": stats.path, "out": clusters.path} | options]
        assert clusters.metadata["clusters_per_layer"] == "3 to 5"

    @pytest.mark.parametrize("baselines", [["frequency", "random"], []])
    def test_global_prune(self, called: Callable[..., list[dict[str, Any]]], baselines: list[str]) -> None:
        made = SimpleNamespace(plan=SimpleNamespace(experts_per_layer={"a": 3, "b": 5}, ratio=0.3), parameters=7)
        calls = called("prune", made)
        stats, clusters, plan, pruned, beside = map(Artifact, ("stats", "clusters", "plan", "pruned", "beside"))
        global_prune.python_func(
            model="M",
            stats=stats,
            clusters=clusters,
            plan=plan,
            pruned=pruned,
            baseline_models=beside,
            data="D",
            method="m",
            ratio=0.3,
            method_options={"a": 1},
            baselines=baselines,
            text_field="t",
            block_tokens=9,
            trial_blocks=3,
            recovery_blocks=5,
            trust_remote_code=True,
        )
        (call,) = calls
        assert call == {
            "model": "M",
            "data": "D",
            "text_field": "t",
            "block_tokens": 9,
            "trial_blocks": 3,
            "recovery_blocks": 5,
            "method": "m",
            "ratio": 0.3,
            "parameters_ratio": 0.0,
            "size": "",
            "stats": stats.path,
            "plan_out": plan.path,
            "model_out": pruned.path,
            "clusters": clusters.path,
            "options": {"a": 1},
            "baselines": baselines,
            "baselines_out": beside.path,
            "trust_remote_code": True,
        }
        assert pruned.metadata["method"] == "m"
        assert (pruned.metadata["fewest_experts"], pruned.metadata["most_experts"]) == (3, 5)

    def test_distill(self, called: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
        calls = called("distill", SimpleNamespace(steps=2))
        student, plan, distilled = Artifact("student", method="m"), Artifact("plan"), Artifact("distilled")
        options = {
            "objective": "experts=1",
            "train": "router",
            "text_field": "body",
            "block_tokens": 3,
            "max_blocks": 4,
            "batch_blocks": 5,
            "learning_rate": 0.5,
            "epochs": 2,
            "part": 1,
            "parts": 3,
            "stay_below": "2GiB",
            "trust_remote_code": True,
        }
        monkeypatch.setenv("MOEPRUNE_WORK", "s3://bucket/unfinished")
        distill.python_func(teacher="M", student=student, plan=plan, data="D", distilled=distilled, **options)
        given = {"teacher": "M", "student": student.path, "plan": plan.path, "data": "D", "out": distilled.path}
        given["work"] = "s3://bucket/unfinished"
        options["memory_limit"] = options.pop("stay_below")
        assert calls == [given | options]
        assert distilled.metadata == {"method": "m", "optimizer_steps": 2}

    def test_merge_distilled(self, called: Callable[..., list[dict[str, Any]]]) -> None:
        calls = called("merge_distilled", SimpleNamespace(steps=2))
        parts, student, distilled = (
            [Artifact("a"), Artifact("b")],
            Artifact("student", method="m"),
            Artifact("distilled"),
        )
        where = merge_distilled.python_func(parts=parts, student=student, distilled=distilled, trust_remote_code=True)
        assert where == "s3://bucket/distilled"
        given = {"parts": ["/artifacts/a", "/artifacts/b"], "student": student.path, "out": distilled.path}
        assert calls == [given | {"trust_remote_code": True}]
        assert distilled.metadata == {"method": "m", "optimizer_steps": 2}

    def test_distill_on_nodes(self, called: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
        calls = called("distill_end_to_end", SimpleNamespace(curve={1: 0.5, 7: 0.4}))
        student, plan, distilled = Artifact("student", method="m"), Artifact("plan"), Artifact("distilled")
        options = {"train": "all", "text_field": "body", "block_tokens": 3, "max_blocks": 4, "trust_remote_code": True}
        where = distill_on_nodes.python_func(
            teacher="M",
            student=student,
            plan=plan,
            data="D",
            distilled=distilled,
            nodes=3,
            volume="work",
            volume_path=str(tmp_path),
            gpus_per_node=8,
            node_options={"memory": "64Gi"},
            training={"objective": "text=1", "learning_rate": 1e-5},
            **options,
        )
        (call,) = calls
        assert call.pop("elsewhere") == OnNodes(
            Nodes.of(count=3, volume="work", volume_path=str(tmp_path), gpus=8, memory="64Gi")
        )
        assert call.pop("training") == {"learning_rate": 1e-5}
        given = {"teacher": "M", "student": student.path, "plan": plan.path, "data": "D", "out": distilled.path}
        assert call == given | options | {"objective": "text=1"}
        assert distilled.metadata == {"method": "m", "optimizer_steps": 7}
        assert where == "s3://bucket/distilled"
        with pytest.raises(InputError, match="memori: not known"):
            distill_on_nodes.python_func(
                teacher="M",
                student=student,
                plan=plan,
                data="D",
                distilled=distilled,
                nodes=3,
                volume="work",
                node_options={"memori": "64Gi"},
            )

    def test_compare(self, called: Callable[..., list[dict[str, Any]]]) -> None:
        calls = called("compare", SimpleNamespace(domain="law", front=[SimpleNamespace(name="reap 0.25")]))
        reports = [Artifact("a", method="reap", ratio=0.25), Artifact("b", method="reap", ratio=0.5)]
        out, page = Artifact("report"), Artifact("page")
        assert compare.python_func(reports=reports, report=out, page=page) == ["reap 0.25"]
        named = {"reap 0.25": "/artifacts/a", "reap 0.5": "/artifacts/b"}
        assert calls == [{"reports": named, "out": out.path, "page_out": page.path}]
        assert out.metadata == {"domain": "law", "front": "reap 0.25"}

    def test_combine(self) -> None:
        made = combine.python_func(["reap", "random"], [0.25, 0.5], {"random": {"seed": 3}})
        assert [(it["method"], it["ratio"], it["options"]) for it in made] == [
            ("reap", 0.25, {}),
            ("reap", 0.5, {}),
            ("random", 0.25, {"seed": 3}),
            ("random", 0.5, {"seed": 3}),
        ]

    @pytest.mark.parametrize(
        ("state", "message", "status"),
        [
            ("FAILED", "out of memory", "FAILED"),
            ("SUCCEEDED", None, "FINISHED"),
            ("CANCELLED", None, "KILLED"),
            ("Error", None, "FAILED"),
        ],
    )
    def test_close_run(
        self, called: Callable[..., list[dict[str, Any]]], state: str, message: str | None, status: str
    ) -> None:
        calls = called("close_run", None)
        close_run.python_func(status=SimpleNamespace(state=state, error_message=message))
        assert calls == [{"status": status, "error": message or ""}]

    def test_spread(self) -> None:
        assert spread.python_func(shards=3) == [0, 1, 2]
        with pytest.raises(ValueError, match="0 shards"):
            spread.python_func(shards=0)

    def test_evaluate(self, called: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
        quality = {"law": Quality(loss_nats=1.5, perplexity=4.5, accuracy=0.4, tokens=9)}
        best = SimpleNamespace(name="distilled", quality=quality)
        report = SimpleNamespace(
            domain="law",
            headline=best,
            candidates=[best],
            loss_increase=lambda _: 0.5,
            bytes_ratio=lambda _: 0.6,
            speed_ratio=lambda _: 1.1,
        )
        calls = called("evaluate", report)
        beside = Artifact("beside")
        beside.path = str(tmp_path)
        (tmp_path / "random").mkdir()
        (tmp_path / "random.json").write_text("a plan")
        options = {
            "text_field": "body",
            "block_tokens": 3,
            "max_blocks": 4,
            "batch_blocks": 5,
            "of_the_run": False,
            "trust_remote_code": True,
        }
        pruned, distilled, clusters = Artifact("pruned", method="m", ratio=0.5), Artifact("distilled"), Artifact("c")
        out, page, metrics = map(Artifact, ("report", "page", "metrics"))
        evaluate.python_func(
            original="M",
            pruned=pruned,
            distilled=distilled,
            baseline_models=beside,
            clusters=clusters,
            data=["D", "E"],
            report=out,
            page=page,
            metrics=metrics,
            **options,
        )
        (call,) = calls
        models = [(model.name, model.address) for model in call.pop("models")]
        assert models == [
            ("original", "M"),
            ("pruned", pruned.path),
            ("distilled", distilled.path),
            ("random", str(tmp_path / "random")),
        ]
        given = {"data": ["D", "E"], "out": out.path, "page_out": page.path, "clusters": clusters.path}
        assert call == given | options
        assert (metrics.logged["loss_increase_nats"], metrics.logged["perplexity"]) == (0.5, 4.5)

    def test_no_baselines_is_no_models(self, tmp_path: Path) -> None:
        assert models_in(str(tmp_path / "absent")) == []

    def test_promote(self, called: Callable[..., list[dict[str, Any]]]) -> None:
        calls = called("promote", Verdict(True, 0.1, "a sentence", "3"))
        report, model = Artifact("report"), Artifact("model")
        outcome = promote.python_func(
            report=report, model=model, registered_model="N", candidate="c", max_loss_increase_nats=0.2, alias="a"
        )
        given = {"report": report.path, "model": model.path, "name": "N", "candidate": "c"}
        assert calls == [given | {"max_loss_increase_nats": 0.2, "alias": "a"}]
        assert outcome == (True, "3", "a sentence")


class TestFreshness:
    """What an earlier run made is used again only while model, data and code are what they were."""

    def test_it_is_the_same_until_something_changes(self, tmp_path: Path) -> None:
        model, data = tmp_path / "model", tmp_path / "data.jsonl"
        model.mkdir()
        (model / "weights").write_text("1")
        data.write_text("2")

        def now() -> str:
            return freshness.state_of(str(model), f"builtin://code,{data}*3")

        first = now()
        assert now() == first
        data.write_text("22")
        second = now()
        assert second != first
        (model / "weights").write_text("11")
        assert now() not in {first, second}

    def test_other_code_is_another_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = freshness.state_of("builtin://reference", "builtin://code")
        (tmp_path / "more.py").write_text("x = 1\n")
        monkeypatch.setattr(freshness.moeprune, "__path__", [*freshness.moeprune.__path__, str(tmp_path)])
        assert freshness.state_of("builtin://reference", "builtin://code") != first

    def test_a_place_that_takes_no_look_is_its_address(self) -> None:
        assert places.version("owner/name") == places.version("owner/name") != places.version("owner/other")


def shell(script: str) -> Callable[[int], subprocess.Popen[bytes]]:
    return lambda out: subprocess.Popen(["sh", "-c", script], stdout=out, stderr=out, start_new_session=True)


def follow(script: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = processes.follow(shell(script), lines.append)
    return code, lines


class TestProcesses:
    def test_output_and_code(self) -> None:
        assert follow("echo one; echo two >&2; exit 7") == (7, ["one", "two"])

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_ctrl_c_ends_all_that_a_step_started(self, stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
        marker = f"{time.time():.6f}"  # a number of seconds to sleep that nobody else sleeps
        trap = "trap '' INT; " if stubborn else ""
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            follow(f"{trap}sleep {marker} & sleep {marker}")
        assert time.monotonic() - started < 5
        listing = subprocess.run(["ps", "-A", "-o", "stat=,args="], capture_output=True, text=True, check=True).stdout
        assert not [row for row in listing.splitlines() if f"sleep {marker}" in row and not row.startswith("Z")]

    def test_a_thread_hears_of_ctrl_c_too(self) -> None:
        """Shards run in threads of kfp's, which no signal reaches."""
        stopping, ended = threading.Event(), []

        def step() -> None:
            try:
                processes.follow(shell("sleep 60"), lambda _: None, stopping)
            except KeyboardInterrupt:
                ended.append(True)

        thread = threading.Thread(target=step)
        thread.start()
        with pytest.raises(KeyboardInterrupt), announced(stopping):
            signal.raise_signal(signal.SIGINT)
        thread.join(5)
        assert ended == [True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
