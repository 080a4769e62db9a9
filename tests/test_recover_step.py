"""recover, from the command line and as a part of pruning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.steps import calibrate as calibrating
from moeprune.steps import prune as pruning
from moeprune.steps import recover as recovering

TEXT: dict[str, Any] = {"block_tokens": 24, "max_blocks": 64}


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory, qwen: Path, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("recovery") / "stats"
    calibrating.calibrate(str(qwen), str(corpus), str(out), statistics=["stand_in", "routed_tokens"], **TEXT)
    return out


@pytest.fixture
def cut(tmp_path: Path, qwen: Path, stats: Path) -> Callable[..., tuple[Path, Path]]:
    """The plan and what surgery makes of it."""

    def make(method: str = "fuse", **options: Any) -> tuple[Path, Path]:
        plan, out = tmp_path / "plan.json", tmp_path / "cut"
        pruning.plan(method, 0.5, str(stats), str(plan), **options)
        pruning.apply(str(qwen), str(plan), str(out))
        return plan, out

    return make


def test_from_the_command_line(
    cut: Callable[..., tuple[Path, Path]],
    qwen: Path,
    corpus: Path,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    plan, pruned = cut("frequency", recover=True)
    out = tmp_path / "recovered"
    code, said, error = run_cli("apply", "--model", qwen, "--plan", plan, "--out", tmp_path / "once more")
    assert code == 0, error
    assert "`moeprune recover`" in said
    code, said, error = run_cli(
        *("recover", "--model", qwen, "--pruned", pruned, "--plan", plan, "--data", corpus, "--out", out),
        *("--block-tokens", 24, "--max-blocks", 64),
    )
    assert code == 0, error
    before, after = (float(word) for word in said.split("miss ")[1].split(" of ")[0].split(" -> "))
    assert 0 < after < before
    assert json.loads((out / "pruning_plan.json").read_text())["recovery"] == {"router": False}
    assert Checkpoint(out).load().config.num_experts == 4


def test_pruning_does_it_where_the_plan_asks_for_it(qwen: Path, corpus: Path, stats: Path, tmp_path: Path) -> None:
    where = {name: str(tmp_path / name) for name in ("plan", "model", "beside")}
    pruning.prune(
        str(qwen),
        "fuse",
        0.5,
        str(stats),
        where["plan"],
        where["model"],
        data=str(corpus),
        block_tokens=24,
        recovery_blocks=64,
        baselines=["frequency"],
        baselines_out=where["beside"],
    )
    plan = Plan.load(Path(where["plan"]))
    assert plan.recovery
    pruning.apply(str(qwen), where["plan"], str(tmp_path / "only cut"))
    cut, whole = Checkpoint(tmp_path / "only cut"), Checkpoint(Path(where["model"]))
    assert whole.experts_per_layer == plan.experts_per_layer
    assert cut.files.entries.keys() == whole.files.entries.keys()
    differing = {
        name for name in cut.files.entries if not (cut.files.read([name])[name] == whole.files.read([name])[name]).all()
    }
    assert any("gate.weight" in name for name in differing)
    assert any("down_proj" in name for name in differing)
    assert all("mlp." in name for name in differing)
    assert Checkpoint(tmp_path / "beside" / "frequency").experts_per_layer == plan.experts_per_layer


class TestRefusals:
    def test_a_plan_that_asks_for_none(
        self, cut: Callable[..., tuple[Path, Path]], qwen: Path, corpus: Path, tmp_path: Path
    ) -> None:
        plan, pruned = cut("frequency")
        with pytest.raises(InputError, match="asks for no recovery; make one with `moeprune plan make --recover`"):
            recovering.recover(str(qwen), str(pruned), str(plan), str(corpus), str(tmp_path / "out"), **TEXT)

    def test_a_model_that_the_plan_did_not_make(
        self, cut: Callable[..., tuple[Path, Path]], qwen: Path, corpus: Path, tmp_path: Path
    ) -> None:
        plan, _ = cut()
        with pytest.raises(InputError, match="apply that plan"):
            recovering.recover(str(qwen), str(qwen), str(plan), str(corpus), str(tmp_path / "out"), **TEXT)
        assert not (tmp_path / "out").exists()
