"""The distill step, from checkpoints to a checkpoint: refusals, interruptions, parts, and what it writes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_quantised
import tiny
import torch
from elsewhere import run_elsewhere
from masking import draws, plain_logits
from safetensors.torch import load_file, save_file

from moeprune import s3
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.layer_local import learnt
from moeprune.errors import InputError, ServiceError
from moeprune.plan import LayerPlan, Plan
from moeprune.services import BUCKET
from moeprune.steps import distill as step
from moeprune.steps.merge_distilled import merge_distilled

BLOCKS = 48
OPTIONS: dict[str, Any] = {
    "block_tokens": tiny.BLOCK_TOKENS,
    "max_blocks": BLOCKS,
    "learning_rate": 0.02,
    "epochs": 2,
}


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for shard in directory.glob("*.safetensors") for name, value in load_file(shard).items()}


def bytes_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@dataclass
class Written:
    """A student, and what the step made of it."""

    student: Path
    out: Path
    result: step.Distilled
    loaded: dict[str, Any]


CASES = [
    ("qwen2_moe", "even", "float32"),
    ("granitemoe", "uneven", "bfloat16"),
    ("qwen2_moe", "condensed", "bfloat16"),
]


def plan_of(kind: str, source: Checkpoint) -> Plan:
    names = list(source.layout.layers)
    match kind:
        case "uneven":
            return tiny.plan_for(names, draws(1, len(names), [3, 6, 4][: len(names)]), source.fingerprint)
        case "condensed":
            plan = tiny.plan_for(names, draws(1, len(names), [4] * len(names)), source.fingerprint)
            plan.layers[names[1]] = LayerPlan(
                experts=tiny.EXPERTS, top_k=tiny.TOP_K, keep=[1, 4], condensed={1: 0.4, 4: 0.3}
            )
            return plan
        case _:
            return tiny.plan_for(names, draws(1, len(names), [4] * len(names)), source.fingerprint)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[tuple[str, str, str], Written]:
    """Checkpoints as the step writes them, and what they compute in a process that cannot import moeprune."""
    root = tmp_path_factory.mktemp("distilled")
    made, cases = {}, []
    for case in CASES:
        family, kind, dtype = case
        name = "-".join(case)
        source = Checkpoint(tiny.write(root / name / "original", tiny.FAMILIES[family](), dtype=dtype))
        plan = plan_of(kind, source)
        plan.save(root / name / "plan.json")
        student, out = root / name / "pruned", root / name / "distilled"
        apply(source, plan, student, shard_bytes=50_000)
        paths = map(str, (source.directory, student, root / name / "plan.json", corpus, out))
        made[case] = Written(student, out, step.distill(*paths, **OPTIONS), {})
        ids = tiny.token_ids(0).tolist()
        cases.append({"name": name, "directory": str(out), "trust": kind != "even", "ids": ids})
    results = run_elsewhere(cases, root)
    for case, each in made.items():
        each.loaded = results["-".join(case)]
    return made


@pytest.mark.parametrize("case", CASES, ids="-".join)
class TestTheCheckpoint:
    def test_loads_without_moeprune(
        self, case: tuple[str, str, str], written: dict[tuple[str, str, str], Written]
    ) -> None:
        each = written[case]
        assert "error" not in each.loaded, each.loaded["error"]
        model = Checkpoint(each.out).load()
        assert (plain_logits(model, tiny.token_ids(0)) - each.loaded["logits"]).abs().max() < 1e-5

    def test_differs_in_what_was_learnt_and_nothing_else(
        self, case: tuple[str, str, str], written: dict[tuple[str, str, str], Written]
    ) -> None:
        each = written[case]
        assert each.result.error_after < 0.9 * each.result.error_before
        before, after = weights_in(each.student), weights_in(each.out)
        assert before.keys() == after.keys()
        assert {value.dtype for value in after.values()} == {getattr(torch, case[2])}
        names = {name for layer in each.result.layers for name in layer.parameters}
        for name, (old, new) in {name: (before[name], after[name]) for name in after}.items():
            block = ".".join(name.split(".")[:4]) + "."
            if not any(one.startswith(block) for one in names):
                assert torch.equal(old, new), name
        own, theirs = (dict(Checkpoint(each.student if old else each.out).load().named_parameters()) for old in (1, 0))
        for name, value in own.items():
            assert torch.equal(value, theirs[name]) == (name not in names), name
        for path in each.student.iterdir():
            if not path.name.endswith((".safetensors", ".index.json")):
                assert (each.out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def arguments(qwen: Path, corpus: Path, tmp_path: Path) -> dict[str, Any]:
    source = Checkpoint(qwen)
    plan = plan_of("uneven", source)
    plan.save(tmp_path / "plan.json")
    apply(source, plan, tmp_path / "pruned")
    paths = {"teacher": qwen, "student": tmp_path / "pruned", "plan": tmp_path / "plan.json", "data": corpus}
    return {name: str(path) for name, path in paths.items()} | {"out": str(tmp_path / "out")} | OPTIONS


def test_parts_make_what_one_call_makes(arguments: dict[str, Any], tmp_path: Path) -> None:
    whole = step.distill(**arguments)
    parts = [str(tmp_path / f"part-{number}") for number in range(2)]
    for number, part in enumerate(parts):
        step.distill(**arguments | {"out": part}, part=number, parts=2)
    assert [len(list(Path(part).glob("*.safetensors"))) for part in parts] == [2, 1]
    merged = merge_distilled(parts[::-1], arguments["student"], str(tmp_path / "merged"))
    assert bytes_in(tmp_path / "merged") == bytes_in(tmp_path / "out")
    assert merged == whole

    def refused(some: list[str], student: str = arguments["student"]) -> str:
        with pytest.raises(InputError) as error:
            merge_distilled(some, student, str(tmp_path / "refused"))
        assert not (tmp_path / "refused").exists()
        return str(error.value)

    other = str(tmp_path / "other")
    step.distill(**arguments | {"out": other, "epochs": 1}, part=1, parts=2)
    assert "no part holds model.layers.1.mlp.experts" in refused(parts[:1])
    assert "not of one distillation" in refused([parts[0], other])
    assert "of another pruned model" in refused(parts, str(tmp_path / "out"))
    assert "is no part of a distillation" in refused([arguments["student"]])
    for wrong, said in {(2, 2): "part 2 of 2 does not exist", (3, 4): "4 parts are too many"}.items():
        with pytest.raises(InputError, match=said):
            step.distill(**arguments | {"out": other + "2"}, part=wrong[0], parts=wrong[1])


def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    arguments: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = arguments | {"epochs": 10}  # a layer takes long enough to be in the middle of it
    code = f"from moeprune.steps.distill import distill; distill(**{slow!r})"
    out = Path(arguments["out"])
    work = out.with_name(".out.unfinished")
    # Killed after a layer was finished, in the middle of the next.
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(work.glob("*/*.safetensors")), process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    (job,) = (path for path in work.iterdir() if path.is_dir())
    finished = bytes_in(job)
    assert 1 <= len([name for name in finished if name.endswith(".safetensors")]) < 3
    (job / "half.safetensors.part").write_bytes(b"half")
    capfd.readouterr()
    step.distill(**slow)
    assert f"{len(finished)} of 3 layers were trained by an earlier call" in capfd.readouterr().err
    assert not work.exists()
    step.distill(**slow | {"out": str(tmp_path / "once")})
    assert bytes_in(out) == bytes_in(tmp_path / "once")


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


def test_other_inputs_are_another_job(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted call has finished is not taken for the work of a call with other options."""
    train = step.train_layers

    def interrupted(*args: Any, **options: Any) -> None:
        def stop(trained: object) -> None:
            raise KeyboardInterrupt

        train(*args, **options | {"on_layer": stop})

    monkeypatch.setattr(step, "train_layers", interrupted)
    for directory in (None, str(tmp_path / "work")):
        with pytest.raises(KeyboardInterrupt):
            step.distill(**arguments, work=directory)
    monkeypatch.undo()
    seen: list[str] = []
    save = learnt.save

    def noting(place: Path, made: learnt.LayerLearnt, tensors: dict[str, torch.Tensor]) -> None:
        seen.append(made.layer)
        save(place, made, tensors)

    monkeypatch.setattr(learnt, "save", noting)
    step.distill(**arguments | {"out": str(tmp_path / "second")}, work=str(tmp_path / "work"))
    assert len(seen) == 2
    assert not any((tmp_path / "work").iterdir())
    step.distill(**arguments | {"epochs": 1})
    assert len(seen) == 2 + 3


def test_a_call_on_another_machine_goes_on_with_what_is_on_s3(
    arguments: dict[str, Any], client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, address = step.train_layers, f"s3://{BUCKET}/unfinished"

    def interrupted(job: Any, directory: Path, *, on_layer: Callable[[Any], None], **options: Any) -> None:
        def stop(trained: Any) -> None:
            on_layer(trained)
            raise KeyboardInterrupt

        train(job, directory, on_layer=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step, "train_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step.distill(**arguments, work=address)
    (kept,) = client.list_objects_v2(Bucket=BUCKET, Prefix="unfinished/")["Contents"]
    assert kept["Key"].endswith(".safetensors")
    shutil.rmtree(Path(arguments["out"]).with_name(".out.unfinished"))
    trained: list[str] = []

    def noting(*given: Any, on_layer: Callable[[Any], None], **options: Any) -> None:
        def note(layer: Any) -> None:
            trained.append(layer.learnt.layer)
            on_layer(layer)

        train(*given, on_layer=note, **options)

    monkeypatch.setattr(step, "train_layers", noting)
    step.distill(**arguments | {"out": str(tmp_path / "second")}, work=address)
    assert len(trained) == 2
    assert "Contents" not in client.list_objects_v2(Bucket=BUCKET, Prefix="unfinished/")
    step.distill(**arguments | {"out": str(tmp_path / "once")})
    assert bytes_in(tmp_path / "second") == bytes_in(tmp_path / "once")


def test_what_cannot_be_removed_from_s3_is_said_and_the_step_is_done(
    arguments: dict[str, Any], connected: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str) -> None:
        raise ServiceError(f"S3 refuses {address}")

    monkeypatch.setattr(s3, "remove", refuse)
    step.distill(**arguments | {"epochs": 1}, work=f"s3://{BUCKET}/refused")
    assert (Path(arguments["out"]) / "config.json").is_file()
    assert f"note: what was kept on the way is still there: S3 refuses s3://{BUCKET}/refused/" in capfd.readouterr().err


def test_where_nothing_gets_better_the_pruned_model_is_kept(
    arguments: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step.distill(**arguments | {"learning_rate": 1e30, "epochs": 1})
    said = capfd.readouterr().err
    assert "model.layers.0.mlp.experts and 2 more got no better and are left as pruning left it" in said
    assert "diverged at step" in said
    assert "is the pruned model, unchanged" in said
    before, after = weights_in(tmp_path / "pruned"), weights_in(tmp_path / "out")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class TestRefusals:
    @staticmethod
    def refused(arguments: dict[str, Any], **changes: Any) -> str:
        with pytest.raises(InputError) as error:
            step.distill(**arguments | changes)
        out = Path(arguments["out"])
        assert not out.exists()
        assert not out.with_name(".out.unfinished").exists()
        return str(error.value)

    def test_a_plan_for_another_teacher(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        other = tiny.write(tmp_path / "other", tiny.FAMILIES["qwen2_moe"](), seed=4)
        assert "another model" in self.refused(arguments, teacher=str(other))

    def test_a_student_that_the_plan_does_not_make(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        assert "is not what the plan makes of" in self.refused(arguments, student=arguments["teacher"])
        source = Checkpoint(Path(arguments["teacher"]))
        plan = Plan.load(Path(arguments["plan"]))
        for layer in plan.layers.values():
            layer.keep = [*layer.drop, *layer.keep][: len(layer.keep)]
            layer.keep.sort()
        apply(source, plan, tmp_path / "alike")
        assert "was made by another plan" in self.refused(arguments, student=str(tmp_path / "alike"))

    def test_a_quantised_student(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        source = Checkpoint(test_quantised.write(tmp_path / "fp8", *test_quantised.FORMS["mxfp4"]))
        layers = {
            name: LayerPlan(experts=layer.experts, top_k=layer.top_k or 2, keep=list(range(4)))
            for name, layer in source.layout.layers.items()
        }
        plan = Plan(method="", options={}, ratio=0.5, model=source.fingerprint, data="0", layers=layers)
        plan.save(tmp_path / "fp8.json")
        apply(source, plan, tmp_path / "fp8-pruned")
        paths = {"teacher": source.directory, "student": tmp_path / "fp8-pruned", "plan": tmp_path / "fp8.json"}
        assert "are quantised as" in self.refused(arguments, **{name: str(path) for name, path in paths.items()})

    def test_a_tokenizer_that_differs(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        tokenizer = tmp_path / "pruned" / "tokenizer.json"
        read = json.loads(tokenizer.read_text())
        vocabulary = read["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        tokenizer.write_text(json.dumps(read))
        assert "reads text otherwise" in self.refused(arguments)

    def test_too_little_text(self, arguments: dict[str, Any]) -> None:
        assert "needs at least 2" in self.refused(arguments, max_blocks=1)

    def test_what_cannot_be_asked_for(self, arguments: dict[str, Any]) -> None:
        assert "'magic', which is no objective" in self.refused(arguments, objective="magic=1")
        assert "distill end to end" in self.refused(arguments, objective="block=1,logits=1")
        assert "'heads', which is no part" in self.refused(arguments, train="experts,heads")
        assert "a layer that its plan condensed" in self.refused(arguments, train="condensed")
        assert "of a whole model" in self.refused(arguments, train="all")
        assert "all must be above 0" in self.refused(arguments, learning_rate=0.0)

    def test_a_place_that_is_taken(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="exists already"):
            step.distill(**arguments | {"out": arguments["student"]})

    def test_numbers_that_are_none(self, arguments: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
        damaged = shutil.copytree(arguments["teacher"], tmp_path / "damaged")
        weights = load_file(damaged / "model.safetensors")
        weights["model.layers.1.self_attn.o_proj.weight"][0] = float("nan")
        save_file(weights, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="the original's outputs are not finite"):
            step.distill(**arguments | {"teacher": str(damaged)})
        assert not (tmp_path / "out").exists()
