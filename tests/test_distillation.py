"""Layer-local distillation wins back some of what pruning lost, layer by layer, and touches nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from masking import draws, plain_logits
from safetensors.torch import load_file
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.layer_local import layers as local_layers
from moeprune.distillation.layer_local import learnt
from moeprune.distillation.layer_local.job import Job
from moeprune.distillation.layer_local.layers import Trained, train_layers
from moeprune.distillation.layer_local.learn import Outcome, learn
from moeprune.distillation.layer_local.learnt import LayerLearnt
from moeprune.distillation.layer_local.lesson import Lesson
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.objective import Objective
from moeprune.distillation.parts import default_parts, trainable
from moeprune.distillation.text import Text
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan, Sparsity
from moeprune.recovery.say import roots
from moeprune.statistics.observer import ExpertsCall, intercept
from moeprune.streaming import holding, room, streamed
from moeprune.streaming.room import Room
from moeprune.streaming.streamed import StreamedPass

BLOCKS = 48
UNEVEN = [3, 6, 4]
SETTINGS = Settings(epochs=3, learning_rate=0.02)
STEPS = 3 * 6  # 42 of 48 blocks are learnt from, 8 in a step


@dataclass
class Case:
    """A job, and what it gave."""

    job: Job
    directory: Path

    def train(self, **options: Any) -> dict[str, LayerLearnt]:
        self.directory.mkdir(exist_ok=True)
        train_layers(self.job, self.directory, **options)
        found = {layer: learnt.load(self.directory, layer) for layer in self.job.learning}
        return {layer: one for layer, one in found.items() if one is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for path in self.directory.glob("*.safetensors") for name, value in load_file(path).items()}


def job_of(
    source: Checkpoint, student: Path, plan: Plan, *, parts: frozenset[str] | None = None, settings: Settings = SETTINGS
) -> Job:
    pruned = Checkpoint(student)
    names = [name for name, _ in pruned.without_weights().named_parameters()]
    learning = trainable(parts or default_parts(plan), plan, source.layout, names)
    return Job(source, pruned, plan, learning, Text.of(tiny.token_ids(9, blocks=BLOCKS)), settings)


@pytest.fixture
def case_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Case]:
    def get(
        family: str, counts: list[int] = UNEVEN, *, change: Callable[[Plan], None] = lambda plan: None, **options: Any
    ) -> Case:
        source = Checkpoint(checkpoint_of(family))
        names = list(source.layout.layers)
        plan = tiny.plan_for(names, draws(3, len(names), counts[: len(names)]), source.fingerprint)
        change(plan)
        student = tmp_path / family
        if not student.exists():
            apply(source, plan, student)
        return Case(job_of(source, student, plan, **options), tmp_path / "learnt")

    return get


def block_of(layer: str) -> str:
    return layer.removesuffix(".experts")


def error_by_hand(teacher: PreTrainedModel, student: PreTrainedModel, layer: str, text: Text) -> float:
    """The share that the student's block misses of what the teacher's makes of its own input.

    The square of a token that puts out more than is usual in all the text is divided by how much more.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = teacher.get_submodule(block_of(layer)).register_forward_hook(
        lambda _, arguments, out: seen.append((arguments[0], out[0] if isinstance(out, tuple) else out))
    )
    try:
        plain_logits(teacher, text.rows())
    finally:
        handle.remove()
    ((x_BSH, wanted_BSH),) = seen
    with torch.inference_mode():
        out = student.get_submodule(block_of(layer))(x_BSH)
    held = slice(len(text.train_BS), None)
    square_BS = wanted_BSH.square().sum(-1)
    usual = square_BS.flatten().sort().values[(square_BS.numel() - 1) // 2]
    weight_BS = (usual / square_BS).clamp(max=1).sqrt()
    missed_BS = ((out[0] if isinstance(out, tuple) else out) - wanted_BSH).square().sum(-1)
    return float((weight_BS * missed_BS)[held].sum() / (weight_BS * square_BS)[held].sum())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_gets_nearer_to_the_original_on_text_not_learnt_from(
    family: str, case_of: Callable[..., Case]
) -> None:
    case = case_of(family)
    made = case.train()
    teacher, student = case.job.teacher.load(), case.job.student.load(torch.float32)
    text = case.job.text
    before = {layer: error_by_hand(teacher, student, layer, text) for layer in made}
    student.load_state_dict(case.tensors(), strict=False)
    after = {layer: error_by_hand(teacher, student, layer, text) for layer in made}
    assert list(made) == list(case.job.teacher.layout.layers)
    assert {layer: one.before for layer, one in made.items()} == pytest.approx(before, rel=1e-4)
    assert {layer: one.after for layer, one in made.items()} == pytest.approx(after, rel=1e-4)
    for layer, one in made.items():
        assert after[layer] < before[layer]
        assert one.parameters == case.job.learning[layer]
        assert 8 <= len(one.curve) <= STEPS
    assert sum(after.values()) < 0.8 * sum(before.values())


def test_what_is_chosen_learns_and_nothing_else(case_of: Callable[..., Case]) -> None:
    whole = case_of("qwen2_moe").job.learning
    before = dict(case_of("qwen2_moe").job.student.load(torch.float32).named_parameters())
    for part, ends in {
        "router": (".gate.weight",),
        "experts": (".experts.gate_up_proj", ".experts.down_proj"),
        "shared": (".shared_expert.gate_proj.weight", ".shared_expert.down_proj.weight", ".shared_expert_gate.weight"),
    }.items():
        case = case_of("qwen2_moe", parts=frozenset({part}), settings=Settings(epochs=1))
        case.directory = case.directory.with_name(part)
        made = case.train()
        learnt_here = case.tensors()
        assert {name for one in made.values() for name in one.parameters} == learnt_here.keys()
        for end in ends:
            assert any(name.endswith(end) for name in learnt_here), end
        if part != "shared":
            assert all(name.endswith(ends) for name in learnt_here)
            assert learnt_here.keys() <= {name for names in whole.values() for name in names}
        assert all(not torch.equal(value, before[name]) for name, value in learnt_here.items())


def test_a_student_that_lost_nothing_stays_as_it_is(case_of: Callable[..., Case]) -> None:
    made = case_of("qwen2_moe", [8, 8, 8]).train()
    for one in made.values():
        assert one.before == one.after < 1e-9  # what another order of summing makes
        assert (one.curve, one.parameters, one.reason) == ([], [], "")


def test_a_layer_that_gets_worse_is_left_and_the_reason_told(case_of: Callable[..., Case]) -> None:
    case = case_of("qwen2_moe", settings=Settings(epochs=1, learning_rate=1000.0))
    made = case.train()
    assert not case.tensors()
    for one in made.values():
        assert one.after == one.before > 0
        assert one.parameters == []
        assert "learning rate, 1000, is too high" in one.reason


def test_what_diverges_is_stopped_and_the_last_good_state_kept(case_of: Callable[..., Case]) -> None:
    made = case_of("mixtral", settings=Settings(epochs=1, learning_rate=1e30)).train()
    for one in made.values():
        assert "diverged at step" in one.reason
        assert len(one.curve) < 6
        assert one.after == one.before


HELD_OUT = torch.arange(64, 72)


class Parabola:
    """A lesson of one number: training draws it to 0, and held out sequences would have it elsewhere."""

    def __init__(self, start: float, held_out: float) -> None:
        self.number = torch.nn.Parameter(torch.tensor([start]))
        self._held_out = held_out

    def learn(self, **options: Any) -> Outcome:
        settings = Settings(**{"epochs": 2, "batch_blocks": 2, "learning_rate": 0.2} | options)
        train = torch.arange(64)
        return learn(self, [self.number], train, HELD_OUT, settings, seed=0)  # type: ignore[arg-type]

    open = staticmethod(nullcontext)

    def error(self, rows: torch.Tensor) -> torch.Tensor:
        return self.number.square().sum()

    def mean_error(self, rows: torch.Tensor) -> float:
        wanted = self._held_out if rows is HELD_OUT else 0.0
        return float((self.number.detach() - wanted).square().sum())


def test_too_little_text_is_the_reason_where_only_what_was_trained_on_got_better() -> None:
    lesson = Parabola(0.9, held_out=1.0)
    outcome = lesson.learn()
    assert outcome.before == outcome.after == pytest.approx(0.01)
    assert "too little text" in outcome.reason
    assert torch.equal(lesson.number.detach(), torch.tensor([0.9]))


def test_the_best_state_is_kept_and_what_is_beyond_it_not_looked_for() -> None:
    lesson = Parabola(1.0, held_out=0.6)
    outcome = lesson.learn(epochs=20, learning_rate=0.03)  # fast enough to be past it long before the end
    assert not outcome.reason
    assert outcome.after == lesson.mean_error(HELD_OUT) < 0.5 * outcome.before
    assert lesson.mean_error(torch.arange(1)) > outcome.curve[-1]
    assert len(outcome.curve) < 20 * 32


def test_a_rate_that_is_too_high_is_halved_until_it_is_not() -> None:
    lesson = Parabola(1.0, held_out=0.0)
    outcome = lesson.learn(epochs=4, learning_rate=8.0)
    assert outcome.after < 0.5 * outcome.before
    assert max(outcome.curve) > 1


def test_what_is_held_out_is_told_by_what_it_is() -> None:
    ids_BS = tiny.token_ids(9, blocks=20)
    text, turned = Text.of(ids_BS), Text.of(ids_BS.flip(0))
    assert len(text.held_out_BS) == 2
    assert sorted(text.rows().tolist()) == sorted(ids_BS.tolist())
    assert sorted(text.held_out_BS.tolist()) == sorted(turned.held_out_BS.tolist())
    assert [len(part) for part in (Text.of(ids_BS[:2]).train_BS, Text.of(ids_BS[:2]).held_out_BS)] == [1, 1]
    with pytest.raises(InputError, match=r"makes 1 block of 24 tokens.*needs at least 2"):
        Text.of(ids_BS[:1])


# Objectives


def whole_experts(call: ExpertsCall) -> torch.Tensor:
    """Every expert run on every token: `[E, T, H]`."""
    module = call.module
    outputs = []
    for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
        gate_TI, up_TI = (call.x_TH @ module.gate_up_proj[expert].T).chunk(2, dim=-1)  # type: ignore[index]
        outputs.append(torch.nn.functional.silu(gate_TI) * up_TI @ module.down_proj[expert].T)  # type: ignore[index]
    return torch.stack(outputs)


def reference_error(job: Job, teacher: PreTrainedModel, student: PreTrainedModel, layer: str) -> torch.Tensor:
    """The objective on all sequences, written as one would without thinking of cost."""
    given: list[torch.Tensor] = []
    calls: list[ExpertsCall] = []
    objective = job.settings.objective
    block = teacher.get_submodule(block_of(layer))
    handle = block.register_forward_hook(lambda _, arguments, out: given.extend([arguments[0], out]))
    plain_logits(teacher, job.text.rows())
    handle.remove()
    x_BSH, wanted_BSH = (one.clone() for one in given)

    def run(call: ExpertsCall) -> torch.Tensor:
        calls.append(call)
        hot_TKE = torch.nn.functional.one_hot(call.index_TK, len(call.module.down_proj))  # type: ignore[arg-type]
        return torch.einsum("eth,tke,tk->th", whole_experts(call), hot_TKE.to(call.x_TH.dtype), call.weight_TK)

    with intercept(student, run):
        out_TH = student.get_submodule(block_of(layer))(x_BSH).flatten(0, 1)
    wanted_TH = wanted_BSH.flatten(0, 1)
    (say_T,) = roots([wanted_TH], [torch.ones(len(wanted_TH), dtype=torch.bool)])
    missed = ((out_TH - wanted_TH).square().sum(1) * say_T.square()).sum()
    total = objective.block * missed / (wanted_TH.square().sum(1) * say_T.square()).sum()
    (call,) = calls
    own = teacher.get_submodule(layer)
    with torch.no_grad():
        wanted_ETH = whole_experts(replace(call, module=own))[job.plan.layers[layer].keep]
    chosen_ET = torch.stack([(call.index_TK == expert).any(1) for expert in range(len(wanted_ETH))])
    (say_N,) = roots([wanted_ETH[chosen_ET]], [torch.ones(int(chosen_ET.sum()), dtype=torch.bool)])
    weight_ET = torch.zeros(chosen_ET.shape).masked_scatter(chosen_ET, say_N.square())
    missed_E = ((whole_experts(call) - wanted_ETH).square().sum(2) * weight_ET).sum(1)
    share_E = missed_E / (wanted_ETH.square().sum(2) * weight_ET).sum(1)
    return total + objective.experts * share_E[chosen_ET.any(1)].mean()


@pytest.mark.parametrize("asked", ["block=1", "experts=1", "experts=0.7,block=0.4"])
def test_objectives_and_their_gradients_are_what_their_formulas_say(
    asked: str, case_of: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("qwen2_moe", settings=Settings(Objective.parse(asked), epochs=1))
    seen: dict[str, tuple[float, list[torch.Tensor]]] = {}

    def only_look(lesson: Lesson, parameters: list[torch.nn.Parameter], *_: Any, **__: Any) -> Outcome:
        with lesson.open(), torch.no_grad():
            for parameter in parameters:  # else the experts are the teacher's own
                parameter.mul_(1.1)
        with lesson.open():
            error = lesson.error(torch.arange(BLOCKS))
            gradients = torch.autograd.grad(error, parameters, allow_unused=True, materialize_grads=True)
        seen[layers[len(seen)]] = float(error.detach()), list(gradients)
        return Outcome(1.0, 1.0, [])

    layers = list(case.job.learning)
    monkeypatch.setattr("moeprune.distillation.layer_local.layers.learn", only_look)
    case.train()
    teacher, student = case.job.teacher.load(), case.job.student.load(torch.float32)
    for layer, (error, gradients) in seen.items():
        parameters = [student.get_parameter(name) for name in case.job.learning[layer]]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.1)
        expected = reference_error(case.job, teacher, student, layer)
        assert error == pytest.approx(float(expected.detach()), rel=1e-5)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
        for name, found, right in zip(case.job.learning[layer], gradients, wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6, msg=name)
    assert len(seen) == len(layers)


def test_experts_that_stand_for_several_have_no_counterpart(case_of: Callable[..., Case]) -> None:
    def fuse(plan: Plan) -> None:
        layer = next(iter(plan.layers.values()))
        layer.stands_for = {layer.keep[0]: layer.drop[:1]}

    case = case_of("mixtral", change=fuse, settings=Settings(Objective.parse("experts=1")))
    with pytest.raises(InputError, match="makes one expert of several; use the objective `block`"):
        case.train()


def test_what_has_no_say_in_the_objective_cannot_learn(case_of: Callable[..., Case]) -> None:
    def zero(plan: Plan) -> None:
        plan.sparsity = Sparsity(pattern="0.5", score="magnitude")

    asked = Settings(Objective.parse("experts=1"))
    case = case_of("qwen2_moe", [8, 8, 8], change=zero, parts=frozenset({"shared"}), settings=asked)
    with pytest.raises(InputError, match="has a say in the objective"):
        case.train()


# Whatever the plan makes of a layer


def condense_first(plan: Plan) -> None:
    name = next(iter(plan.layers))
    plan.layers[name] = LayerPlan(experts=8, top_k=2, keep=[1, 4], condensed={1: 0.4, 4: 0.3}, shared_scale=0.9)


def test_a_condensed_layer_learns_as_a_dense_one(case_of: Callable[..., Case]) -> None:
    case = case_of("qwen2_moe", [8, 8, 8], change=condense_first, parts=frozenset({"condensed"}))
    made = case.train()
    first = next(iter(case.job.plan.layers))
    assert list(made) == [first]
    assert made[first].after < 0.9 * made[first].before
    assert {name.rpartition("mlp.")[2] for name in made[first].parameters} == {
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    }


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_zeros_stay_zero_bit_for_bit(pattern: str, case_of: Callable[..., Case]) -> None:
    def zero(plan: Plan) -> None:
        plan.sparsity = Sparsity(pattern=pattern, score="magnitude")

    case = case_of("mixtral", [8, 8], change=zero, parts=frozenset({"experts"}))
    case.train()
    before = case.job.student.load(torch.float32)
    learnt_here = case.tensors()
    assert learnt_here
    for name, value in learnt_here.items():
        zero_here = before.get_parameter(name) == 0
        assert 0.4 < zero_here.float().mean() < 0.6
        assert not value[zero_here].view(torch.int32).any(), name
        assert (value != before.get_parameter(name))[~zero_here].float().mean() > 0.9


# Memory, and being stopped


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v4", "gemma4_text"])
def test_with_a_memory_limit_the_same_is_learnt(
    family: str, case_of: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few experts at a time, some sequences at a time, and all that is noted on disk."""
    if family == "qwen2_moe":
        case = case_of(family, settings=Settings(epochs=1, learning_rate=0.02))
    else:
        source = Checkpoint(tiny.write(tmp_path / "source", families.tiny_config(family)))
        layers = {
            name: LayerPlan(experts=layer.experts, top_k=layer.top_k or 2, keep=list(range(layer.experts // 2 + 1)))
            for name, layer in source.layout.layers.items()
        }
        plan = Plan(method="", options={}, ratio=0.5, model=source.fingerprint, data="0", layers=layers)
        apply(source, plan, tmp_path / "student")
        settings = Settings(epochs=1, learning_rate=0.02)
        case = Case(job_of(source, tmp_path / "student", plan, settings=settings), tmp_path / "learnt")
    unlimited = case.train()
    expected = case.tensors()
    case.directory = tmp_path / "limited"
    monkeypatch.setattr(streamed, "share_out", lambda *args, **kwargs: Room(experts=0, activations=0))
    monkeypatch.setattr(StreamedPass, "_share_out", lambda self, batches: (5, Room(experts=0, activations=0)))
    monkeypatch.setattr(holding, "_WORTH_BYTES", 1)
    monkeypatch.setattr(local_layers, "_SHARE_OF_LIMIT", 0)
    limited = case.train(memory_limit=100 << 30)
    assert any(one.parameters for one in unlimited.values())
    for layer, one in unlimited.items():
        assert limited[layer].before == pytest.approx(one.before, rel=1e-4)
        assert limited[layer].curve == pytest.approx(one.curve, rel=1e-3)
    for name, value in case.tensors().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)


def test_a_limit_that_a_layer_cannot_be_trained_in_is_refused(
    case_of: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_layers, "memory_in_use", lambda: 200 << 30)
    with pytest.raises(InputError, match=r"too small to train model\.layers\.0\.mlp\.experts, which takes"):
        case_of("qwen2_moe").train(memory_limit=100 << 30)


def test_a_later_layer_that_needs_too_much_is_refused_before_anything_runs(
    case_of: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("qwen2_moe")
    layer = "model.layers.1.mlp.experts"  # the largest
    student = case.job.student.load(torch.float32)
    block = sum(parameter.nbytes for parameter in student.get_submodule(block_of(layer)).parameters())
    learning = sum(student.get_parameter(name).nbytes for name in case.job.learning[layer])
    monkeypatch.setattr(local_layers, "memory_in_use", lambda: 0)
    monkeypatch.delattr(StreamedPass, "blocks")
    with pytest.raises(InputError, match=rf"too small to train {re.escape(layer)}, which takes"):
        case.train(memory_limit=block + 4 * learning - 1)


def test_continued_in_less_memory_it_adds_up_as_many_experts_at_once(
    case_of: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a layer that is trained later is trained on what another order of summing made."""
    case = case_of("qwen2_moe", settings=Settings(epochs=1))
    experts = case.job.teacher.load().get_submodule(next(iter(case.job.learning)))
    one_expert = sum(parameter.nbytes for parameter in experts.parameters()) // tiny.EXPERTS
    limit = 100 << 30
    given: list[Room] = []

    def share(*args: Any, **wanted: Any) -> Room:
        monkeypatch.setattr(room, "memory_in_use", lambda: limit - room.SLACK - free)
        given.append(room.share_out(*args, **wanted | {"largest_part": 0, "one_pass": 0}))
        return given[-1]

    def stop(_: Trained) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streamed, "share_out", share)
    free = 16 * one_expert
    with pytest.raises(KeyboardInterrupt):
        case.train(memory_limit=limit, on_layer=stop)
    free = 14 * one_expert
    case.train(memory_limit=limit)
    case.directory = tmp_path / "anew"
    case.train(memory_limit=limit)
    assert [shared.experts // one_expert for shared in given] == [6, 6, 5]
    assert given[1].activations == 2 * one_expert
    case.directory = tmp_path / "without"
    case.train()
    assert not any(path.suffix == ".json" for path in case.directory.iterdir())


def test_what_is_finished_is_not_trained_again(case_of: Callable[..., Case]) -> None:
    whole = case_of("qwen2_moe")
    whole.train()
    files = {path.name: path.read_bytes() for path in whole.directory.iterdir()}
    assert len(files) == 3
    again = case_of("qwen2_moe")
    again.directory = again.directory.with_name("again")
    seen: list[str] = []

    def stop(trained: Trained) -> None:
        seen.append(trained.learnt.layer)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.train(on_layer=stop)
    steps: list[tuple[int, int]] = []
    again.train(on_layer=lambda trained: seen.append(trained.learnt.layer), on_step=lambda *told: steps.append(told))
    assert seen == list(again.job.learning)
    assert steps[0] == (2 * STEPS + 1, 3 * STEPS)
    assert steps[-1] == (3 * STEPS, 3 * STEPS)
    assert steps == sorted(set(steps))
    assert {path.name: path.read_bytes() for path in again.directory.iterdir()} == files
