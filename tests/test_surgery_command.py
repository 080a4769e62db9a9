"""`moeprune apply` as its user sees it: interrupted, continued, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open

from moeprune.checkpoint import writing
from moeprune.checkpoint.loading import Checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few MB, which is what the command counts in."""
    config = tiny.FAMILIES["qwen2_moe"]()
    config.moe_intermediate_size = 512
    return tiny.write(tmp_path_factory.mktemp("command") / "model", config)


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[Any]:
    source = Checkpoint(model)
    tiny.plan_for(list(source.layout.layers), [[0, 1, 2, 3]] * 3, source.fingerprint).save(tmp_path / "plan.json")
    (tmp_path / "outputs").mkdir()
    out = tmp_path / "outputs" / "out"
    return ["apply", "--model", model, "--plan", tmp_path / "plan.json", "--out", out, "--shard-megabytes", 1]


def interrupt_at(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun = writing.write_shard, 0

    def instead(*arguments: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == shard:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(writing, "write_shard", instead)


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(
    command: list[Any], run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        code, _, err = run_cli(*command)
    assert code == 130
    told = err.splitlines()
    assert "apply: stopped: 2 of 3 shards are kept, and the same command goes on from there" in told
    assert told[-1] == "moeprune: interrupted; nothing was left half-written"
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".out.unfinished"]
    code, out, err = run_cli(*command)
    assert code == 0, err
    assert "apply: continuing: 2 of 3 shards are there" in err
    assert "out: written" in out.replace("\n", "")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["out"]
    shards = sorted((tmp_path / "outputs" / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 1 << 20  # noqa: SIM118


def test_ctrl_c_in_the_first_shard_leaves_nothing(
    command: list[Any], run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(1, monkeypatch)
    code, _, err = run_cli(*command)
    assert code == 130
    assert err.splitlines()[-1] == "moeprune: interrupted; nothing was left half-written"
    assert "stopped" not in err
    assert not list((tmp_path / "outputs").iterdir())


def test_a_damaged_shard_is_one_sentence(command: list[Any], run_cli: Run, model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command[2] = damaged
    code, _, err = run_cli(*command)
    assert code == 1
    assert err.count("\n") == 1
    assert f"{weights} is missing or damaged" in err
    assert not list((tmp_path / "outputs").iterdir())


def test_a_place_that_cannot_be_written_to_is_told_at_once(
    command: list[Any], run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "layout", property(lambda _: pytest.fail("work was begun")))
    command[6] = tmp_path / "plan.json" / "out"
    code, _, err = run_cli(*command)
    assert code == 1
    assert "nothing can be written at" in err
