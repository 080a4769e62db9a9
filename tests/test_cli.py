"""The command line: each step, one after another; and a sentence, and nothing else, for what a user can give wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from masking import plain_logits
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from moeprune import __version__, places
from moeprune.checkpoint.loading import Checkpoint
from moeprune.clusters import Clusters
from moeprune.evaluation.report import Report
from moeprune.methods import METHODS
from moeprune.plan import Plan
from moeprune.services import BUCKET, Services
from moeprune.statistics import Stats

Run = Callable[..., tuple[int, str, str]]
COMMANDS = [
    "calibrate",
    "merge-stats",
    "cluster",
    "plan",
    "apply",
    "recover",
    "distill",
    "evaluate",
    "promote",
    "methods",
    "experts",
]
BLOCKS = ("--block-tokens", tiny.BLOCK_TOKENS)
FOR = ("--for", "c-prune", "--for", "frequency")
BATCHES = ("--batch-blocks", 8)  # more than one of them, to be shared
PROGRAM = [sys.executable, "-c", "from moeprune.cli import main; main()"]


def in_a_process(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def succeeds(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert code == 0, err
    return out


class Walk:
    """A directory in which the steps have been taken, one after another."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        self.root, self.model, self.data = root, model, data
        self.stats, self.clusters, self.plan = root / "stats", root / "clusters", root / "plan.json"
        self.pruned, self.distilled = root / "pruned", root / "distilled"
        self.report, self.page = root / "report.json", root / "report.html"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, qwen: Path, corpus: Path) -> Walk:
    return Walk(tmp_path_factory.mktemp("walk"), qwen, corpus)


class TestAWalk:
    """In this order, and with MLflow looking on."""

    @pytest.fixture(autouse=True)
    def _experiment(self, connected: Services, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "walk")

    def test_calibrate(self, walk: Walk, run_cli: Run) -> None:
        out = succeeds(
            run_cli(
                *("calibrate", "--model", walk.model, "--data", walk.data, "--out", walk.stats, *BLOCKS, *BATCHES),
                *("--groups", 3, *FOR),
            )
        )
        stats = Stats.load(walk.stats)
        assert f"{stats.tokens:,} tokens" in out
        assert stats.tokens > 1000
        assert stats.model == Checkpoint(walk.model).fingerprint

    def test_shards_add_up_to_it(self, walk: Walk, run_cli: Run) -> None:
        parts = [walk.root / f"part-{shard}" for shard in range(2)]
        for shard, part in enumerate(parts):
            options = ("--groups", 3, *FOR, "--shard", shard, "--shards", 2)
            succeeds(
                run_cli(
                    "calibrate", "--model", walk.model, "--data", walk.data, "--out", part, *BLOCKS, *BATCHES, *options
                )
            )
        succeeds(run_cli("merge-stats", *parts, "--out", walk.root / "merged"))
        assert (walk.root / "merged").read_bytes() == walk.stats.read_bytes()

    def test_cluster(self, walk: Walk, run_cli: Run) -> None:
        options = ("--clusters-per-layer", 3, "--algorithm", "k-means")
        out = succeeds(run_cli("cluster", "--stats", walk.stats, "--out", walk.clusters, *options))
        clusters = Clusters.load(walk.clusters)
        assert (clusters.counts, clusters.algorithm) == ("3", "k-means")
        assert "3 clusters in each of 3 layers" in out

    def test_plan(self, walk: Walk, run_cli: Run) -> None:
        given = ("--stats", walk.stats, "--clusters", walk.clusters, "--set", "layerwise_share=0.5")
        out = succeeds(run_cli("plan", "make", "--method", "c-prune", "--ratio", 0.5, *given, "--out", walk.plan))
        plan = Plan.load(walk.plan)
        assert plan.options["layerwise_share"] == 0.5
        assert sum(plan.experts_per_layer.values()) == 12
        assert "removes 50.0%" in out

    def test_apply(self, walk: Walk, run_cli: Run) -> None:
        out = succeeds(run_cli("apply", "--model", walk.model, "--plan", walk.plan, "--out", walk.pruned))
        pruned, plan = Checkpoint(walk.pruned), Plan.load(walk.plan)
        assert pruned.experts_per_layer == plan.experts_per_layer
        assert ("trust_remote_code=True" in out) == (not plan.is_uniform)

    def test_distill(self, walk: Walk, run_cli: Run) -> None:
        given = ("--teacher", walk.model, "--student", walk.pruned, "--plan", walk.plan, "--data", walk.data)
        out = succeeds(run_cli("distill", *given, "--out", walk.distilled, *BLOCKS, "--learning-rate", 0.02))
        before, after = (float(part.split()[-1 if place == 0 else 0]) for place, part in enumerate(out.split("->")))
        assert after < before
        logits = plain_logits(Checkpoint(walk.distilled).load(), tiny.token_ids(0))
        assert not torch.equal(logits, plain_logits(Checkpoint(walk.pruned).load(), tiny.token_ids(0)))

    def test_evaluate(self, walk: Walk, run_cli: Run) -> None:
        held_out = tiny.write_jsonl(walk.root / "held-out.jsonl", tiny.sentences(77, 20))
        models = ("--model", walk.model, "--model", walk.pruned, "--model", f"recovered={walk.distilled}")
        texts = ("--data", held_out, "--data", "builtin://arithmetic/held-out", "--clusters", walk.clusters)
        out = succeeds(
            run_cli("evaluate", *models, *texts, *BLOCKS, "--max-blocks", 6, "--out", walk.report, "--page", walk.page)
        )
        report = Report.load(walk.report)
        assert [candidate.name for candidate in report.candidates] == ["original", "pruned", "recovered"]
        assert report.domains == ["held-out", "arithmetic"]
        assert [candidate.method for candidate in report.candidates] == [None, "c-prune", "c-prune"]
        assert report.candidates[0].experts == 24
        assert report.candidates[1].experts == 12
        assert report.expert_use.keys() == {"held-out", "arithmetic"}
        assert walk.page.read_text().startswith("<!doctype html>") or "<html" in walk.page.read_text()
        assert all(name in out for name in ("original", "pruned", "recovered"))

    def test_promote(self, walk: Walk, run_cli: Run) -> None:
        given = ("promote", "--report", walk.report, "--model", walk.distilled, "--candidate", "recovered")
        out = succeeds(run_cli(*given, "--name", "walked", "--max-loss-increase", 100))
        assert "registered as walked version 1" in out
        code, out, err = run_cli(*given, "--name", "unwalked", "--max-loss-increase", -100)
        assert code == 3
        assert "gate failed" in out
        assert not err

    def test_mlflow_has_a_run_of_each_step(self, walk: Walk, connected: Services) -> None:
        client = MlflowClient(connected.mlflow)
        experiment = client.get_experiment_by_name("walk")
        assert experiment is not None
        found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert found.keys() == {"calibrate", "cluster", "plan", "apply", "distill", "evaluate", "promote"}
        assert {run.info.status for run in found.values()} == {"FINISHED"}

        def stored(step: str) -> set[str]:
            run = found[step].info.run_id
            return {item.path for folder in (None, "figures") for item in client.list_artifacts(run, folder)}

        for step, metrics, artifacts in (
            ("calibrate", {"calibration_tokens", "throughput_tokens_per_second"}, set()),
            ("cluster", {"clusters_per_layer_used"}, {"figures/expert_similarity.png"}),
            ("plan", {"removed_experts_share"}, {"plan.json"}),
            ("apply", {"size_on_disk_mb", "parameters"}, set()),
            ("distill", {"layer_error_before_share", "learning_rate", "memory_peak_mb"}, set()),
            ("evaluate", {"original.held-out.loss_nats", "recovered.arithmetic.perplexity"}, {"report.json"}),
        ):
            assert metrics <= found[step].data.metrics.keys(), step
            assert artifacts <= stored(step), step
        assert len([path for path in stored("evaluate") if path.endswith(".png")]) >= 3
        for step in ("calibrate", "distill"):
            assert [data.dataset.name for data in found[step].inputs.dataset_inputs] == ["corpus"]
        assert found["plan"].data.params["ratio"] == "0.5"
        assert found["calibrate"].data.params["model"] == str(walk.model)

    def test_the_same_on_s3(self, walk: Walk, run_cli: Run, connected: Services) -> None:
        there = f"s3://{BUCKET}/walk"
        for name, path in (("model", walk.model), ("text.jsonl", walk.data)):
            with places.output(f"{there}/{name}") as local:
                local.symlink_to(path)
        given = ("--model", f"{there}/model")
        options = (*BLOCKS, "--groups", 3)
        succeeds(run_cli("calibrate", *given, "--data", f"{there}/text.jsonl", "--out", f"{there}/stats", *options))
        chosen = ("--method", "frequency", "--ratio", 0.25)
        succeeds(run_cli("plan", "make", *chosen, "--stats", f"{there}/stats", "--out", f"{there}/plan.json"))
        succeeds(run_cli("apply", *given, "--plan", f"{there}/plan.json", "--out", f"{there}/pruned"))
        with places.local_file(f"{there}/stats") as path:
            stats, expected = Stats.load(path), Stats.load(walk.stats)
            assert (stats.model, stats.data, stats.tokens) == (expected.model, expected.data, expected.tokens)
        with places.local_model(f"{there}/pruned") as directory:
            assert set(Checkpoint(directory).experts_per_layer.values()) == {6}
            assert plain_logits(Checkpoint(directory).load(), tiny.token_ids(0)).isfinite().all()

    def test_nothing_but_the_outputs_is_left(self, walk: Walk) -> None:
        outputs = {"stats", "clusters", "plan.json", "pruned", "distilled", "report.json", "report.html"}
        assert {path.name for path in walk.root.iterdir()} == outputs | {"part-0", "part-1", "merged", "held-out.jsonl"}


class TestBadInput:
    """Exit code 1, one line on standard error, and nothing where the output was to be."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        (tmp_path / "outputs").mkdir()
        return tmp_path / "outputs" / "out"

    @pytest.fixture
    def refused(self, run_cli: Run, out: Path) -> Callable[..., str]:
        def run(*arguments: object) -> str:
            before = sorted(out.parent.rglob("*"))
            code, _, err = run_cli(*arguments)
            assert code == 1, err
            assert err.startswith("moeprune: "), err
            assert err.count("\n") == 1, err
            assert err.endswith("\n")
            assert sorted(out.parent.rglob("*")) == before
            return err

        return run

    @pytest.fixture
    def given(self, qwen: Path, corpus: Path, out: Path) -> dict[str, Any]:
        return {"--model": qwen, "--data": corpus, "--out": out, "--block-tokens": tiny.BLOCK_TOKENS}

    @pytest.fixture
    def calibrate(self, refused: Callable[..., str], given: dict[str, Any]) -> Callable[..., str]:
        def run(**changes: object) -> str:
            options = given | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
            return refused("calibrate", *(part for pair in options.items() for part in pair))

        return run

    # calibrate: the model

    def test_a_model_without_experts(self, calibrate: Callable[..., str], tmp_path: Path) -> None:
        dense = tiny.write(tmp_path / "dense", tiny.dense_config())
        assert "not a Mixture-of-Experts" in calibrate(model=dense)

    def test_a_model_that_is_not_there(self, calibrate: Callable[..., str], tmp_path: Path) -> None:
        assert "is not a directory" in calibrate(model=tmp_path / "nothing")
        assert "no config.json" in calibrate(model=tmp_path)
        assert "no built-in model" in calibrate(model="builtin://nothing")

    def test_a_model_on_a_hub_that_cannot_be_reached(self, calibrate: Callable[..., str]) -> None:
        assert "hub" in calibrate(model="owner/name")

    def test_a_model_without_a_tokenizer(self, calibrate: Callable[..., str], tmp_path: Path) -> None:
        tiny.build(tiny.FAMILIES["qwen2_moe"]()).save_pretrained(tmp_path / "bare")
        assert "tokenizer" in calibrate(model=tmp_path / "bare")

    def test_a_missing_shard(self, calibrate: Callable[..., str], tmp_path: Path) -> None:
        sharded = tiny.write(tmp_path / "sharded", tiny.FAMILIES["qwen2_moe"](), shard="20KB")
        next(iter(sharded.glob("model-00002-*"))).unlink()
        assert "model-00002" in calibrate(model=sharded)

    # calibrate: the text

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("empty.jsonl", b"", "is empty"),
            ("empty.txt", b"", "less than one block"),
            ("short.txt", b"the end", "less than one block of 24"),
            ("broken.jsonl", b'{"text": "a"}\n{"text"', "cannot be read as jsonl"),
            ("binary.jsonl", b"\xff\xfe\x00", "cannot be read as jsonl"),
            ("binary.txt", b"\xff\xfe\x00", "not readable as UTF-8"),
            ("broken.parquet", b"PAR1", "cannot be read as parquet"),
            ("other.jsonl", b'{"body": "a"}\n', "no text in the field 'text'"),
            ("some.pdf", b"%PDF", "unknown kind"),
        ],
    )
    def test_text_that_is_none(
        self, name: str, content: bytes, said: str, calibrate: Callable[..., str], tmp_path: Path
    ) -> None:
        (tmp_path / name).write_bytes(content)
        assert said in calibrate(data=tmp_path / name)

    def test_text_that_is_not_there(self, calibrate: Callable[..., str], tmp_path: Path) -> None:
        assert "there is no file" in calibrate(data=tmp_path / "nothing.jsonl")
        assert "unknown built-in text" in calibrate(data="builtin://poetry")
        assert "hub" in calibrate(data="owner/name")

    def test_impossible_numbers(self, calibrate: Callable[..., str]) -> None:
        assert "must be positive" in calibrate(block_tokens=1)
        assert "must be positive" in calibrate(max_blocks=0)
        assert "at least 1" in calibrate(groups=0)
        assert "at least 1" in calibrate(batch_blocks=0)
        assert "counted from 0" in calibrate(shard=2, shards=2)
        assert "has no data" in calibrate(shard=999, shards=1000)

    # calibrate: the services

    def test_no_s3_credentials(
        self, calibrate: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for option in ("model", "data", "out"):
            assert "no S3 credentials" in calibrate(**{option: "s3://bucket/key.jsonl"})

    def test_a_wrong_s3_key(
        self, calibrate: Callable[..., str], connected: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for option in ("model", "data", "out"):
            assert "S3 refuses" in calibrate(**{option: "s3://moeprune/key.jsonl"})

    def test_an_mlflow_that_does_not_answer(
        self, calibrate: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        started = time.monotonic()
        assert "http://127.0.0.1:9 does not answer" in calibrate()
        assert time.monotonic() - started < 15

    # plan

    @pytest.fixture(scope="class")
    @classmethod
    def stats(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("stats") / "stats"
        tiny.make_stats([[1] * 8] * 3).save(path)
        return path

    @pytest.mark.parametrize(
        ("ratio", "said"),
        [
            ("-0.1", "at least 0 and below 1, not -0.1"),
            ("1.0", "at least 0 and below 1, not 1"),
            ("1.5", "at least 0 and below 1, not 1.5"),
            ("nan", "at least 0 and below 1"),
            ("0.9", "leaves fewer than the 2 that run for each token; the largest ratio for this model is 0.75"),
        ],
    )
    def test_a_ratio_that_cannot_be(
        self, ratio: str, said: str, refused: Callable[..., str], stats: Path, out: Path
    ) -> None:
        assert said in refused(
            "plan", "make", "--method", "frequency", "--ratio", ratio, "--stats", stats, "--out", out
        )

    def test_an_unknown_method_or_option(self, refused: Callable[..., str], stats: Path, out: Path) -> None:
        given = ("--ratio", 0.5, "--stats", stats, "--out", out)
        told = refused("plan", "make", "--method", "magic", *given)
        assert "unknown method 'magic'" in told
        assert all(name in told for name in METHODS)
        assert "its options: seed" in refused("plan", "make", "--method", "random", "--set", "colour=red", *given)

    def test_files_of_another_kind(self, refused: Callable[..., str], stats: Path, out: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("what is this")
        given = ("plan", "make", "--method", "c-prune", "--ratio", 0.5, "--out", out)
        assert "not a readable Stats file" in refused(*given, "--stats", tmp_path / "file")
        assert "there is no file" in refused(*given, "--stats", tmp_path / "nothing")
        assert "not a readable Clusters" in refused(*given, "--stats", stats, "--clusters", stats)
        assert "not a readable Stats file" in refused("cluster", "--stats", tmp_path / "file", "--out", out)
        assert "unknown clustering" in refused("cluster", "--stats", stats, "--out", out, "--algorithm", "x")
        assert "clusters were asked for" in refused(
            "cluster", "--stats", stats, "--out", out, "--clusters-per-layer", 9
        )

    def test_stats_of_other_models(self, refused: Callable[..., str], stats: Path, out: Path, tmp_path: Path) -> None:
        tiny.make_stats([[1] * 8] * 3, model="a" * 64).save(tmp_path / "other")
        assert "differ in model" in refused("merge-stats", stats, tmp_path / "other", "--out", out)

    # apply

    @pytest.fixture
    def plan(self, qwen: Path, tmp_path: Path) -> Path:
        source = Checkpoint(qwen)
        tiny.plan_for(list(source.layout.layers), [[0, 1, 2]] * 3, source.fingerprint).save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    def test_a_plan_of_another_model(
        self, refused: Callable[..., str], plan: Path, out: Path, checkpoint_of: Callable[[str], Path]
    ) -> None:
        given = ("--plan", plan, "--out", out)
        assert "for another model" in refused("apply", "--model", checkpoint_of("mixtral"), *given)
        assert "for another model" in refused("apply", "--model", checkpoint_of("olmoe"), *given)

    def test_a_plan_that_cannot_be_carried_out(
        self, refused: Callable[..., str], plan: Path, out: Path, qwen: Path
    ) -> None:
        content = json.loads(plan.read_text())
        content["layers"]["model.layers.1.mlp.experts"]["keep"] = [3]
        plan.write_text(json.dumps(content))
        assert "1 experts would stay, but 2 run" in refused("apply", "--model", qwen, "--plan", plan, "--out", out)
        plan.write_text("{")
        assert "not a valid plan" in refused("apply", "--model", qwen, "--plan", plan, "--out", out)

    def test_an_output_that_exists(self, refused: Callable[..., str], plan: Path, out: Path, qwen: Path) -> None:
        out.mkdir()
        (out / "mine").write_text("mine")
        assert "exists already" in refused("apply", "--model", qwen, "--plan", plan, "--out", out)
        assert (out / "mine").read_text() == "mine"
        given = ("--teacher", qwen, "--student", qwen, "--plan", plan, "--data", "builtin://arithmetic")
        assert "exists already" in refused("distill", *given, "--out", out)

    def test_text_for_a_method_that_reads_none(
        self, refused: Callable[..., str], stats: Path, out: Path, qwen: Path
    ) -> None:
        given = ("--method", "frequency", "--ratio", 0.5, "--stats", stats, "--model", qwen, "--out", out)
        assert "reads no text" in refused("plan", "make", *given, "--data", "builtin://arithmetic")

    def test_an_output_file_that_is_a_directory(self, refused: Callable[..., str], stats: Path, out: Path) -> None:
        out.mkdir()
        given = ("--method", "frequency", "--ratio", 0.5, "--stats", stats)
        assert "is a directory" in refused("plan", "make", *given, "--out", out)
        evaluate = ("evaluate", "--model", "./nothing", "--data", "nothing.txt")
        assert "is a directory" in refused(*evaluate, "--out", out)
        assert "is a directory" in refused(*evaluate, "--out", out / "report", "--page", out)

    def test_an_output_that_no_work_can_bring_about(
        self, calibrate: Callable[..., str], out: Path, corpus: Path
    ) -> None:
        assert "nothing can be written at" in calibrate(out=corpus / "stats", model="./nothing")
        out.mkdir()
        assert "is a directory" in calibrate(data="nothing.txt")

    # evaluate, promote

    def test_models_that_cannot_be_compared(
        self, refused: Callable[..., str], out: Path, qwen: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        text = ("--data", "builtin://arithmetic/held-out", "--max-blocks", 2, *BLOCKS, "--out", out)
        two = ("--model", qwen, "--model")
        assert "the same name" in refused("evaluate", *two, f"original={qwen}", *text)
        assert "is not a directory" in refused("evaluate", *two, tmp_path / "nothing", *text)
        assert "the same name" in refused("evaluate", *text, "--model", qwen, "--data", "builtin://arithmetic")
        other = tiny.write(tmp_path / "other", tiny.FAMILIES["mixtral"]())
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"content": "<|new|>", "id": 320})
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert "different vocabularies" in refused("evaluate", *two, other, *text)

    def test_weights_that_are_no_numbers(self, refused: Callable[..., str], out: Path, tmp_path: Path) -> None:
        spoilt = tiny.write(tmp_path / "spoilt", tiny.FAMILIES["qwen2_moe"]())
        tensors = load_file(spoilt / "model.safetensors")
        tensors["model.norm.weight"][:] = torch.nan
        save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
        text = ("--data", "builtin://arithmetic/held-out", "--max-blocks", 2, *BLOCKS, "--out", out)
        assert "not a number" in refused("evaluate", "--model", spoilt, *text)

    def test_promotion_without_a_registry(self, refused: Callable[..., str], qwen: Path, tmp_path: Path) -> None:
        given = ("promote", "--report", tmp_path / "nothing.json", "--model", qwen, "--name", "model")
        assert "MLFLOW_TRACKING_URI" in refused(*given)

    # as the program it is

    def test_two_of_them_in_a_process_of_their_own(self, stats: Path, out: Path, tmp_path: Path, corpus: Path) -> None:
        dense = tiny.write(tmp_path / "dense", tiny.dense_config())
        plan = ("plan", "make", "--method", "frequency", "--ratio", 1.5, "--stats", stats, "--out", out)
        calibrate = ("calibrate", "--model", dense, "--data", corpus, "--out", out)
        processes = [in_a_process(*arguments) for arguments in (plan, calibrate)]
        for process, said in zip(processes, ["below 1, not 1.5", "not a Mixture-of-Experts"], strict=True):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            assert err.startswith("moeprune: ")
            assert err.count("\n") == 1
            assert said in err
            assert not list(out.parent.iterdir())


def test_ctrl_c_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    text = tiny.write_jsonl(tmp_path / "long.jsonl", tiny.sentences(1, 20_000))
    sizes = ("--block-tokens", 16, "--max-blocks", 100_000, "--batch-blocks", 1)
    out = tmp_path / "outputs" / "stats"
    process = in_a_process("calibrate", "--model", qwen, "--data", text, "--out", out, *sizes)
    assert process.stderr is not None
    said = process.stderr.readline()  # the first word of progress: it is in the middle of it
    assert said.startswith("calibrate: "), said + process.stderr.read()
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "outputs").iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, run_cli: Run) -> None:
    out = succeeds(run_cli(command, "--help"))
    assert "Usage" in out
    assert len(out) > 100


def test_help_version_and_methods(run_cli: Run) -> None:
    out = succeeds(run_cli("--help"))
    assert all(command in out for command in COMMANDS)
    assert succeeds(run_cli("--version")).strip() == __version__
    out = succeeds(run_cli("methods"))
    for method in METHODS.values():
        assert method.name in out
        assert all(re.search(rf"--set +{option}=", out) for option in method.options.model_fields)


@pytest.mark.parametrize(
    "arguments", [["cluster"], ["plan", "make", "--ratio", "half"], ["nonsense"], ["calibrate", "--nonsense"]]
)
def test_a_command_line_that_is_none_says_how_it_goes(arguments: list[str], run_cli: Run) -> None:
    code, _, err = run_cli(*arguments)
    assert code == 2
    assert "Usage" in err
