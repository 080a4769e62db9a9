"""distill, end to end, as a user calls it: by the command, the step and the component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from masking import largest_difference, plain_logits
from training import Pair, make_pair

from moeprune import tracking
from moeprune.checkpoint.loading import Checkpoint
from moeprune.components.distill import distill as component
from moeprune.errors import InputError
from moeprune.steps.distill_end_to_end import distill_end_to_end
from moeprune.tracking import TrackedRun

OPTIONS: dict[str, Any] = {"learning_rate": 3e-3, "batch_blocks": 4, "evaluations": 3}


@pytest.fixture(scope="module")
def pair(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(qwen, tmp_path_factory.mktemp("step") / "pair")


@pytest.fixture
def addresses(pair: Pair, corpus: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher": str(pair.teacher.directory),
        "student": str(pair.student.directory),
        "plan": str(pair.plan_path),
        "data": str(corpus),
        "out": str(tmp_path / "out"),
    }


class Noted(TrackedRun):
    """A run that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "told", {})
        object.__setattr__(self, "asked", {})

    def metrics(self, values: Any, step: int = 0) -> None:
        for name, value in values.items():
            self.told.setdefault(name, {})[step] = value  # type: ignore[attr-defined]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    run = Noted()

    @contextmanager
    def step(name: str, params: dict[str, Any]) -> Iterator[TrackedRun]:
        run.asked.update(params, name=name)  # type: ignore[attr-defined]
        yield run

    monkeypatch.setattr(tracking, "step", step)
    return run


def test_the_step_tells_of_its_curves(addresses: dict[str, Any], noted: Any, capfd: pytest.CaptureFixture[str]) -> None:
    made = distill_end_to_end(**addresses, block_tokens=tiny.BLOCK_TOKENS, objective="logits=1,block=0.1", **OPTIONS)
    assert made.better
    assert noted.told["training_loss"] == pytest.approx(made.curve)
    assert noted.told["held_out_loss"] == pytest.approx(made.held_out)
    assert noted.told["held_out_loss_before"] == {0: made.before}
    assert noted.told["held_out_loss_after"] == {0: made.after}
    for curve in ("learning_rate", "throughput_tokens_per_second", "peak_memory_bytes"):
        assert noted.told[curve].keys() == made.curve.keys()
        assert min(list(noted.told[curve].values())[1:]) > 0
    assert max(noted.told["learning_rate"].values()) == OPTIONS["learning_rate"]
    assert noted.told["held_out_logits"].keys() == noted.told["held_out_block"].keys() == made.held_out.keys()
    assert noted.asked["name"] == "distill"
    assert noted.asked["objective"] == "block=0.1,logits=1"
    last = max(made.curve)
    assert f"distill: {last}/{last}" in capfd.readouterr().err
    out = Checkpoint(Path(addresses["out"]))
    assert out.experts_per_layer == Checkpoint(Path(addresses["student"])).experts_per_layer


def test_the_command(addresses: dict[str, Any], run_cli: Callable[..., tuple[int, str, str]]) -> None:
    given = [part for name, value in addresses.items() for part in (f"--{name}", value)]
    given += ["--how", "end-to-end", "--train", "lora", "--block-tokens", "24", "--batch-blocks", "4"]
    code, out, err = run_cli("distill", *given, "--learning-rate", "0.003", "--lora-rank", "4")
    assert code == 0, err
    assert "the loss on text held out: " in out
    before, after = (Checkpoint(Path(addresses[name])).load() for name in ("student", "out"))
    assert largest_difference(*(plain_logits(model, tiny.token_ids(0)) for model in (before, after))) > 0.01


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--how", "end-to-end", "--layers", "0/2"], "--layers"),
        (["--lora-rank", "4"], "--lora-rank"),
        (["--how", "sideways"], "sideways"),
        (["--how", "end-to-end", "--precision", "float7"], "precision"),
        (["--objective", "logits=1"], "--how end-to-end"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    given: list[str], complaint: str, addresses: dict[str, Any], run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run_cli(
        "distill", *[part for key, value in addresses.items() for part in (f"--{key}", value)], *given
    )
    assert code != 0
    assert complaint in err
    assert not Path(addresses["out"]).exists()


def test_the_component(addresses: dict[str, Any]) -> None:
    student = SimpleNamespace(path=addresses["student"], metadata={"method": "by hand"})
    made = SimpleNamespace(path=addresses["out"], metadata={})
    component.python_func(
        teacher=addresses["teacher"],
        student=student,
        plan=SimpleNamespace(path=addresses["plan"]),
        data=addresses["data"],
        distilled=made,
        block_tokens=tiny.BLOCK_TOKENS,
        how="end-to-end",
        training={"objective": "text=1", **OPTIONS},
    )
    assert (Path(made.path) / "config.json").is_file()
    assert made.metadata["method"] == "by hand"
    assert made.metadata["optimizer_steps"] > 0
    with pytest.raises(InputError, match="not 'sideways'"):
        component.python_func(
            teacher="", student=student, plan=student, data="", distilled=made, how="sideways", training={}
        )


def test_a_note_says_why_the_pruned_model_is_kept(addresses: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    made = distill_end_to_end(
        **addresses, block_tokens=tiny.BLOCK_TOKENS, **{**OPTIONS, "learning_rate": 1.0, "patience": 1}
    )
    assert not made.better
    told = capfd.readouterr().err
    assert "note: training ended early: the held-out loss got no better in 1 evaluations" in told
    assert "got no better (" in told
    assert "is the pruned model, unchanged" in told
