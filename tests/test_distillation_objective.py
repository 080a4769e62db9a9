"""What is asked for, what learns, which zeros stay, and at what rate: the words and the arithmetic of distillation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.checkpoint.layout import find_layout
from moeprune.distillation import rates
from moeprune.distillation.layer_local.learn import rate_at
from moeprune.distillation.layer_local.noted import Memory, Noted
from moeprune.distillation.losses import block_error, experts_error
from moeprune.distillation.objective import Objective
from moeprune.distillation.parts import OF_NO_LAYER, default_parts, parse_parts, trainable
from moeprune.distillation.zeros import Zeros, has_zeros
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan, Sparsity

WEIGHTS = st.floats(0, 1e6, allow_nan=False).map(lambda value: float(f"{value:.12g}"))


@given(st.tuples(*[WEIGHTS] * 4).filter(any), st.floats(0.01, 100), st.integers(1, 10**6))
def test_an_objective_is_read_as_it_is_printed(
    weights: tuple[float, float, float, float], temperature: float, top: int
) -> None:
    temperature = float(f"{temperature:.12g}")
    objective = Objective(*weights, temperature, top)
    assert Objective.parse(str(objective)) == objective
    assert objective.layer_local == (not any(weights[2:]))


def test_spaces_do_not_matter() -> None:
    assert Objective.parse(" experts = 1 , text=.5") == Objective(experts=1, text=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magic=1", "'magic', which is no objective; known: experts, block, logits, text, temperature, teacher_top"),
        ("block", "is not of the form NAME=NUMBER; write for example block=0.5"),
        ("logits=1,teacher_top=2.5", "write for example teacher_top=64"),
        ("block=1,block=2", "names block twice"),
        ("block=-1", "none one below"),
        ("block=nan", "asks for nothing that can be had"),
        ("block=0", "asks for nothing that can be had"),
        ("temperature=2", "asks for nothing that can be had"),
        ("logits=1,temperature=0", "must be above 0, not 0"),
        ("logits=1,teacher_top=0", "at least 1 of the teacher's logits"),
        ("", "which is no objective"),
    ],
)
def test_what_is_no_objective(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        Objective.parse(text)
    assert said in str(error.value)


class TestParts:
    @pytest.fixture(scope="class")
    def setting(self) -> tuple:
        config = tiny.FAMILIES["qwen2_moe"]()
        layout = find_layout(config)
        layers = list(layout.layers)
        plan = tiny.plan_for(layers, [[0, 1, 2]] * 3, "f")
        names = [name for name, _ in tiny.build(config).named_parameters()]
        return plan, layout, names

    def test_each_parameter_of_a_block_is_of_one_part(self, setting: tuple) -> None:
        plan, layout, names = setting
        chosen = {part: trainable({part}, plan, layout, names) for part in ("experts", "router", "shared")}
        for layer in layout.layers:
            inside = [name for name in names if name.startswith(layer.removesuffix("experts"))]
            assert sorted(name for part in chosen.values() for name in part[layer]) == sorted(inside)
        first = "model.layers.0.mlp"
        assert chosen["experts"][f"{first}.experts"] == [f"{first}.experts.{one}_proj" for one in ("gate_up", "down")]
        assert chosen["router"][f"{first}.experts"] == [f"{first}.gate.weight"]
        together = trainable({"experts", "router"}, plan, layout, names)
        assert all(
            set(together[layer]) == {*chosen["experts"][layer], *chosen["router"][layer]} for layer in layout.layers
        )
        assert trainable(default_parts(plan), plan, layout, names) == together

    def test_all_is_every_parameter_once(self, setting: tuple) -> None:
        plan, layout, names = setting
        learning = trainable({"all"}, plan, layout, names)
        assert sorted(name for some in learning.values() for name in some) == sorted(names)
        assert "model.embed_tokens.weight" in learning[OF_NO_LAYER]
        assert trainable({"lora"}, plan, layout, names) == {}

    def test_what_is_condensed_learns_by_default(self, setting: tuple) -> None:
        plan, layout, names = setting
        first = next(iter(plan.layers))
        condensed = plan.model_copy(
            update={"layers": plan.layers | {first: LayerPlan(experts=8, top_k=2, keep=[1], condensed={1: 1.0})}}
        )
        dense = [name for name in names if not name.startswith("model.layers.0.mlp")]
        dense += [f"model.layers.0.mlp.{one}_proj.weight" for one in ("gate", "up", "down")]
        assert default_parts(condensed) == {"experts", "router", "condensed"}
        learning = trainable({"condensed"}, condensed, layout, dense)
        assert learning == {first: dense[-3:]}
        assert len(trainable(default_parts(condensed), condensed, layout, dense)) == 3
        with pytest.raises(InputError, match="a layer that its plan condensed"):
            trainable({"condensed"}, plan, layout, names)

    def test_a_part_that_is_none(self) -> None:
        assert parse_parts(" experts , lora") == {"experts", "lora"}
        for text in ("experts,heads", "", "experts,"):
            with pytest.raises(InputError, match="which is no part of a model; known: experts, router"):
                parse_parts(text)


@settings(max_examples=30)
@given(
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from([torch.optim.AdamW, torch.optim.SGD]),
    st.floats(0, 0.5),
)
def test_zeros_stay_zero_whatever_the_optimizer_remembers(
    seed: int, share: float, kind: type[torch.optim.Optimizer], decay: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 4, 5, generator=generator)
    zero = torch.rand(values.shape, generator=generator) < share
    parameter = torch.nn.Parameter(values.masked_fill(zero, 0))
    momentum: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([parameter], lr=0.1, weight_decay=decay, **momentum)  # type: ignore[call-arg]
    parameter.grad = torch.randn(values.shape, generator=generator)
    optimizer.step()  # of a time before: momentum for all weights
    with torch.no_grad():
        parameter.masked_fill_(zero, 0)
    Zeros([parameter]).keep(optimizer)
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(values.shape, generator=generator)
        optimizer.step()
        assert not parameter.detach()[zero].view(torch.int32).any()
        assert (parameter.detach() != before)[~zero].all()


def test_zeros_are_those_of_the_experts_weights_in_a_sparse_plan() -> None:
    dense = Plan(method="", options={}, ratio=0.5, model="", data="", layers={})
    sparse = dense.model_copy(update={"sparsity": Sparsity(pattern="0.5", score="magnitude")})
    weight, bias = torch.zeros(4, 3, 2), torch.zeros(4, 3)
    assert has_zeros(sparse, "mlp.experts", "mlp.experts.down_proj", weight)
    assert not has_zeros(dense, "mlp.experts", "mlp.experts.down_proj", weight)
    assert not has_zeros(sparse, "mlp.experts", "mlp.experts.down_proj_bias", bias)
    assert not has_zeros(sparse, "mlp.experts", "mlp.gate.weight", weight)
    assert not has_zeros(sparse, OF_NO_LAYER, "norm.weight", weight)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.001, 1000))
def test_errors_are_shares_that_do_not_depend_on_units(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    out_TH, wanted_TH = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    say_T = torch.rand(6, generator=generator) + 0.1
    error = block_error(out_TH * scale, wanted_TH * scale, say_T)
    torch.testing.assert_close(error, block_error(out_TH, wanted_TH, say_T), rtol=1e-4, atol=1e-6)
    by_hand = sum((say_T[t] * (out_TH[t] - wanted_TH[t]).norm()) ** 2 for t in range(6))
    by_hand = by_hand / sum((say_T[t] * wanted_TH[t].norm()) ** 2 for t in range(6))
    torch.testing.assert_close(error.double(), torch.as_tensor(by_hand).double(), rtol=1e-4, atol=1e-6)
    assert block_error(wanted_TH, wanted_TH, say_T) == 0
    each = [block_error(out_TH[part], wanted_TH[part], say_T[part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(experts_error(out_TH, wanted_TH, say_T, [2, 0, 4]), (each[0] + each[1]) / 2)


def test_a_rate_suits_weights_of_any_size_and_width() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.nn.Parameter(size * torch.randn(64, 256, generator=generator)) for size in (0.01, 1.0))
    wide = torch.nn.Parameter(torch.randn(64, 1024, generator=generator))
    zero = torch.nn.Parameter(torch.zeros(64))
    sparse = torch.nn.Parameter(large.detach() * (torch.rand(64, 256, generator=generator) < 0.5))
    found = [group["lr"] for group in rates.groups([small, large, wide, zero, sparse], 0.1)]
    assert found[1] == pytest.approx(0.1, rel=0.05)
    assert found[2] == pytest.approx(0.05, rel=0.05)
    assert found[4] == pytest.approx(0.1, rel=0.05)
    assert found[0] == pytest.approx(0.1 * 0.1 * (0.01 + 1 + 1 + 1) / 5, rel=0.05)  # not below a tenth of the mean
    assert found[3] > 0
    for group, parameter in zip(rates.groups([small, large], 0.1), (small, large), strict=True):
        assert group["params"] == [parameter]


@given(st.integers(1, 500))
def test_the_rate_rises_once_and_falls_to_nearly_nothing(steps: int) -> None:
    course = [rate_at(step, steps) for step in range(steps)]
    peak = course.index(max(course))
    assert max(course) == 1
    assert course[:peak] == sorted(course[:peak])
    assert course[peak:] == sorted(course[peak:], reverse=True)
    assert all(0 < rate <= 1 for rate in course)
    assert steps < 40 or course[-1] < 0.01


@given(st.integers(1, 7), st.integers(1, 3), st.sampled_from([0, 1 << 20]))
def test_what_is_noted_some_at_a_time_is_given_for_any(sequences: int, at_once: int, in_memory: int) -> None:
    """By sequence, by token, the same for all, and no tensor at all; in memory or in a file."""
    tokens = 5
    at_once = min(at_once, sequences)
    by_row, by_token = torch.randn(sequences, tokens, 3), torch.randn(sequences * tokens, 2).to(torch.bfloat16)
    common = torch.randn(9, 4)
    with tempfile.TemporaryDirectory() as directory:
        noted = Noted(sequences, tokens, Memory(in_memory, Path(directory)))
        for start in range(0, sequences, at_once):
            stop = min(sequences, start + at_once)
            part = by_token[start * tokens : stop * tokens]
            with torch.inference_mode():
                noted.put(
                    slice(start, stop), ((by_row[start:stop].clone(),), {"x": part.clone(), "c": common, "n": None})
                )
        assert not list(Path(directory).iterdir())
        rows = torch.randperm(sequences)[:3]
        (row,), rest = noted.get(rows)
    assert torch.equal(row, by_row[rows])
    assert torch.equal(rest["x"], by_token.view(sequences, tokens, 2)[rows].flatten(0, 1))
    assert torch.equal(rest["c"], common)
    assert rest["n"] is None
    assert not row.is_inference()
    assert not rest["c"].is_inference()
