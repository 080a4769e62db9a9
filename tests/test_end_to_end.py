"""End-to-end training in one process: what is asked for is what is learnt, whatever the shape of the work."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from masking import plain_logits
from training import TEXT, Pair, in_processes, make_pair, same, unheard
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation import losses
from moeprune.distillation.end_to_end.inner import watching
from moeprune.distillation.end_to_end.keeping import Keeping
from moeprune.distillation.end_to_end.modes import learn_as_used
from moeprune.distillation.end_to_end.teacher import Teacher, run
from moeprune.distillation.end_to_end.teacher_cache import ROWS_PER_FILE
from moeprune.distillation.end_to_end.telling import LAUNCHER_VARIABLE, Event, EventFile, Telling
from moeprune.distillation.end_to_end.trainer import DistillationTrainer
from moeprune.distillation.end_to_end.training import Outcome, train
from moeprune.distillation.losses import cross_entropy, divergence
from moeprune.distillation.objective import Objective
from moeprune.errors import InputError

STEPS = 6


@pytest.fixture(scope="module")
def pair(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(qwen, tmp_path_factory.mktemp("end-to-end") / "pair")


def best(directory: Path) -> dict[str, torch.Tensor]:
    return Keeping(directory / "states").best()


class TestDivergence:
    """The Kullback-Leibler divergence from the teacher's most probable tokens."""

    @given(seed=st.integers(0, 1000), top=st.integers(1, 12), temperature=st.floats(0.5, 4.0), size=st.floats(0.1, 3.0))
    def test_is_that_of_the_tokens_with_all_others_as_one(
        self, seed: int, top: int, temperature: float, size: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = size * torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
        theirs, own = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        chosen = theirs.topk(top, dim=-1)
        grouped = [torch.cat([p.gather(-1, chosen.indices), p.sum(-1, keepdim=True)], -1) for p in (theirs, own)]
        for p in grouped:
            p[:, -1] -= p[:, :-1].sum(-1)
        expected = (grouped[0] * (grouped[0].clamp_min(1e-30).log() - grouped[1].clamp_min(1e-30).log())).sum(-1).mean()
        found = divergence(student, chosen.indices, chosen.values.log(), temperature)
        assert found.item() == pytest.approx(temperature**2 * expected.item(), rel=1e-3, abs=1e-5)

    def test_of_all_tokens_is_the_whole_one(self) -> None:
        student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
        share = teacher.log_softmax(-1)
        found = divergence(student, torch.arange(9).expand(4, 9), share, 1.0)
        whole = torch.nn.functional.kl_div(student.log_softmax(-1), share, log_target=True, reduction="batchmean")
        assert found.item() == pytest.approx(whole.item(), rel=1e-5)

    def test_falls_where_its_gradient_points_even_if_the_teacher_is_certain(self) -> None:
        student = torch.zeros(1, 6, requires_grad=True)
        divergence(student, torch.tensor([[2, 4]]), torch.tensor([[0.0, -60.0]]), 1.0).backward()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
        assert student.grad[0].argmin() == 2


def test_cross_entropy_is_that_of_the_next_tokens() -> None:
    logits_BSV, ids_BS = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    each = [-logits_BSV[b, s].log_softmax(0)[ids_BS[b, s + 1]] for b in range(2) for s in range(4)]
    assert cross_entropy(logits_BSV, ids_BS).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_some_tokens_at_a_time_give_the_error_and_gradient_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BSV, ids_BS = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    share, top = torch.randn(10, 7).softmax(-1).topk(3)

    def both() -> tuple[float, torch.Tensor]:
        error = cross_entropy(logits_BSV, ids_BS) + divergence(logits_BSV.flatten(0, 1), top, share.log(), 2.0)
        return error.item(), torch.autograd.grad(error, logits_BSV)[0]

    whole, gradient = both()
    monkeypatch.setattr(losses, "_TOKENS_AT_ONCE", 3)
    in_parts, gradient_in_parts = both()
    assert in_parts == pytest.approx(whole, rel=1e-6)
    assert torch.allclose(gradient_in_parts, gradient, atol=1e-7)


# What is measured of layers


@pytest.fixture
def both(pair: Pair) -> tuple[PreTrainedModel, PreTrainedModel]:
    return pair.teacher.load(torch.float32), pair.student.load(torch.float32)


def layer_errors(pair: Pair, both: tuple[PreTrainedModel, PreTrainedModel], ids_BS: torch.Tensor) -> dict[str, float]:
    teacher, student = both
    objective = Objective(experts=1, block=1)
    with watching(student, list(pair.plan.layers), experts=True, blocks=True) as inner, torch.no_grad():
        taught = Teacher(teacher, objective, pair.plan)
        taught.measure(TEXT.train_BS[:8])
        inner.forget()
        run(student, ids_BS, logits=False)
        return {name: error.item() for name, error in taught.teach(ids_BS, inner).errors.items()}


def test_layer_errors_are_as_defined(pair: Pair, both: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """From what the modules of both models are given and put out, by hand."""
    teacher, student = both
    given = {model: inputs_and_outputs(model, TEXT.held_out_BS) for model in both}
    sample = inputs_and_outputs(teacher, TEXT.train_BS[:8])
    blocks, experts = [], []
    for name, layer in pair.plan.layers.items():
        block = name.removesuffix(".experts")
        (_, wanted_TH), (_, out_TH) = given[teacher][block], given[student][block]
        blocks.append(share_missed(out_TH, wanted_TH, sample[block][1]))
        (x_TH, _, _), _ = given[teacher][name]
        (own_x_TH, own_index_TK, _), _ = given[student][name]
        own = [one_expert(student, name, int(e), own_x_TH[t]) for t, row in enumerate(own_index_TK) for e in row]
        wanted = [
            one_expert(teacher, name, layer.keep[int(e)], x_TH[t]) for t, row in enumerate(own_index_TK) for e in row
        ]
        (sample_x_TH, sample_index_TK, _), _ = sample[name]
        usual = [
            one_expert(teacher, name, int(e), sample_x_TH[t]) for t, row in enumerate(sample_index_TK) for e in row
        ]
        experts.append(share_missed(torch.stack(own), torch.stack(wanted), torch.stack(usual)))
    found = layer_errors(pair, both, TEXT.held_out_BS)
    assert found["block"] == pytest.approx(sum(blocks) / len(blocks), rel=1e-4)
    assert found["experts"] == pytest.approx(sum(experts) / len(experts), rel=1e-4)


def inputs_and_outputs(model: PreTrainedModel, ids_BS: torch.Tensor) -> dict[str, tuple[tuple[torch.Tensor, ...], Any]]:
    seen: dict[str, tuple[tuple[torch.Tensor, ...], Any]] = {}
    names = [name for name, _ in model.named_modules() if name.endswith((".mlp", ".experts"))]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (given, out.flatten(0, -2))})
        )
        for name in names
    ]
    plain_logits(model, ids_BS)
    for handle in handles:
        handle.remove()
    return seen


def one_expert(model: PreTrainedModel, name: str, expert: int, x_H: torch.Tensor) -> torch.Tensor:
    experts: Any = model.get_submodule(name)
    with torch.inference_mode():
        gate_I, up_I = (experts.gate_up_proj[expert] @ x_H).chunk(2)
        return experts.down_proj[expert] @ (torch.nn.functional.silu(gate_I) * up_I)


def share_missed(out_NH: torch.Tensor, wanted_NH: torch.Tensor, sample_NH: torch.Tensor) -> float:
    sample_N, wanted_N = sample_NH.square().sum(1), wanted_NH.square().sum(1)
    usual = sample_N.median()
    weight_N = torch.minimum(torch.ones(()), usual / wanted_N).sqrt()
    whole = torch.minimum(sample_N, (sample_N * usual).sqrt()).mean()
    return float(((out_NH - wanted_NH).square().sum(1) * weight_N).mean() / whole)


def test_errors_of_parts_add_up_to_those_of_the_whole(
    pair: Pair, both: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    whole = layer_errors(pair, both, TEXT.held_out_BS)
    parts = [layer_errors(pair, both, rows_BS) for rows_BS in TEXT.held_out_BS.split(2)]
    for name, error in whole.items():
        assert error == pytest.approx(sum(part[name] for part in parts) / len(parts), rel=1e-5)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "qwen2_moe"])
def test_every_family_learns(family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    pair = make_pair(checkpoint_of(family), tmp_path / "pair")
    made = train(pair.job(tmp_path / "job", "experts=1,block=1,logits=1", "all", evaluations=1), unheard)
    assert made.better
    assert {name for name, _ in pair.student.load().named_parameters()} == best(tmp_path / "job").keys()


# However the work is shaped


def trained(pair: Pair, directory: Path, objective: str, parts: str, **settings: Any) -> Outcome:
    return train(pair.job(directory, objective, parts, **settings), unheard)


@pytest.mark.parametrize("settings", [{"accumulation": 4}, {"gradient_checkpointing": True}], ids=str)
def test_how_passes_are_cut_changes_nothing_but_rounding(settings: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    objective, parts = "experts=0.5,block=0.5,logits=1,text=0.1", "experts,router"
    plain = trained(pair, tmp_path / "plain", objective, parts)
    other = trained(pair, tmp_path / "other", objective, parts, **settings)
    assert other.curve == pytest.approx(plain.curve, rel=1e-5)
    assert other.held_out == pytest.approx(plain.held_out, rel=1e-5)
    assert len(plain.curve) == STEPS


def test_a_student_learns_in_the_mode_in_which_it_is_used(tmp_path: Path) -> None:
    config = tiny.FAMILIES["mixtral"]()
    config.attention_dropout, config.router_jitter_noise, config.output_router_logits = 0.5, 0.5, True
    model = tiny.build(config)
    expected = plain_logits(model, TEXT.held_out_BS)
    learn_as_used(model)
    model.train()
    assert torch.equal(model(input_ids=TEXT.held_out_BS).logits, expected)
    assert any(module.training for module in model.modules())  # those that checkpoint gradients


# The teacher's outputs on disk


def test_a_teacher_on_disk_teaches_as_one_in_memory(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = trained(pair, tmp_path / "computed", "logits=1", "experts")
    job = pair.job(tmp_path / "cached", "logits=1", "experts", teacher_outputs="cached")
    cached = train(job, unheard)
    assert cached.curve == pytest.approx(computed.curve, abs=2e-3)

    # What is there is not computed again, and where all is, the teacher is not even loaded.
    files = sorted(job.teacher_directory.iterdir())
    assert len(files) == -(-30 // ROWS_PER_FILE)
    times = [path.stat().st_mtime_ns for path in files]
    begin_again(job.directory)
    loaded = note_loads(monkeypatch)
    assert train(job, unheard).curve == cached.curve
    assert loaded == [pair.student.directory]
    files[1].unlink()
    begin_again(job.directory)
    assert train(job, unheard).curve == cached.curve
    assert loaded[1:] == [pair.teacher.directory, pair.student.directory]
    assert files[0].stat().st_mtime_ns == times[0]
    assert files[1].stat().st_mtime_ns > times[1]


def begin_again(directory: Path) -> None:
    shutil.rmtree(directory / "states")
    (directory / "outcome.json").unlink()


def note_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    loaded: list[Path] = []
    original = Checkpoint.load

    def load(self: Checkpoint, *args: Any, **kwargs: Any) -> PreTrainedModel:
        loaded.append(self.directory)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "load", load)
    return loaded


def test_text_alone_needs_no_teacher(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = note_loads(monkeypatch)
    assert trained(pair, tmp_path / "job", "text=1", "router").better
    assert loaded == [pair.student.directory]


# Killed, it goes on


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int) -> Callable[[Event], None]:
    return lambda event: kill() if event.done == step else None


@pytest.fixture(scope="module")
def uninterrupted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "job"
    trained(pair, directory, "logits=1,block=0.1", "experts,lora")
    return directory


def _killed_while_learning(pair: Pair, job: Any) -> None:
    train(job, at_step(5))


def _killed_while_a_state_is_written(pair: Pair, job: Any) -> None:
    original = DistillationTrainer._save_rng_state

    def save(self: DistillationTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            kill()
        original(self, output_dir)

    DistillationTrainer._save_rng_state = save
    train(job, unheard)


def _killed_before_the_state_is_whole(pair: Pair, job: Any) -> None:
    original = Keeping.make_whole

    def make_whole(self: Keeping, state: Path) -> None:
        if state.name == "checkpoint-4":
            kill()
        original(self, state)

    Keeping.make_whole = make_whole  # type: ignore[method-assign]
    train(job, unheard)


def _killed_before_the_older_state_is_removed(pair: Pair, job: Any) -> None:
    original = Keeping.remove_but

    def remove_but(self: Keeping, state: Path | None) -> None:
        if state and state.name == "checkpoint-4":
            kill()
        original(self, state)

    Keeping.remove_but = remove_but  # type: ignore[method-assign]
    train(job, unheard)


@pytest.mark.parametrize(
    ("moment", "goes_on_from"),
    [
        (_killed_while_learning, 4),
        (_killed_while_a_state_is_written, 2),
        (_killed_before_the_state_is_whole, 2),
        (_killed_before_the_older_state_is_removed, 4),
    ],
)
def test_killed_it_goes_on_and_ends_with_the_same_weights(
    moment: Callable[[Pair, Any], None], goes_on_from: int, pair: Pair, uninterrupted: Path, tmp_path: Path
) -> None:
    job = pair.job(tmp_path / "job", "logits=1,block=0.1", "experts,lora")
    (code,) = in_processes(1, lambda: moment(pair, job))
    assert code == -signal.SIGKILL
    states = list((job.directory / "states").glob("checkpoint-*"))
    assert len(states) <= 2
    events: list[Event] = []
    made = train(job, events.append)
    assert next(event.done for event in events if event.total) == goes_on_from + 1
    assert made.curve == outcome(uninterrupted).curve
    assert made.held_out == outcome(uninterrupted).held_out
    assert same(best(job.directory), best(uninterrupted))
    assert len(list((job.directory / "states").glob("checkpoint-*"))) == 1


def test_killed_after_it_stopped_it_trains_no_more(pair: Pair, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 1.0, "patience": 1, "evaluations": 12}
    expected = trained(pair, tmp_path / "expected", "logits=1", "experts", **settings)
    job = pair.job(tmp_path / "job", "logits=1", "experts", **settings)
    original = DistillationTrainer.train

    def train_and_die(self: DistillationTrainer, **options: Any) -> None:
        original(self, **options)
        kill()

    def work() -> None:
        DistillationTrainer.train = train_and_die
        train(job, unheard)

    assert in_processes(1, work) == [-signal.SIGKILL]
    events: list[Event] = []
    made = train(job, events.append)
    assert not [event for event in events if event.total]
    assert made.held_out == expected.held_out
    assert made.reason == expected.reason


def outcome(directory: Path) -> Outcome:
    found = Outcome.of(directory)
    assert found
    return found


def test_a_process_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = os.fork()
    if not gone:
        os._exit(0)
    os.waitpid(gone, 0)
    arguments = (TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())

    def step(launcher: int) -> None:
        os.environ[LAUNCHER_VARIABLE] = str(launcher)
        Telling(unheard, 1).on_step_begin(*arguments)

    assert in_processes(1, lambda: step(gone)) == [1]
    assert in_processes(1, lambda: step(os.getppid())) == [0]


# What is left where it gets no better


def test_the_best_state_is_what_is_kept(pair: Pair, tmp_path: Path) -> None:
    made = trained(
        pair, tmp_path / "job", "logits=1", "experts", epochs=4, learning_rate=0.02, evaluations=8, patience=9
    )
    lowest = min(made.held_out, key=lambda step: made.held_out[step])
    assert made.better
    assert sorted(made.held_out).index(lowest) > 1  # neither the first state that was better
    assert lowest < max(made.held_out)  # nor the last
    assert made.after == made.held_out[lowest]
    student = pair.student.load(torch.float32)
    student.load_state_dict(best(tmp_path / "job"), strict=False)
    shares = pair.teacher.load(torch.float32)(input_ids=TEXT.held_out_BS).logits.log_softmax(-1).topk(64)
    logits = student(input_ids=TEXT.held_out_BS).logits.flatten(0, 1)
    found = divergence(logits, shares.indices.flatten(0, 1), shares.values.flatten(0, 1), 1.0)
    assert found.item() == pytest.approx(made.after, rel=1e-4)


def test_it_stops_when_it_gets_no_better(pair: Pair, tmp_path: Path) -> None:
    made = trained(
        pair, tmp_path / "job", "logits=1", "experts", epochs=4, learning_rate=1.0, patience=2, evaluations=12
    )
    assert not made.better
    assert made.after == made.before
    assert max(made.held_out) == 4
    assert "got no better in 2 evaluations, the last after step 4 of 24" in made.reason


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of a step no number."""
    original = DistillationTrainer.compute_loss

    def compute_loss(self: DistillationTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)


def test_divergence_before_anything_got_better_is_an_error(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    with pytest.raises(InputError, match=r"diverged at step 2, where the learning rate was 0\.003"):
        trained(pair, tmp_path / "job", "logits=1", "experts")


def test_divergence_later_leaves_the_best_state(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trained(pair, tmp_path / "usual", "logits=1", "experts", evaluations=6, patience=9)
    poison(monkeypatch, 4)
    made = trained(pair, tmp_path / "job", "logits=1", "experts", evaluations=6, patience=9)
    assert "diverged at step 4" in made.reason
    assert made.better
    assert made.after == min(loss for step, loss in usual.held_out.items() if step < 4)
    assert all(value.isfinite().all() for value in best(tmp_path / "job").values())


def test_events_pass_from_one_process_to_another(tmp_path: Path) -> None:
    file = EventFile.of(tmp_path)
    file.clear()
    said = [Event(done=1, total=2), Event(metrics={"loss": 0.5}, step=3), Event(note="a sentence")]
    file.write(said[0])
    assert list(file.new()) == said[:1]
    for event in said[1:]:
        file.write(event)
    with (tmp_path / "events.jsonl").open("a") as half:
        half.write('{"done": 2')
    assert list(file.new()) == said[1:]
    assert list(file.new()) == []
