"""Training as a whole, from checkpoint to checkpoint: what changes in the files, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from elsewhere import run_elsewhere
from masking import plain_logits
from training import SETTINGS, TEXT, Pair, make_pair, same, state, unheard

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.end_to_end import training as training_module
from moeprune.distillation.end_to_end.distilling import Assignment, distill_whole
from moeprune.distillation.end_to_end.job import Training
from moeprune.distillation.end_to_end.keeping import Keeping, put_back
from moeprune.distillation.end_to_end.processes import failure_file, why_it_failed
from moeprune.distillation.end_to_end.trainer import DistillationTrainer
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.distillation.objective import Objective
from moeprune.distillation.text import Text
from moeprune.errors import InputError, ServiceError
from moeprune.plan import LayerPlan


@pytest.fixture(scope="module")
def pair(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(qwen, tmp_path_factory.mktemp("end-to-end") / "pair")


@pytest.mark.parametrize(
    ("objective", "parts", "settings"),
    [("experts=1,text=1", "all", {"accumulation": 2}), ("logits=1", "lora,router", {"learning_rate": 1e-4})],
    ids=["all", "lora"],
)
def test_zeros_of_a_sparse_plan_stay(
    objective: str, parts: str, settings: dict[str, Any], qwen: Path, tmp_path: Path
) -> None:
    pair = make_pair(qwen, tmp_path / "pair", sparse=True)
    text, out = Text(TEXT.train_BS, TEXT.held_out_BS), tmp_path / "out"
    made = whole(pair, text, out, objective, parts, **settings)
    assert made.better
    before, after = state(pair.student), state(Checkpoint(out))
    of_experts = [name for name in before if ".experts." in name and "shared" not in name]
    assert sum((before[name] == 0).sum() for name in of_experts) > 10_000
    for name in of_experts:
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert torch.equal(before[name], after[name]) == ("lora" in parts), name
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])  # a stock dense layer, and one of the modelling file
@pytest.mark.parametrize("objective", ["logits=1", "block=1", "experts=1,block=1"])
def test_condensed_layers_learn_and_nothing_else(
    family: str, objective: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """CD-MoE's lightweight fine-tuning."""
    teacher = Checkpoint(checkpoint_of(family))
    names = list(teacher.layout.layers)
    plan = tiny.plan_for(names, [list(range(tiny.EXPERTS))] * len(names), teacher.fingerprint)
    weights = {1: 0.4, 4: 0.3}
    plan.layers[names[-1]] = LayerPlan(experts=tiny.EXPERTS, top_k=tiny.TOP_K, keep=[1, 4], condensed=weights)
    plan.save(tmp_path / "plan.json")
    apply(teacher, plan, tmp_path / "pruned")
    pair = Pair(teacher, Checkpoint(tmp_path / "pruned"), plan, tmp_path / "plan.json")
    assert whole(pair, TEXT, tmp_path / "out", objective, "condensed").better
    before, after = state(pair.student), state(Checkpoint(tmp_path / "out"))
    unlike = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in unlike} == {"gate_proj", "up_proj", "down_proj"}
    of_last = f".layers.{len(names) - 1}."
    assert all(of_last in name and "attn" not in name and ".experts." not in name for name in unlike)


def whole(pair: Pair, text: Text, out: Path, objective: str, parts: str, **settings: Any) -> Outcome:
    asked, how = Objective.parse(objective), Training.of(**{**SETTINGS, **settings})
    assignment = Assignment(pair.teacher, pair.student, pair.plan, text, asked, frozenset(parts.split(",")), how)
    return distill_whole(assignment, out, listener=unheard)


def test_what_lora_learnt_is_in_the_weights(pair: Pair, tmp_path: Path) -> None:
    """Its checkpoint computes elsewhere, without peft, what the student with its additions computed."""
    kept: dict[str, torch.Tensor] = {}
    original = training_module._run

    def run_and_look(trainer: DistillationTrainer, job: Any, keeping: Keeping, args: Any) -> Outcome:
        made = original(trainer, job, keeping, args)
        put_back(trainer.model.named_parameters(), keeping.best())
        kept["logits"] = plain_logits(trainer.model, tiny.token_ids(0))
        return made

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module, "_run", run_and_look)
        assert whole(pair, TEXT, out, "logits=1", "lora,router").better
    case = {"name": "lora", "directory": str(out), "trust": True, "ids": tiny.token_ids(0).tolist()}
    loaded = run_elsewhere([case], tmp_path)["lora"]
    assert (loaded["logits"] - kept["logits"]).abs().max() < 1e-4
    before, after = state(pair.student), state(Checkpoint(out))
    assert before.keys() == after.keys()
    unlike = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in unlike)
    assert any(".experts." in name for name in unlike)
    assert any("gate.weight" in name for name in unlike)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in unlike)


def test_where_nothing_got_better_the_student_is_left_as_it_was(pair: Pair, tmp_path: Path) -> None:
    made = whole(pair, TEXT, tmp_path / "out", "logits=1", "experts", learning_rate=1.0, patience=1)
    assert not made.better
    assert same(state(pair.student), state(Checkpoint(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_between_training_and_writing_it_is_not_trained_again(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeprune.distillation.end_to_end import distilling

    original = distilling.write

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole(pair, TEXT, tmp_path / "out", "logits=1", "experts")
    monkeypatch.setattr(distilling, "write", original)
    monkeypatch.setattr(DistillationTrainer, "train", interrupted)
    assert whole(pair, TEXT, tmp_path / "out", "logits=1", "experts").better
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestRefusals:
    def test_blocks_that_cannot_be_shared(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="4 blocks per step cannot be shared by 1 processes in 3 passes"):
            whole(pair, TEXT, tmp_path / "out", "logits=1", "experts", accumulation=3)

    def test_too_little_text(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a step takes 32 blocks, and there are 24"):
            whole(pair, TEXT, tmp_path / "out", "logits=1", "experts", batch_blocks=32)

    def test_a_part_that_is_not_there(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="`condensed` cannot learn"):
            whole(pair, TEXT, tmp_path / "out", "logits=1", "condensed")

    def test_experts_that_have_no_counterpart(self, pair: Pair, tmp_path: Path) -> None:
        plan = copy.deepcopy(pair.plan)
        layer = next(iter(plan.layers.values()))
        layer.merged = {layer.keep[0]: {0: 0.5, 1: 0.5}}
        fused = Pair(pair.teacher, pair.student, plan, pair.plan_path)
        with pytest.raises(InputError, match="one expert of several"):
            whole(fused, TEXT, tmp_path / "out", "experts=1", "experts")

    def test_an_option_that_makes_no_sense(self) -> None:
        with pytest.raises(InputError, match=r"warmup: .*less than 1"):
            Training.of(warmup=2)

    def test_what_processes_leave_behind(self, tmp_path: Path) -> None:
        assert isinstance(why_it_failed(tmp_path, "one\ntwo\n"), ServiceError)
        assert str(why_it_failed(tmp_path, "one\ntwo\n")).endswith("Their last words: one two")
        failure_file(tmp_path).write_text("it diverged")
        assert isinstance(why_it_failed(tmp_path, ""), InputError)
        assert str(why_it_failed(tmp_path, "")) == "it diverged"
