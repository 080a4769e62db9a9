"""Merged experts are the weighted means of the original's, in every tensor, and so are their logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masking import largest_difference, masked_logits, plain_logits
from pydantic import ValidationError
from safetensors.torch import load_file
from test_quantised import FORMS, write
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeprune.checkpoint import merging
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan

EQUAL = 1e-5
MERGED: list[dict[int, dict[int, float]]] = [
    {1: {0: 0.2, 1: 0.5, 5: 0.3}, 6: {6: 0.75, 7: 0.25}},
    {2: {2: 30, 3: 10}, 4: {1: 0.1, 4: 0.6, 6: 0.3}},  # weights need not add up to 1
    {7: {0: 0.5, 7: 0.5}},
]
KEEP = [[1, 2, 6], [0, 2, 4], [3, 5, 7]]
UNEVEN = [[1, 2, 3, 4, 6], [0, 2, 4], [3, 5, 7]]


def plan_of(source: Checkpoint, keep: list[list[int]], merged: list[Any], router: bool) -> Plan:
    layers = {
        name: LayerPlan(experts=8, top_k=2, keep=kept, merged=of, merged_router=router)
        for name, kept, of in zip(source.layout.layers, cycle(keep), cycle(merged), strict=False)
    }
    return Plan(method="by hand", options={}, ratio=0.5, model=source.fingerprint, data="0" * 32, layers=layers)


@torch.no_grad()
def with_means(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The original, in which each merged expert's weights are the means, wherever the model holds them by expert."""
    model = copy.deepcopy(model)
    for name, layer in plan.layers.items():
        for own, parameter in [*model.named_parameters(), *model.named_buffers()]:
            of_experts = own.startswith(f"{name}.") and parameter.shape[0] == 8
            beside = own.startswith(name.removesuffix("experts")) and parameter.shape[0] == 8
            of_router = beside and (".gate." in own or ".router." in own)
            if of_experts or (of_router and layer.merged_router):
                before = parameter.double()
                for expert, weights in layer.merged.items():
                    total = sum(weights.values())
                    parameter[expert] = sum(before[one] * weight / total for one, weight in weights.items())
    return model


@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize(
    ("family", "keep"), [("qwen2_moe", KEEP), ("qwen2_moe", UNEVEN), ("granitemoe", KEEP), ("gpt_oss", KEEP)]
)
def test_its_logits_are_those_of_the_original_with_means_in_it(
    family: str, keep: list[list[int]], router: bool, tmp_path: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    if family in tiny.FAMILIES:
        source = Checkpoint(checkpoint_of(family))
    else:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(families.tiny_config(family)).save_pretrained(tmp_path / "source")
        source = Checkpoint(tmp_path / "source")
    plan = plan_of(source, keep, MERGED, router)
    model, ids_BS = source.load(), tiny.token_ids(1)
    pruned = apply(source, plan, tmp_path / "pruned")
    kept = list(plan.keep.values())
    expected = masked_logits(with_means(model, plan), kept, ids_BS)
    assert largest_difference(plain_logits(pruned.load(), ids_BS), expected) < EQUAL * (1 + float(expected.abs().max()))
    assert largest_difference(masked_logits(model, kept, ids_BS), expected) > 1000 * EQUAL
    assert bool(list(pruned.directory.glob("*.py"))) == (keep is UNEVEN)


@pytest.fixture(scope="module", params=["mixtral", "granitemoe"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = tiny.FAMILIES[request.param]()
    return Checkpoint(tiny.write(tmp_path_factory.mktemp("half") / request.param, config, dtype="bfloat16"))


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], dict[int, dict[int, float]]]:
    keep = sorted(draw(st.sets(st.integers(0, 7), min_size=2)))
    merged = {
        expert: {
            one: draw(st.sampled_from([0.125, 0.3, 1.0, 7.5]))
            for one in sorted(draw(st.sets(st.integers(0, 7), min_size=1)))
        }
        for expert in keep
        if draw(st.booleans())
    }
    return keep, merged


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(layers(), min_size=2, max_size=2), router=st.booleans(), piecewise=st.booleans())
def test_any_means_are_stored(
    drawn: list[tuple[list[int], dict[int, dict[int, float]]]],
    router: bool,
    piecewise: bool,
    half: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    keep, merged = [kept for kept, _ in drawn], [of for _, of in drawn]
    out = tmp_path_factory.mktemp("any") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        if piecewise:  # as with experts of a real size
            patch.setattr(merging, "_SMALLEST_PIECE_BYTES", 1)
        apply(half, plan_of(half, keep, merged, router), out, shard_bytes=30_000)
    before = load_file(half.directory / "model.safetensors")
    after = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for name, tensor in after.items():
        parts = name.split(".")
        place = int(parts[2]) if parts[1] == "layers" else 0
        is_router, is_own = ".gate." in name or ".router." in name, ".experts." in name
        if not (is_router or is_own or "put_linear" in name):
            assert torch.equal(tensor, before[name])
            continue
        for new, old in enumerate(keep[place]):
            weights = merged[place].get(old, {old: 1.0}) if router or not is_router else {old: 1.0}
            if is_own and int(parts[5]) != new:
                continue
            names = {one: ".".join([*parts[:5], str(one), *parts[6:]]) if is_own else name for one in weights}
            items = {one: before[names[one]] if is_own else before[name][one] for one in weights}
            mean = sum(items[one].double() * weight for one, weight in weights.items()) / sum(weights.values())
            found = tensor if is_own else tensor[new]
            assert found.dtype == torch.bfloat16
            # Rounded once: half of the last place, and a hair for float32's own sums.
            assert ((found.double() - mean).abs() <= mean.abs() * 2**-8 * 1.001 + 1e-7).all()
            if len(weights) == 1:
                assert torch.equal(found, next(iter(items.values())))


def test_a_table_goes_to_the_expert_that_one_was_merged_into() -> None:
    layer = LayerPlan(
        experts=8, top_k=2, keep=[1, 4], merged={1: {0: 0.2, 1: 0.6, 2: 0.2}, 4: {2: 0.4, 4: 0.5, 5: 0.1}}
    )
    assert merging.stand_ins(layer) == {0: 1, 2: 4, 5: 4}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_are_not_averaged(form: str, tmp_path: Path) -> None:
    source = Checkpoint(write(tmp_path / "source", *FORMS[form]))
    plan = plan_of(source, [[0, 1, 4, 5]], [{0: {0: 0.5, 3: 0.5}}], True)
    with pytest.raises(InputError, match=f"quantised as {form}, of which no means can be taken; merge the unquantised"):
        apply(source, plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("weights", [{0: 0.5, 3: -0.5}, {0: 0.0}, {}])
def test_weights_of_which_there_is_no_mean(weights: dict[int, float]) -> None:
    with pytest.raises(ValidationError, match="must not be negative, and some must be above 0"):
        LayerPlan(experts=8, top_k=1, keep=[0, 1], merged={0: weights})
