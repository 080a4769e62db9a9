"""The pipeline `sweep`, run by `kfp.local`: real steps, each in its process."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from moeprune.evaluation.report import Report
from moeprune.pipelines import forked_steps
from moeprune.pipelines.local_run import StepError, run_locally
from moeprune.pipelines.sweep import sweep


class Heard:
    """What was told of a run."""

    def __init__(self) -> None:
        self.finished_steps: list[str] = []

    def started(self, step: str) -> None: ...

    def progress(self, step: str, text: str) -> None: ...

    def noted(self, step: str, note: str) -> None: ...

    def reused(self, step: str) -> None: ...

    def finished(self, step: str) -> None:
        self.finished_steps.append(step)


def run(state: Path, model: Path, heard: Heard, **changes: object) -> dict[str, object]:
    for seed, (name, count) in enumerate({"domain": 40, "held-out": 20}.items()):
        tiny.write_jsonl(state / f"{name}.jsonl", tiny.sentences(seed, count))
    arguments = {
        "model": str(model),
        "data": str(state / "domain.jsonl"),
        "evaluation_data": [str(state / "held-out.jsonl")],
        "methods": ["reap", "random"],
        "ratios": [0.5],
        "method_options": {"random": {"seed": 3}},
        "block_tokens": tiny.BLOCK_TOKENS,
        "calibration_blocks": 8,
        "distillation_blocks": 8,
        "distillation_epochs": 1,
        "evaluation_blocks": 8,
    }
    with (state / "log").open("w") as log:
        return run_locally(
            sweep(), arguments | changes, outputs=state / "out", cache=state / "cache", log=log, watcher=heard
        )


def test_every_method_at_every_ratio_is_measured_beside_the_others(qwen: Path, tmp_path: Path) -> None:
    heard = Heard()
    made = run(tmp_path, qwen, heard)
    assert sorted(heard.finished_steps) == sorted(
        ["combine", "prepare", "calibrate", "merge-stats", "cluster", "compare"]
        + 2 * ["global-prune", "distill", "evaluate"]
    )
    report = Report.load(Path(made["report"].path))  # type: ignore[attr-defined]
    experts = {candidate.name: candidate.experts for candidate in report.candidates}
    of_layers = len(tiny.FAMILIES["qwen2_moe"]().layer_types)
    assert experts == {
        "original": 8 * of_layers,
        **{f"{method} 0.5": 4 * of_layers for method in ("reap", "random")},
    }
    front = made["front"]
    assert isinstance(front, list)
    assert front
    assert set(front) <= experts.keys()
    losses = {candidate.name: candidate.quality["held-out"].loss_nats for candidate in report.candidates}
    for name in experts.keys() - {"original", *front}:  # another is as small, and better
        assert any(experts[other] <= experts[name] and losses[other] <= losses[name] for other in front)


def test_what_no_model_can_be_made_of_is_said(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_steps, "_CAN_FORK", False)  # and so it is where nothing may be forked
    with pytest.raises(StepError, match=r"combine: .*magic"):
        run(tmp_path, qwen, Heard(), methods=["magic"])
