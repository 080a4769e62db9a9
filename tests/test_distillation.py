"""Distillation wins back some of what pruning lost, layer by layer, and touches nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from elsewhere import run_elsewhere
from masking import draws, plain_logits
from safetensors.torch import load_file
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation import Distilled, distill
from moeprune.errors import InputError
from moeprune.steps import distill as step

BLOCKS = 48
HELD_OUT = 6
UNEVEN = [3, 6, 4]


@dataclass
class Pair:
    """A teacher, its pruned student, and what learns in the student."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    trainable: dict[str, list[str]]

    def learn(self, ids_BS: torch.Tensor, **options: Any) -> Distilled:
        return distill(self.teacher, self.student, self.trainable, ids_BS, **options)


@pytest.fixture
def pair_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Pair]:
    def get(family: str, counts: list[int] = UNEVEN, teacher_dtype: torch.dtype = torch.float32) -> Pair:
        source = Checkpoint(checkpoint_of(family))
        names = list(source.layout.layers)
        plan = tiny.plan_for(names, draws(3, len(names), counts[: len(names)]), source.fingerprint)
        student = apply(source, plan, tmp_path / family).load(torch.float32)
        trainable = {name: list(layer.parameters) for name, layer in source.layout.layers.items()}
        return Pair(source.load(teacher_dtype), student, trainable)

    return get


@pytest.fixture(name="ids_BS")
def token_ids() -> torch.Tensor:
    return tiny.token_ids(9, blocks=BLOCKS)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def error_by_hand(pair: Pair, layer: str, ids_BS: torch.Tensor) -> float:
    """Of the student's block on what the teacher's block gets, relative to the variance of what that gives."""
    block = layer.removesuffix(".experts")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = pair.teacher.get_submodule(block)
    handle = module.register_forward_hook(lambda _, arguments, out: seen.append((arguments[0], out)))
    try:
        plain_logits(pair.teacher, ids_BS)
    finally:
        handle.remove()
    ((x, target),) = seen
    with torch.inference_mode():
        return ((pair.student.get_submodule(block)(x) - target).square().mean() / target.var()).item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_gets_nearer_to_the_original_on_text_not_learnt_from(
    family: str, pair_of: Callable[..., Pair], ids_BS: torch.Tensor
) -> None:
    pair = pair_of(family)
    before = {name: error_by_hand(pair, name, ids_BS[-HELD_OUT:]) for name in pair.trainable}
    result = pair.learn(ids_BS, epochs=6, learning_rate=1e-2)
    after = {name: error_by_hand(pair, name, ids_BS[-HELD_OUT:]) for name in pair.trainable}
    assert result.error_before == pytest.approx(before, rel=1e-4)
    assert result.error_after == pytest.approx(after, rel=1e-4)
    assert all(after[name] < 0.9 * before[name] for name in pair.trainable)
    assert sum(result.curve[-3:]) < 0.9 * sum(result.curve[:3])
    assert len(result.curve) == 6 * -(-(BLOCKS - HELD_OUT) // 8)


def test_nothing_else_changes(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    pair = pair_of("qwen2_moe")
    teacher, student = state(pair.teacher), state(pair.student)
    result = pair.learn(ids_BS, learning_rate=1e-2)
    learnt = {name for names in pair.trainable.values() for name in names}
    assert result.parameters.keys() == learnt
    assert learnt == {name for name, parameter in pair.student.named_parameters() if parameter.requires_grad}
    for name, value in pair.student.state_dict().items():
        assert torch.equal(value, student[name]) == (name not in learnt), name
        if name in learnt:
            assert torch.equal(value, result.parameters[name])
    assert all(torch.equal(value, teacher[name]) for name, value in pair.teacher.state_dict().items())


def test_a_layer_that_gets_worse_is_put_back(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    pair = pair_of("qwen2_moe")
    before = state(pair.student)
    result = pair.learn(ids_BS, learning_rate=30.0)
    assert all(result.error_after[name] <= result.error_before[name] for name in pair.trainable)
    worse = [name for name in pair.trainable if result.error_after[name] == result.error_before[name]]
    assert worse, "no layer got worse; the test shows nothing"
    for name in worse:
        for parameter in pair.trainable[name]:
            assert torch.equal(pair.student.get_parameter(parameter), before[parameter])


def test_a_student_that_lost_nothing_stays_as_it_is(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    pair = pair_of("qwen2_moe", [8, 8, 8])
    before = state(pair.student)
    result = pair.learn(ids_BS)
    assert result.error_after == result.error_before == dict.fromkeys(pair.trainable, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in pair.student.state_dict().items())


def test_divergence_is_told(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    with pytest.raises(
        InputError, match=r"diverged in model\.layers\.\d\.mlp\.experts at step \d+; lower the learning"
    ):
        pair_of("mixtral").learn(ids_BS, learning_rate=1e30)


def test_too_little_text_is_told(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    with pytest.raises(InputError, match="at least 2 blocks"):
        pair_of("mixtral").learn(ids_BS[:1])
    assert len(pair_of("olmoe").learn(ids_BS[:2]).curve) == 1


def test_the_same_inputs_give_the_same_weights(pair_of: Callable[..., Pair], ids_BS: torch.Tensor) -> None:
    one = pair_of("granitemoe")
    before = state(one.student)
    first = {name: value.clone() for name, value in one.learn(ids_BS).parameters.items()}
    one.student.load_state_dict(before)
    second = one.learn(ids_BS).parameters
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_a_teacher_in_half_precision_teaches_too(
    family: str, pair_of: Callable[..., Pair], ids_BS: torch.Tensor
) -> None:
    pair = pair_of(family, teacher_dtype=torch.bfloat16)
    result = pair.learn(ids_BS, epochs=3, learning_rate=1e-2)
    assert all(result.error_after[name] < result.error_before[name] for name in pair.trainable)
    assert {value.dtype for value in result.parameters.values()} == {torch.float32}


# The step: from checkpoints to a checkpoint


@dataclass
class Recovered:
    student: Path
    out: Path
    result: Distilled
    loaded: dict[str, Any]


STEPS = [
    ("qwen2_moe", "even", "float32"),
    ("qwen2_moe", "uneven", "bfloat16"),
    ("granitemoe", "uneven", "float32"),
    ("mixtral", "even", "bfloat16"),
]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[tuple[str, str, str], Recovered]:
    """Checkpoints as the step writes them, and what they compute in a process that cannot import moeprune."""
    root = tmp_path_factory.mktemp("recovered")
    made, cases = {}, []
    for case in STEPS:
        family, kind, dtype = case
        name = "-".join(case)
        source = Checkpoint(tiny.write(root / name / "original", tiny.FAMILIES[family](), dtype=dtype))
        names = list(source.layout.layers)
        counts = UNEVEN[: len(names)] if kind == "uneven" else [4] * len(names)
        plan = tiny.plan_for(names, draws(1, len(names), counts), source.fingerprint)
        plan.save(root / name / "plan.json")
        student, out = root / name / "pruned", root / name / "distilled"
        apply(source, plan, student, shard_bytes=50_000)
        result = step.distill(
            *map(str, (source.directory, student, root / name / "plan.json", corpus, out)),
            block_tokens=tiny.BLOCK_TOKENS,
            max_blocks=BLOCKS,
            learning_rate=1e-2,
        )
        made[case] = Recovered(student, out, result, {})
        ids = tiny.token_ids(0).tolist()
        cases.append({"name": name, "directory": str(out), "trust": kind == "uneven", "ids": ids})
    results = run_elsewhere(cases, root)
    for case, each in made.items():
        each.loaded = results["-".join(case)]
    return made


@pytest.mark.parametrize("case", STEPS, ids="-".join)
class TestTheStep:
    def test_its_checkpoint_loads_without_moeprune(
        self, case: tuple[str, str, str], recovered: dict[tuple[str, str, str], Recovered]
    ) -> None:
        each = recovered[case]
        assert "error" not in each.loaded, each.loaded["error"]
        assert torch.equal(each.loaded["again"], each.loaded["logits"])
        model = Checkpoint(each.out).load()
        assert (plain_logits(model, tiny.token_ids(0)) - each.loaded["logits"]).abs().max() < 1e-5

    def test_its_checkpoint_holds_what_was_learnt(
        self, case: tuple[str, str, str], recovered: dict[tuple[str, str, str], Recovered]
    ) -> None:
        each = recovered[case]
        assert all(each.result.error_after[name] < each.result.error_before[name] for name in each.result.error_before)
        dtype = getattr(torch, case[2])
        parameters = dict(Checkpoint(each.out).load(dtype).named_parameters())
        for name, value in each.result.parameters.items():
            assert torch.equal(parameters[name], value.to(dtype)), name

    def test_the_rest_and_every_precision_is_as_it_was(
        self, case: tuple[str, str, str], recovered: dict[tuple[str, str, str], Recovered]
    ) -> None:
        each = recovered[case]
        before, after = (
            {name: value for shard in directory.glob("*.safetensors") for name, value in load_file(shard).items()}
            for directory in (each.student, each.out)
        )
        assert before.keys() == after.keys()
        assert {value.dtype for value in after.values()} == {getattr(torch, case[2])}
        moe = (".experts.", ".gate.weight", ".router.layer.", ".input_linear.", ".output_linear.")
        unlike = {name for name in after if not torch.equal(before[name], after[name])}
        assert unlike
        assert unlike <= {name for name in after if any(part in name for part in moe)}
        weights = (".safetensors", ".index.json")
        for path in each.student.iterdir():
            if not path.name.endswith(weights):
                assert (each.out / path.name).read_bytes() == path.read_bytes(), path.name


class TestStepRefusals:
    @pytest.fixture
    def arguments(self, qwen: Path, corpus: Path, tmp_path: Path) -> dict[str, Any]:
        source = Checkpoint(qwen)
        plan = tiny.plan_for(list(source.layout.layers), [[0, 1, 2]] * 3, source.fingerprint)
        plan.save(tmp_path / "plan.json")
        apply(source, plan, tmp_path / "pruned")
        paths = {"teacher": qwen, "student": tmp_path / "pruned", "plan": tmp_path / "plan.json", "data": corpus}
        return {name: str(path) for name, path in paths.items()} | {"out": str(tmp_path / "out")}

    def test_a_student_that_the_plan_does_not_make(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not keep the experts"):
            step.distill(**arguments | {"student": arguments["teacher"]}, block_tokens=tiny.BLOCK_TOKENS)
        assert not (tmp_path / "out").exists()

    def test_a_plan_for_another_teacher(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        other = tiny.write(tmp_path / "other", tiny.FAMILIES["qwen2_moe"](), seed=4)
        with pytest.raises(InputError, match="another model"):
            step.distill(**arguments | {"teacher": str(other)}, block_tokens=tiny.BLOCK_TOKENS)

    def test_a_place_that_is_taken(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="exists already"):
            step.distill(**arguments | {"out": arguments["student"]}, block_tokens=tiny.BLOCK_TOKENS)

    def test_divergence_leaves_nothing(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match="diverged"):
            step.distill(**arguments, block_tokens=tiny.BLOCK_TOKENS, learning_rate=1e30)
        assert sorted(tmp_path.iterdir()) == before
