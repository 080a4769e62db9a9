"""Components: what each hands to its step, and what becomes of what comes back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from moeprune.components.calibrate import calibrate
from moeprune.components.close_run import close_run
from moeprune.components.cluster import cluster
from moeprune.components.combine import combine
from moeprune.components.compare import compare
from moeprune.components.distill import distill
from moeprune.components.distill_on_nodes import distill_on_nodes
from moeprune.components.evaluate import evaluate
from moeprune.components.global_prune import global_prune
from moeprune.components.merge_distilled import merge_distilled
from moeprune.components.merge_stats import merge_stats
from moeprune.components.prepare import prepare
from moeprune.components.promote import promote
from moeprune.components.spread import spread
from moeprune.errors import InputError
from moeprune.evaluation.report import Quality
from moeprune.promotion import Verdict
from moeprune.statistics import Stats
from moeprune.steps.evaluate import models_in
from moeprune.train_job import Nodes, OnNodes


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
        asked = {"teacher": "M", "student": student, "plan": plan, "data": "D", "distilled": distilled}
        asked |= {"nodes": 3, "volume": "work"}
        where = distill_on_nodes.python_func(
            **asked,
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
            distill_on_nodes.python_func(**asked, node_options={"memori": "64Gi"})

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
