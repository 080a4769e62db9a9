"""CD-MoE decides as its authors' procedure does, in less work; what it cannot do, it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import authors_cd_moe as by_authors
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from moeprune.condensing.divergence import divergence
from moeprune.condensing.partial_runs import PartialRuns
from moeprune.condensing.race import nearest, spread_order
from moeprune.errors import InputError
from moeprune.methods import make_plan
from moeprune.methods.base import Trial
from moeprune.methods.cd_moe import mean_gate
from moeprune.plan import Plan
from moeprune.statistics import ExactSum, Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass

IDS_BS = tiny.token_ids(7, blocks=3)
ModelOf = Callable[[str], PreTrainedModel]


def stats_of(model: PreTrainedModel) -> Stats:
    return calibrate(InMemoryPass(model), "model", tiny.token_ids(1, blocks=4), statistics=["gate", "routed_tokens"])


def decide(model: PreTrainedModel, ratio: float, **options: object) -> Plan:
    return make_plan("cd-moe", ratio, stats_of(model), options=options, trial=lambda: Trial(model, IDS_BS))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "mixtral"])
def test_the_choice_is_the_authors(family: str, model_of: ModelOf) -> None:
    model = model_of(family)
    stats = stats_of(model)
    scales = by_authors.shared_scales(model, IDS_BS)
    authors = by_authors.Authors(model, IDS_BS, scales)
    condensed = {}
    for name, layer in stats.layers.items():
        gate_E = mean_gate(layer)
        condensed[name] = {expert: gate_E[expert] for expert in authors.experts(name, gate_E, 3)}
    nearest = authors.layers(condensed, len(condensed) - 1)

    plan = decide(model, 1 - 1 / len(condensed), routed=3)
    assert list(plan.condensed) == [name for name in stats.layers if name in nearest]
    for name, planned in plan.condensed.items():
        assert planned.condensed == condensed[name]
        assert list(planned.condensed) == list(condensed[name])  # also in the order of the choice
        assert planned.keep == sorted(condensed[name])
        assert planned.shared_scale == pytest.approx(scales[name], rel=1e-4)
    others = [planned for name, planned in plan.layers.items() if name not in nearest]
    assert [planned.keep for planned in others] == [list(range(tiny.EXPERTS))]


def test_the_gate_is_the_mean_over_the_tokens_that_an_expert_received() -> None:
    stats = tiny.make_stats([[4, 0, 2, 10, 1, 1, 1, 1]])
    assert mean_gate(next(iter(stats.layers.values()))) == [0.5, 0, *[0.5] * 6]


def test_an_expert_without_tokens_is_not_chosen(model_of: ModelOf) -> None:
    model = model_of("deepseek_v2")
    stats = stats_of(model)
    for layer in stats.layers.values():
        layer.sums["gate"] = ExactSum.zeros(tiny.EXPERTS).add_(layer.sum("gate") * (torch.arange(tiny.EXPERTS) > 4))
    plan = make_plan("cd-moe", 0.5, stats, trial=lambda: Trial(model, IDS_BS))
    (condensed,) = plan.condensed.values()
    assert condensed.keep == [5, 6, 7]


def test_a_run_from_a_layer_on_is_that_of_the_whole_model(model_of: ModelOf) -> None:
    model = model_of("qwen2_moe")
    runs = PartialRuns(model, IDS_BS.split(1))
    whole = runs.whole(1, {})
    assert runs.passes == pytest.approx(1 / 3)
    late = runs.condensed(1, [], 2, whole.entering[2])
    assert runs.passes == pytest.approx(1 / 3 + 1 / 9)
    assert torch.equal(late.final_BSH, whole.final_BSH)
    assert list(late.entering) == [2]
    other = runs.condensed(1, [], 2, whole.entering[2] + 1)  # what enters is what is given, not what would have
    assert not torch.allclose(other.final_BSH, whole.final_BSH)
    with torch.no_grad():
        assert torch.equal(model.base_model(IDS_BS[1:2]).last_hidden_state, whole.final_BSH)  # it is left as it was


def test_where_layers_pass_on_more_the_model_is_run_as_a_whole(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("mixtral")
    runs = PartialRuns(model, IDS_BS.split(1))
    whole = runs.whole(0, {})
    runs.try_to_begin_late(0, whole)
    assert runs.condensed(0, [], 1, whole.entering[1]).entering.keys() == {1}
    monkeypatch.setitem(whole.entering, 1, whole.entering[1] * 2)  # as if the layer before passed on half beside it
    runs.try_to_begin_late(0, whole)
    again = runs.condensed(0, [], 1, whole.entering[1])
    assert again.entering.keys() == {0, 1}
    assert torch.equal(again.final_BSH, whole.final_BSH)


def test_divergence() -> None:
    one_TH, other_TH = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)) * 3
    found_T = divergence(one_TH, other_TH)
    assert found_T.mean().item() == pytest.approx(by_authors.jensen_shannon(one_TH, other_TH), rel=1e-5)
    assert torch.allclose(found_T, divergence(other_TH, one_TH))
    assert divergence(one_TH, one_TH + 5).max() < 1e-6  # a softmax does not see it
    certain_TH = torch.eye(2)[:, :, None].flatten(1) * 100
    assert divergence(certain_TH[:1], certain_TH[1:]).item() == pytest.approx(by_authors.LOG_2, rel=1e-4)


class TestRace:
    """Of candidates that are numbers of rows in a table of costs: candidate, part, token."""

    @given(
        st.integers(1, 6).flatmap(
            lambda parts: st.lists(st.lists(st.integers(0, 9), min_size=parts, max_size=parts), min_size=1, max_size=6)
        )
    )
    def test_where_there_is_too_little_to_be_sure_all_of_it_counts(self, cost_CP: list[list[int]]) -> None:
        asked: list[tuple[int, int]] = []

        def cost(candidate: int, part: int) -> torch.Tensor:
            asked.append((candidate, part))
            return torch.tensor([float(cost_CP[candidate][part])])

        totals = [sum(cost_P) for cost_P in cost_CP]
        assert nearest(range(len(totals)), len(cost_CP[0]), cost) == totals.index(min(totals))
        assert len(set(asked)) == len(asked)  # nothing is run twice

    def test_who_is_clearly_further_is_run_no_more(self) -> None:
        """However much the tokens differ among themselves: both are measured on the same."""
        of_text_Pt = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
        asked: list[float] = []

        def cost(further: float, part: int) -> torch.Tensor:
            asked.append(further)
            return of_text_Pt[part] + further

        assert nearest([0.01, 0.0], 16, cost) == 0.0
        assert asked == [0.01, 0.0, 0.01, 0.0]

    def test_a_difference_that_may_be_chance_is_looked_at_to_the_end(self) -> None:
        draws = torch.Generator().manual_seed(0)
        cost_CPt = torch.rand(2, 8, 64, generator=draws)
        asked: list[int] = []

        def cost(candidate: int, part: int) -> torch.Tensor:
            asked.append(candidate)
            return cost_CPt[candidate, part]

        found = nearest(range(2), 8, cost)
        assert found == cost_CPt.mean((1, 2)).argmin()
        assert asked.count(0) == asked.count(1) == 8

    @given(st.integers(1, 200))
    def test_every_beginning_is_spread_over_the_text(self, parts: int) -> None:
        order = spread_order(parts)
        assert sorted(order) == list(range(parts))
        begun = sorted(order[: max(1, parts // 2)])
        gaps = [after - before for before, after in zip([-1, *begun], [*begun, parts], strict=True)]
        assert max(gaps) <= 5


class TestWrongUse:
    def test_shared_alone_without_shared(self, model_of: ModelOf) -> None:
        with pytest.raises(InputError, match=r"no shared experts, and variant S keeps no others; .*variant=SR"):
            decide(model_of("mixtral"), 0.5, variant="S")

    def test_routed_alone_is_said(self, model_of: ModelOf, capsys: pytest.CaptureFixture[str]) -> None:
        assert decide(model_of("mixtral"), 0.5, routed=2).condensed
        assert "no shared experts: 2 routed ones are all" in capsys.readouterr().err

    def test_what_a_mean_gate_costs_is_said(self, model_of: ModelOf, capsys: pytest.CaptureFixture[str]) -> None:
        plan = decide(model_of("qwen2_moe"), 0.4, variant="S")
        (layer,) = plan.condensed.values()
        assert layer.keep == []
        assert "the mean stands for that, which is " in capsys.readouterr().err
        decide(model_of("deepseek_v2"), 0.5, variant="S")
        assert "the mean stands" not in capsys.readouterr().err

    def test_without_a_model(self, run_cli: Callable[..., tuple[int, str, str]], qwen: Path, tmp_path: Path) -> None:
        stats = tiny.make_stats([[1] * 8] * 3)
        stats.save(tmp_path / "stats")
        plan = ["plan", "make", "--method", "cd-moe", "--ratio", "0.4", "--stats", tmp_path / "stats"]
        code, _, err = run_cli(*plan, "--out", tmp_path / "plan.json")
        assert code == 1
        assert "cd-moe tries what it decides: give it the model and text, `--model M --data D`" in err
        code, _, err = run_cli(*plan, "--model", qwen, "--data", "nowhere.txt", "--out", tmp_path / "plan.json")
        assert code == 1
        assert f"the Stats are of another model than {qwen}" in err

    def test_options(self, model_of: ModelOf) -> None:
        for wrong in ({"variant": "R"}, {"routed": 0}, {"tokens": 0}):
            with pytest.raises(InputError, match=f"option {next(iter(wrong))} of cd-moe"):
                decide(model_of("mixtral"), 0.5, **wrong)
