"""The observer sees what an independent hook sees, in every family, and leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from masking import largest_difference, plain_logits
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.statistics import Stats, observer
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import InMemoryPass

BLOCKS = 6
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]

# layer -> calls of its experts: inputs, indices, gate weights
Seen = dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


def hooked(model: PreTrainedModel, ids_BS: torch.Tensor) -> Seen:
    """What the experts modules are called with, by PyTorch's own hooks."""
    seen: Seen = {name: [] for name in tiny.experts_module_names(model)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, into=into: into.append(tuple(each.clone() for each in arguments))
        )
        for name, into in seen.items()
    ]
    try:
        plain_logits(model, ids_BS)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def one_expert(module: torch.nn.Module, expert: int, x_TH: torch.Tensor) -> torch.Tensor:
    gate, up = (x_TH @ module.gate_up_proj[expert].T).chunk(2, dim=-1)  # type: ignore[index]
    return (torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T  # type: ignore[index]


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(name="ids_BS")
def token_ids() -> torch.Tensor:
    return tiny.token_ids(5, blocks=BLOCKS)


def test_it_sees_what_the_experts_are_called_with(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    expected = hooked(model, ids_BS)
    calls: list[ExpertsCall] = []
    with observe(model, calls.append):
        plain_logits(model, ids_BS)
    assert [call.layer for call in calls] == list(expected)
    for call in calls:
        ((x_TH, index_TK, weight_TK),) = expected[call.layer]
        assert torch.equal(call.x_TH, x_TH)
        assert torch.equal(call.index_TK, index_TK)
        assert torch.equal(call.weight_TK, weight_TK)
        assert call.module is model.get_submodule(call.layer)


def test_usage_is_what_a_count_by_hand_gives(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    stats = calibrate(InMemoryPass(model), "model", ids_BS, batch_blocks=2)
    seen = hooked(model, ids_BS)
    assert list(stats.layers) == list(seen)
    for name, ((_, index_TK, weight_TK),) in seen.items():
        layer = stats.layers[name]
        counted = Counter(index_TK.flatten().tolist())
        assert layer.count("routed_tokens").tolist() == [counted[expert] for expert in range(tiny.EXPERTS)]
        assert layer.count("routed_tokens").sum() == ids_BS.numel() * tiny.TOP_K
        gate = [weight_TK[index_TK == expert].double().sum().item() for expert in range(tiny.EXPERTS)]
        assert layer.sum("gate").tolist() == pytest.approx(gate, rel=1e-5)
        assert (layer.experts, layer.top_k) == (tiny.EXPERTS, tiny.TOP_K)
    assert (stats.tokens, stats.blocks, stats.block_tokens) == (ids_BS.numel(), BLOCKS, tiny.BLOCK_TOKENS)


def probes_by_hand(model: PreTrainedModel, ids_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each expert's outputs on the mean inputs of the blocks: layer -> [blocks, E, H]."""
    by_layer = {}
    for name, ((x_TH, _, _),) in hooked(model, ids_BS).items():
        pooled_BH = torch.stack([x_SH.mean(dim=0) for x_SH in x_TH.split(tiny.BLOCK_TOKENS)])
        module = model.get_submodule(name)
        with torch.no_grad():
            outputs = [one_expert(module, expert, pooled_BH) for expert in range(tiny.EXPERTS)]
        by_layer[name] = torch.stack(outputs, dim=1).double()
    return by_layer


def test_probes_are_what_each_expert_alone_gives(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    stats = calibrate(InMemoryPass(model), "model", ids_BS, groups=1, batch_blocks=4)
    for name, output_BEH in probes_by_hand(model, ids_BS).items():
        (summed_EH,) = stats.layers[name].sum("probe_output")
        assert output_BEH.abs().max() > 0.1
        assert largest_difference(summed_EH, output_BEH.sum(0)) < 1e-4


def test_groups_are_told_by_the_blocks_alone(qwen: Path, model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids_BS = model_of("qwen2_moe"), tiny.token_ids(7, blocks=12)
    together = calibrate(InMemoryPass(model), "model", ids_BS, groups=4, batch_blocks=5)
    alone = [calibrate(InMemoryPass(model), "model", block_S[None], groups=4) for block_S in ids_BS]
    assert all(sorted(stats.blocks_per_group) == [0, 0, 0, 1] for stats in alone)
    counts = [sum(column) for column in zip(*(stats.blocks_per_group for stats in alone), strict=True)]
    assert together.blocks_per_group == counts
    assert all(calibrate(InMemoryPass(model), "model", tiny.token_ids(8, blocks=40), groups=4).blocks_per_group)
    for name, layer in together.layers.items():
        summed = torch.stack([stats.layers[name].sum("probe_output") for stats in alone]).sum(0)
        assert largest_difference(layer.sum("probe_output"), summed) < 1e-4
        for group, count in enumerate(counts):
            assert (layer.sum("probe_output")[group].abs().sum() > 0) == (count > 0)


def test_observing_changes_nothing(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    before, implementation = plain_logits(model, ids_BS), model.config._experts_implementation

    def look(call: ExpertsCall) -> None:
        call.every_expert(call.x_TH[:3])

    with observe(model, look):
        assert model.config._experts_implementation != implementation
        during = plain_logits(model, ids_BS)
    calibrate(InMemoryPass(model), "model", ids_BS)
    assert torch.equal(during, before)
    assert torch.equal(plain_logits(model, ids_BS), before)
    assert model.config._experts_implementation == implementation
    assert not observer._intercepted


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_rides_on_any_implementation(
    implementation: str, model_of: Callable[[str], PreTrainedModel], ids_BS: torch.Tensor
) -> None:
    model = model_of("mixtral")
    usual = model.config._experts_implementation
    try:
        model.set_experts_implementation(implementation)
        before = plain_logits(model, ids_BS)
        stats = calibrate(InMemoryPass(model), "model", ids_BS, groups=1)
        assert model.config._experts_implementation == implementation
        assert torch.equal(plain_logits(model, ids_BS), before)
    finally:
        model.set_experts_implementation(usual)
    for name, output_BEH in probes_by_hand(model, ids_BS).items():
        assert largest_difference(stats.layers[name].sum("probe_output")[0], output_BEH.sum(0)) < 1e-4


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_the_implementation_is_back_when_the_forward_pass_fails(
    model: PreTrainedModel, ids_BS: torch.Tensor, error: BaseException
) -> None:
    implementation, before = model.config._experts_implementation, plain_logits(model, ids_BS)

    def fail(call: ExpertsCall) -> None:
        raise error

    with pytest.raises(type(error)), observe(model, fail):
        plain_logits(model, ids_BS)
    assert model.config._experts_implementation == implementation
    assert not observer._intercepted
    assert torch.equal(plain_logits(model, ids_BS), before)


def test_an_unevenly_pruned_model_is_observed_too(qwen: Path, tmp_path: Path, ids_BS: torch.Tensor) -> None:
    source = Checkpoint(qwen)
    keep = [[0, 1, 2], [3, 4, 5, 6, 7], [1, 2]]
    plan = tiny.plan_for(list(source.layout.layers), keep, source.fingerprint)
    model = apply(source, plan, tmp_path / "pruned").load()
    stats: Stats = calibrate(InMemoryPass(model), "model", ids_BS)
    assert [layer.experts for layer in stats.layers.values()] == [3, 5, 2]
    for name, ((_, index_TK, _),) in hooked(model, ids_BS).items():
        counts = stats.layers[name].count("routed_tokens")
        assert torch.equal(counts, torch.bincount(index_TK.flatten(), minlength=len(counts)))


def test_outputs_that_are_no_numbers_are_refused(tmp_path: Path, ids_BS: torch.Tensor) -> None:
    model = tiny.build(tiny.FAMILIES["mixtral"]())
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.experts").down_proj[3] = torch.nan
    with pytest.raises(InputError, match="cannot be summed"):
        calibrate(InMemoryPass(model), "model", ids_BS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": 2, "shards": 2}, "counted from 0"),
        ({"shard": -1, "shards": 2}, "counted from 0"),
        ({"shard": 4, "shards": 5, "batch_blocks": 3}, "no data"),
        ({"groups": 0}, "at least 1"),
        ({"batch_blocks": 0}, "at least 1"),
    ],
)
def test_impossible_requests_are_refused(
    options: dict[str, int], said: str, model_of: Callable[[str], PreTrainedModel], ids_BS: torch.Tensor
) -> None:
    with pytest.raises(InputError, match=said):
        calibrate(InMemoryPass(model_of("mixtral")), "model", ids_BS, **options)  # type: ignore[arg-type]
