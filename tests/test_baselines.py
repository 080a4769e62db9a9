"""REAP, contribution, NAEE, HC-SMoE and MoNE do what their formulas say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from moeprune.methods import make_plan, naee
from moeprune.methods.mone import variance
from moeprune.methods.naee import exact, search
from moeprune.plan import LayerPlan
from moeprune.router_groups import NO_GROUPS, RouterGroups
from moeprune.statistics import ExactSum, LayerStats, Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import InMemoryPass

METHODS = ["reap", "contribution", "naee", "hc-smoe", "mone"]
LAYER = "model.layers.0.mlp.experts"


def only_layer(method: str, ratio: float, stats: Stats, **options: object) -> LayerPlan:
    return make_plan(method, ratio, stats, options=options).layers[LAYER]


def stats_with(routed_E: list[int], **sums: torch.Tensor) -> Stats:
    """Of one layer, with these sums in place of invented ones."""
    stats = tiny.make_stats([routed_E])
    stats.layers[LAYER].sums |= {name: ExactSum.zeros(*value.shape).add_(value) for name, value in sums.items()}
    return stats


@given(
    seed=st.integers(0, 2**32),
    method=st.sampled_from(METHODS),
    each=st.integers(0, 3),
    shape=st.sampled_from([(2, 1), (4, 2), (2, 2)]),
)
@settings(max_examples=20, deadline=None)
def test_each_of_the_router_s_groups_loses_the_same(seed: int, method: str, each: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    routed_LE = torch.randint(0, 100, (2, 16), generator=generator).tolist()
    stats = tiny.make_stats(routed_LE, torch.randn(2, 2, 16, 4, generator=generator))
    groups = RouterGroups(*shape)
    for layer in stats.layers.values():
        layer.groups = groups
    each = min(each, 16 // groups.count - 2)
    plan = make_plan(method, each * groups.count / 16 + 0.01, stats)
    for layer_plan in plan.layers.values():
        assert groups.of_each(layer_plan.drop, 16) == [each] * groups.count


class TestReap:
    # The second is used little, but says much when it is; the third is used much, and says little each time.
    stats = stats_with([10, 2, 40, 20], gated_norm=torch.tensor([10.0, 8.0, 20.0, 30.0]))

    def test_reap_is_a_mean(self) -> None:
        layer = only_layer("reap", 0.5, self.stats)
        assert layer.keep == [1, 3]
        assert layer.scores == pytest.approx([1.0, 4.0, 0.5, 1.5])

    def test_contribution_is_a_sum(self) -> None:
        layer = only_layer("contribution", 0.5, self.stats)
        assert layer.keep == [2, 3]
        assert layer.scores == pytest.approx([10.0, 8.0, 20.0, 30.0])

    def test_an_expert_that_none_chose_goes_first(self) -> None:
        stats = stats_with([10, 0, 10, 10], gated_norm=torch.tensor([1.0, 0.0, 2.0, 3.0]))
        assert only_layer("reap", 0.25, stats).drop == [1]


@st.composite
def overlaps(draw: st.DrawFn, largest: int = 9) -> np.ndarray:
    """Inner products of random vectors, some of which cancel."""
    experts = draw(st.integers(2, largest))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    output_EN = generator.normal(size=(experts, draw(st.integers(1, 6)))) * generator.uniform(0, 3, (experts, 1))
    return output_EN @ output_EN.T


class TestNaee:
    @given(overlap_EE=overlaps(), data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_trying_all_sets_finds_the_least(self, overlap_EE: np.ndarray, data: st.DataObject) -> None:
        experts = len(overlap_EE)
        count = data.draw(st.integers(0, experts))
        found = exact(overlap_EE, count, NO_GROUPS)
        errors = [overlap_EE[np.ix_(some, some)].sum() for some in combinations(range(experts), count)]
        assert len(found) == len(set(found)) == count
        assert overlap_EE[np.ix_(found, found)].sum() == pytest.approx(min(errors), abs=1e-9)

    @given(overlap_EE=overlaps(), data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_no_exchange_betters_what_the_search_finds(self, overlap_EE: np.ndarray, data: st.DataObject) -> None:
        experts = len(overlap_EE)
        count = data.draw(st.integers(0, experts))
        found = search(overlap_EE, count, NO_GROUPS)
        error = overlap_EE[np.ix_(found, found)].sum()
        assert len(found) == len(set(found)) == count
        for back in found:
            for out in set(range(experts)) - set(found):
                other = [*(set(found) - {back}), out]
                assert overlap_EE[np.ix_(other, other)].sum() >= error - 1e-6 * np.abs(overlap_EE).sum()

    def test_the_search_takes_back_a_step_that_was_best_alone(self) -> None:
        # 2 goes first, being the least alone; but without it, 0 and 1 cancel.
        output_EN = np.array([[2.0, 0], [-2.0, 0], [0, 1.0], [0, 3.0]])
        assert search(output_EN @ output_EN.T, 2, NO_GROUPS) == [0, 1]

    @pytest.mark.parametrize(("most", "unused"), [(6, "search"), (5, "exact")])
    def test_an_option_says_how_many_sets_are_tried(
        self, most: int, unused: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(naee, unused)
        output_EN = torch.tensor([[2.0, 0], [-2.0, 0], [0, 1.0], [0, 3.0]])
        stats = stats_with([1] * 4, overlap=output_EN @ output_EN.T)
        assert only_layer("naee", 0.5, stats, exact_up_to=most).drop == [0, 1]

    def test_leaving_out_what_it_drops_changes_the_output_least(
        self, model_of: Callable[[str], PreTrainedModel]
    ) -> None:
        model, ids_BS = model_of("qwen2_moe"), tiny.token_ids(8, 3)
        stats = calibrate(InMemoryPass(model), "model", ids_BS, statistics=["overlap"])
        error_of: dict[str, dict[tuple[int, ...], float]] = {}

        def watch(call: ExpertsCall) -> None:
            for some in combinations(range(tiny.EXPERTS), 2):
                gone_TK = torch.isin(call.index_TK, torch.tensor(some))
                lost = call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK.masked_fill(~gone_TK, 0))
                error_of.setdefault(call.layer, {})[some] = float(lost.double().square().sum())

        with torch.no_grad(), observe(model, watch):
            model.base_model(input_ids=ids_BS, use_cache=False)
        for name, layer in make_plan("naee", 0.25, stats).layers.items():
            assert tuple(layer.drop) == min(error_of[name], key=error_of[name].__getitem__)


class TestHcSmoe:
    # Three heaps of experts: 0 and 5 and 6, 1 and 4, and 2 and 3 and 7.
    points = torch.tensor([[0.0, 9], [9, 0], [-9, 0], [-9, 1], [9, 1], [1, 9], [0, 8], [-8, 0]])
    use = (30, 5, 0, 0, 15, 10, 60, 0)

    def layer(self, ratio: float, **options: object) -> LayerPlan:
        return only_layer("hc-smoe", ratio, tiny.make_stats([list(self.use)], self.points[None, None]), **options)

    def test_a_heap_becomes_its_mean_by_use_in_place_of_its_most_used(self) -> None:
        layer = self.layer(5 / 8)
        assert layer.keep == [2, 4, 6]
        assert layer.merged == {
            2: pytest.approx({2: 1 / 3, 3: 1 / 3, 7: 1 / 3}),  # nobody uses them
            4: pytest.approx({1: 0.25, 4: 0.75}),
            6: pytest.approx({0: 0.3, 5: 0.1, 6: 0.6}),
        }

    def test_what_stands_alone_is_not_merged(self) -> None:
        layer = self.layer(1 / 8)
        assert len(layer.keep) == 7
        assert len(layer.merged) == 1
        assert self.layer(0).merged == {}

    def test_the_router_s_rows_are_the_user_s_choice(self) -> None:
        assert not self.layer(5 / 8).merged_router
        assert self.layer(5 / 8, router="merged").merged_router

    def test_the_linkage_is_the_user_s_choice(self) -> None:
        line = torch.tensor([0.0, 1, 2.1, 3.3, 4.6, 6, 20, 21])[:, None] * torch.tensor([1.0, 0])
        stats = tiny.make_stats([list(range(8))], line[None, None])
        chain, compact = (only_layer("hc-smoe", 0.625, stats, linkage=how) for how in ("single", "complete"))
        assert chain.merged != compact.merged


class TestMone:
    def test_the_variance_is_that_of_the_outputs(self, model_of: Callable[[str], PreTrainedModel]) -> None:
        model, ids_BS = model_of("mixtral"), tiny.token_ids(9, 2)
        stats = calibrate(InMemoryPass(model), "model", ids_BS, statistics=["output", "output_square", "routed_tokens"])

        def watch(call: ExpertsCall) -> None:
            outputs = call.inside.output_NH.double().split(call.inside.counts_R)
            expected = torch.stack([one.var(0, correction=0).sum() if len(one) else torch.zeros(()) for one in outputs])
            assert torch.allclose(variance(stats.layers[call.layer]), expected, rtol=1e-4)

        with torch.no_grad(), observe(model, watch):
            model.base_model(input_ids=ids_BS, use_cache=False)

    def test_use_times_variance_decides_and_all_that_go_are_constants(self) -> None:
        # Means of squares less squares of means: 1, 4, 0 and 9; times the tokens: 100, 40, 0, 90.
        tokens_E = torch.tensor([100, 10, 50, 10])
        mean_EH = torch.tensor([[3.0, 0], [0, 1], [5, 5], [0, 0]])
        square_E = mean_EH.square().sum(1) + torch.tensor([1.0, 4, 0, 9])
        stats = stats_with(tokens_E.tolist(), output=mean_EH * tokens_E[:, None], output_square=square_E * tokens_E)
        layer = only_layer("mone", 0.5, stats)
        assert layer.keep == [0, 3]
        assert layer.constant == [1, 2]
        assert layer.scores == pytest.approx([100, 40, 0, 90])

    def test_who_was_never_chosen_goes_first(self) -> None:
        layer = LayerStats(
            2,
            1,
            counts={"routed_tokens": torch.tensor([0, 3])},
            sums={"output": ExactSum.zeros(2, 4), "output_square": ExactSum.zeros(2)},
        )
        assert variance(layer).tolist() == [0, 0]
