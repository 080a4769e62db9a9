"""Constants in experts' places: the checkpoint computes what the original does with those experts' outputs replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from elsewhere import run_elsewhere
from masking import experts_modules, largest_difference, masked_logits, plain_logits
from test_quantised import FORMS, write
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeprune.checkpoint import modelling
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply, check_fits, foresee
from moeprune.errors import InputError
from moeprune.methods import make_plan
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass

EQUAL = 1e-5
CALIBRATED_ON = tiny.token_ids(1, 3)
# By layer: who stays and who becomes a constant; the others go. Between them: all that go are constants, as with MoNE;
# some layers without any; different numbers; fewer experts than run for a token; and one that no token chose.
PLANS: dict[str, list[tuple[list[int], list[int]]]] = {
    "all": [([1, 2, 6, 7], [0, 3, 4, 5])],
    "some": [([0, 1, 4, 5, 6], []), ([2, 3, 5], [0, 7]), ([6], [1, 2])],
}
CASES = [("qwen2_moe", "some"), ("granitemoe", "some"), ("grouped", "all"), ("gpt_oss", "some")]


@dataclass
class Case:
    source: Checkpoint
    pruned: Checkpoint
    plan: Plan
    stats: Stats
    ids_BS: torch.Tensor
    result: dict[str, Any] = field(default_factory=dict)


def stats_of(source: Checkpoint, model: PreTrainedModel) -> Stats:
    statistics = ["output", "output_square", "routed_tokens"]
    return calibrate(InMemoryPass(model), source.fingerprint, CALIBRATED_ON, statistics=statistics)


def plan_of(stats: Stats, kind: str) -> Plan:
    kinds = PLANS[kind]
    layers = {
        name: LayerPlan(experts=8, top_k=2, keep=kinds[place % len(kinds)][0], constant=kinds[place % len(kinds)][1])
        for place, name in enumerate(stats.layers)
    }
    return Plan(method="by hand", options={}, ratio=0.5, model=stats.model, data=stats.data, layers=layers)


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]
) -> dict[tuple[str, str], Case]:
    """Each pruned, and what each then computed in a process that cannot import moeprune."""
    root = tmp_path_factory.mktemp("constants")
    made = {}
    for number, (family, kind) in enumerate(CASES):
        if family in tiny.FAMILIES:
            directory = checkpoint_of(family)
        else:
            config = tiny.group_limited_config() if family == "grouped" else families.tiny_config(family)
            directory = tiny.write(root / "sources" / family, config)
        source = Checkpoint(directory)
        stats = stats_of(source, source.load())
        plan = plan_of(stats, kind)
        pruned = apply(source, plan, root / family / kind, stats=stats)
        made[family, kind] = Case(source, pruned, plan, stats, tiny.token_ids(number))
    described = [
        {
            "name": f"{family}-{kind}",
            "directory": str(case.pruned.directory),
            "trust": True,
            "new_tokens": 3,
            "ids": case.ids_BS.tolist(),
        }
        for (family, kind), case in made.items()
    ]
    results = run_elsewhere(described, root)
    for (family, kind), case in made.items():
        case.result = results[f"{family}-{kind}"]
    return made


class Replaced:
    """Some outputs of an experts module replaced: its hooks take the choices away, and add what stands in for them."""

    def __init__(self, experts: torch.nn.Module, gone: list[int], mean_of: dict[int, torch.Tensor]) -> None:
        self._gone, self._mean_of = torch.tensor(gone, dtype=torch.int64), mean_of
        self._added = torch.zeros(())
        self._handles = [experts.register_forward_pre_hook(self._take_away), experts.register_forward_hook(self._add)]

    def _take_away(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x_TH, index_TK, weight_TK = inputs
        self._added = torch.zeros_like(x_TH)
        for expert, mean_H in self._mean_of.items():
            self._added += (weight_TK * (index_TK == expert)).sum(1, keepdim=True) * mean_H
        return x_TH, index_TK, weight_TK.masked_fill(torch.isin(index_TK, self._gone), 0)

    def _add(self, module: torch.nn.Module, inputs: Any, output_TH: torch.Tensor) -> torch.Tensor:
        return output_TH + self._added

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def means(model: PreTrainedModel) -> dict[str, dict[int, torch.Tensor]]:
    """Each layer's experts' mean outputs over the tokens that choose them, one expert at a time."""
    found: dict[str, dict[int, torch.Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_TH, index_TK, weight_TK = inputs
            for expert in range(8):
                chosen_TK = (index_TK == expert) & (weight_TK != 0)
                alone = type(module).forward(module, x_TH, index_TK, chosen_TK.to(weight_TK.dtype))
                found.setdefault(name, {})[expert] = alone.sum(0) / max(1, int(chosen_TK.sum()))

        return look

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in experts_modules(model).items()]
    plain_logits(model, CALIBRATED_ON)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("family", "kind"), CASES)
class TestEachCase:
    def test_its_logits_are_the_original_s_with_means_for_outputs(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        case = cases[family, kind]
        assert "error" not in case.result, case.result["error"]
        model = case.source.load()
        mean_of = means(model)
        if kind == "some":
            assert any(not layer.constant for layer in case.plan.layers.values())
        with ExitStack() as stack:
            for name, layer in case.plan.layers.items():
                constant = {expert: mean_of[name][expert] for expert in layer.constant}
                stack.callback(Replaced(model.get_submodule(name), layer.constant, constant).remove)
            choosable = [layer.choosable for layer in case.plan.layers.values()]
            expected = masked_logits(model, choosable, case.ids_BS)
        scale = 1 + float(expected.abs().max())
        assert largest_difference(case.result["logits"], expected) < EQUAL * scale
        assert largest_difference(plain_logits(model, case.ids_BS), expected) > 1000 * EQUAL * scale

    def test_it_generates_and_saves_and_loads_again(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        result = cases[family, kind].result
        assert result["generated"].shape[1] > tiny.BLOCK_TOKENS
        assert torch.equal(result["again"], result["logits"])

    def test_only_those_that_stay_are_experts(self, cases: dict[tuple[str, str], Case], family: str, kind: str) -> None:
        case = cases[family, kind]
        kept = {name: len(layer.keep) for name, layer in case.plan.layers.items()}
        assert case.result["experts"] == list(kept.values())
        assert case.pruned.experts_per_layer == kept
        assert foresee(case.source, case.plan).parameters == case.pruned.files.parameters

    def test_moeprune_trusts_its_own_code(self, cases: dict[tuple[str, str], Case], family: str, kind: str) -> None:
        case = cases[family, kind]
        assert modelling.is_ours(case.pruned.directory)
        logits = plain_logits(case.pruned.load(), case.ids_BS)
        assert largest_difference(logits, case.result["logits"]) < EQUAL * (1 + float(logits.abs().max()))
        card = (case.pruned.directory / "README.md").read_text()
        assert "onstants stand in for experts" in card
        assert "trust_remote_code=True" in card


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_computes_the_same(cases: dict[tuple[str, str], Case], implementation: str) -> None:
    case = cases["qwen2_moe", "some"]
    model = case.pruned.load()
    model.set_experts_implementation(implementation)
    assert largest_difference(plain_logits(model, case.ids_BS), case.result["logits"]) < 10 * EQUAL


def test_what_chooses_a_constant_runs_no_expert(cases: dict[tuple[str, str], Case]) -> None:
    case = cases["qwen2_moe", "some"]
    model = case.pruned.load()
    model.set_experts_implementation("grouped_mm")
    rows_of = json.loads((case.pruned.directory / "config.json").read_text())["pruned_constants"]
    with torch.no_grad():
        for name in rows_of:
            experts, constants = model.get_submodule(name), torch.tensor(rows_of[name])
            x_TH = torch.full((1, tiny.HIDDEN), torch.nan)  # what any expert would spread
            output_H = experts(x_TH, constants[None, :2], torch.tensor([[0.25, 0.5]]))[0]
            assert torch.allclose(output_H, torch.tensor([0.25, 0.5]) @ experts.constant_CH[:2])


def test_the_method_is_carried_out(tmp_path: Path, qwen: Path, model_of: Callable[[str], PreTrainedModel]) -> None:
    source = Checkpoint(qwen)
    stats = stats_of(source, model_of("qwen2_moe"))
    plan = make_plan("mone", 0.5, stats)
    pruned = apply(source, plan, tmp_path / "pruned", stats=stats)
    entries = [entry for name, entry in pruned.files.entries.items() if name.endswith("constant_CH")]
    assert [entry.shape for entry in entries] == [(4, tiny.HIDDEN)] * 3


def test_constants_have_the_checkpoint_s_precision(tmp_path: Path) -> None:
    source = Checkpoint(tiny.write(tmp_path / "half", tiny.FAMILIES["mixtral"](), dtype="bfloat16"))
    stats = stats_of(source, source.load())
    pruned = apply(source, plan_of(stats, "all"), tmp_path / "pruned", stats=stats)
    assert {entry.dtype for entry in pruned.files.entries.values()} == {"BF16"}
    model = AutoModelForCausalLM.from_pretrained(pruned.directory, trust_remote_code=True, dtype=torch.bfloat16)
    assert plain_logits(model, tiny.token_ids(0)).isfinite().all()


class TestRefusals:
    def test_stats_that_are_missing_or_others_or_hold_too_little(
        self, tmp_path: Path, qwen: Path, model_of: Callable[[str], PreTrainedModel]
    ) -> None:
        source = Checkpoint(qwen)
        stats = stats_of(source, model_of("qwen2_moe"))
        plan = plan_of(stats, "all")
        with pytest.raises(InputError, match="takes numbers from the Stats"):
            apply(source, plan, tmp_path / "out")
        other = calibrate(InMemoryPass(model_of("qwen2_moe")), source.fingerprint, tiny.token_ids(5))
        with pytest.raises(InputError, match="Stats are of other data"):
            apply(source, plan, tmp_path / "out", stats=other)
        for layer in stats.layers.values():
            del layer.sums["output"]
        with pytest.raises(InputError, match="do not hold output, of which the plan's constants are made"):
            apply(source, plan, tmp_path / "out", stats=stats)
        assert not (tmp_path / "out").exists()

    def test_quantised_weights(self, tmp_path: Path) -> None:
        source = Checkpoint(write(tmp_path / "source", *FORMS["mxfp4"]))
        stats = stats_of(source, source.load(torch.float32))
        with pytest.raises(InputError, match=r"quantised as mxfp4.*know of no constants"):
            apply(source, plan_of(stats, "all"), tmp_path / "out", stats=stats)

    def test_no_expert_at_all(self, tmp_path: Path, qwen: Path, model_of: Callable[[str], PreTrainedModel]) -> None:
        source = Checkpoint(qwen)
        stats = stats_of(source, model_of("qwen2_moe"))
        plan = plan_of(stats, "all")
        name = next(iter(plan.layers))
        plan.layers[name] = LayerPlan(experts=8, top_k=2, keep=[], constant=[0, 1, 2])
        with pytest.raises(InputError, match=f"of {name} only constants would be left"):
            apply(source, plan, tmp_path / "out", stats=stats)

    def test_groups_that_a_plan_would_tear(self, cases: dict[tuple[str, str], Case]) -> None:
        case = cases["grouped", "all"]
        layers = {name: layer.model_copy(update={"constant": [0]}) for name, layer in case.plan.layers.items()}
        with pytest.raises(InputError, match="same number of each group"):
            check_fits(case.source, case.plan.model_copy(update={"layers": layers}))
