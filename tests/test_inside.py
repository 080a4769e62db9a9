"""What is seen inside the experts is what they do: it mixes into the layer's own output."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.collectors import COLLECTORS
from moeprune.statistics.inside import down_weight, look_inside
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import InMemoryPass

GROUPS = 2


@pytest.mark.parametrize("family", [*tiny.FAMILIES])
def test_the_output_is_mixed_from_its_inside(family: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of(family)
    calls = 0

    def watch(call: ExpertsCall) -> None:
        nonlocal calls
        calls += 1
        expected = call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK)
        assert torch.allclose(call.run(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        first = look_inside(call.module, call.x_TH, call.index_TK, call.weight_TK)
        assert sum(first.counts_R) == call.index_TK.lt(call.layer_experts).sum()

    with torch.no_grad(), observe(model, watch):
        model.base_model(input_ids=tiny.token_ids(3, 2), use_cache=False)
    assert calls


def reference(call: ExpertsCall, mask_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic by its definition, a token and an expert at a time."""
    experts, hidden = call.layer_experts, call.x_TH.shape[1]
    width = down_weight(call.module, 0).shape[1]
    shapes = {"input": (experts, hidden), "hidden": (experts, width)}
    found = {name: torch.zeros(experts, dtype=torch.float64) for name in ("gated_norm", "output_square")}
    found["output"] = torch.zeros(experts, hidden, dtype=torch.float64)
    for what, shape in shapes.items():
        found |= {f"{kind}{what}_square": torch.zeros(shape, dtype=torch.float64) for kind in ("", "gated_")}
    found["overlap"] = torch.zeros(experts, experts, dtype=torch.float64)
    gate_TE = torch.zeros(len(call.x_TH), experts).scatter(1, call.index_TK.long(), call.weight_TK.float())
    for x_H, gate_E in zip(call.x_TH[mask_T], gate_TE[mask_T], strict=True):
        index = gate_E.nonzero()[:, 0]
        inside = look_inside(call.module, x_H[None], index[None], gate_E[None, index])
        order = index.sort().values
        weighted = {}
        for expert, hidden_I, output_H in zip(
            order.tolist(), inside.hidden_NI.double(), inside.output_NH.double(), strict=True
        ):
            gate = float(gate_E[expert])
            found["gated_norm"][expert] += gate * output_H.norm()
            found["output_square"][expert] += output_H.square().sum()
            found["output"][expert] += output_H
            for what, value in (("input", x_H.double()), ("hidden", hidden_I)):
                found[f"{what}_square"][expert] += value.square()
                found[f"gated_{what}_square"][expert] += (gate * value).square()
            weighted[expert] = gate * output_H
        for one, left in weighted.items():
            for other, right in weighted.items():
                found["overlap"][one, other] += left @ right
    return found


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_statistics_are_what_they_are_defined_as(family: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of(family)
    ids_BS, mask_BS = tiny.token_ids(4, 3), torch.ones(3, tiny.BLOCK_TOKENS, dtype=torch.bool)
    mask_BS[1, 10:] = mask_BS[2, 17:] = False
    inside = [name for name, collector in COLLECTORS.items() if collector.inside]
    stats = calibrate(InMemoryPass(model), "model", ids_BS, mask_BS, statistics=inside, groups=GROUPS)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    order = mask_BS.sum(1).argsort(descending=True, stable=True)
    with (
        torch.no_grad(),
        observe(model, lambda call: expected.update({call.layer: reference(call, mask_BS[order].flatten())})),
    ):
        model.base_model(input_ids=ids_BS[order], attention_mask=mask_BS[order], use_cache=False)
    for name, layer in stats.layers.items():
        assert set(layer.sums) == set(inside) == set(expected[name])
        for key, value in expected[name].items():
            assert value.abs().sum() > 0
            assert torch.allclose(layer.sum(key), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key


def test_batches_and_shards_add_up(model_of: Callable[[str], PreTrainedModel]) -> None:
    def stats(batch_blocks: int) -> Stats:
        ids_BS = tiny.token_ids(5, 4)
        statistics = [name for name, collector in COLLECTORS.items() if collector.inside]
        run = InMemoryPass(model_of("mixtral"))
        return calibrate(run, "model", ids_BS, statistics=statistics, batch_blocks=batch_blocks)

    one, other = stats(4), stats(1)
    for name, layer in one.layers.items():
        for key in layer.sums:
            assert torch.allclose(layer.sum(key), other.layers[name].sum(key), rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize(("family", "blocks"), [("qwen2_moe", 3), ("granitemoe", 3), ("granitemoe", 1)])
def test_standing_in_costs_what_it_is_defined_as(
    family: str, blocks: int, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model = model_of(family)
    ids_BS = torch.cat([tiny.token_ids(6, 4)] * blocks, dim=1)  # longer and shorter than the step between samples
    calls: list[ExpertsCall] = []
    with torch.no_grad(), observe(model, calls.append):
        model.base_model(input_ids=ids_BS, use_cache=False)
    stats = calibrate(InMemoryPass(model), "model", ids_BS, statistics=["stand_in"])
    length, step = ids_BS.shape[1], math.ceil(tiny.EXPERTS / (0.1 * tiny.TOP_K))
    for call in calls:
        expected_EE = torch.zeros(tiny.EXPERTS, tiny.EXPERTS, dtype=torch.float64)
        for token in range(len(call.x_TH)):
            if token % length % step != min(step, length) // 2:
                continue
            with torch.no_grad():
                output_EH = call.every_expert(call.x_TH[token : token + 1])[0].double()
            for expert, gate in zip(call.index_TK[token].tolist(), call.weight_TK[token].double(), strict=True):
                loss_E = (output_EH - output_EH[expert]).square().sum(-1)
                loss_E[expert] = output_EH[expert].square().sum()
                expected_EE[expert] += gate**2 * loss_E
        found_EE = stats.layers[call.layer].sum("stand_in")
        assert expected_EE.abs().sum() > 0
        torch.testing.assert_close(found_EE, expected_EE, rtol=1e-4, atol=1e-5 * float(expected_EE.max()))


def test_a_padded_document_stands_in_as_it_does_alone(model_of: Callable[[str], PreTrainedModel]) -> None:
    ids_BS = tiny.token_ids(6, 4)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[:, -4:] = False
    padded, alone = (
        calibrate(InMemoryPass(model_of("mixtral")), "model", ids, mask, statistics=["stand_in"])
        for ids, mask in ((ids_BS, mask_BS), (ids_BS[:, :-4], mask_BS[:, :-4]))
    )
    for name, layer in padded.layers.items():
        assert layer.sum("stand_in").abs().sum() > 0
        torch.testing.assert_close(layer.sum("stand_in"), alone.layers[name].sum("stand_in"), rtol=1e-4, atol=1e-6)
