"""Every method: never more than the ratio says, never fewer than run for a token, and always the same."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.clustering import make_clusters
from moeprune.errors import InputError
from moeprune.methods import METHODS, frequency, make_plan
from moeprune.methods.base import Decision, Evidence, Method, Options, count_of
from moeprune.methods.voting import ascending, count_votes, fewest_votes_across_layers, representatives
from moeprune.plan import Plan
from moeprune.router_groups import RouterGroups
from moeprune.statistics import Stats

OF_EXPERTS = [name for name, method in METHODS.items() if method.removes == "experts" and not method.tries]
PER_LAYER = ["contribution", "frequency", "hc-smoe", "naee", "random", "reap"]
REPRESENTATIVES = ["most-used", "nearest"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Stats, Fraction]:
    """Random Stats and a ratio that leaves every layer enough experts."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(3, 20))
    top_k = draw(st.integers(1, max(1, experts // 3)))
    routed = draw(
        st.lists(st.lists(st.integers(0, 9), min_size=experts, max_size=experts), min_size=layers, max_size=layers)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    probes = torch.randn(layers, draw(st.integers(1, 3)), experts, 3, generator=generator)
    ratio = Fraction(draw(st.integers(0, 99)), 100)
    assume(experts - floor(ratio * experts) >= top_k)
    return tiny.make_stats(routed, probes, top_k=top_k), ratio


def removed(plan: Plan) -> int:
    return sum(len(layer.drop) for layer in plan.layers.values())


@pytest.mark.parametrize("method", OF_EXPERTS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_method_keeps_its_promises(method: str, case: tuple[Stats, Fraction]) -> None:
    stats, ratio = case
    plan = make_plan(method, float(ratio), stats)
    total = sum(layer.experts for layer in stats.layers.values())
    assert removed(plan) <= ratio * total
    assert list(plan.layers) == list(stats.layers)
    for name, layer in plan.layers.items():
        assert len(layer.keep) >= stats.layers[name].top_k
        assert layer.experts == stats.layers[name].experts
    assert (plan.method, plan.ratio, plan.model, plan.data) == (method, float(ratio), stats.model, stats.data)
    assert make_plan(method, float(ratio), stats) == plan
    if method in PER_LAYER:
        assert all(len(layer.drop) == floor(ratio * layer.experts) for layer in plan.layers.values())


@settings(max_examples=60, deadline=None)
@given(case=cases(), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), who=st.sampled_from(REPRESENTATIVES))
def test_c_prune_removes_exactly_what_it_should(case: tuple[Stats, Fraction], share: float, who: str) -> None:
    stats, ratio = case
    plan = make_plan("c-prune", float(ratio), stats, options={"layerwise_share": share, "representative": who})
    layers = list(stats.layers.values())
    experts = layers[0].experts
    layerwise = floor(ratio * Fraction(str(share)) * experts)
    # Most that the global stage leaves a layer to lose; more only where all must.
    room = min(max(int(0.9 * experts), floor(ratio * experts)), experts - layers[0].top_k)
    expected = min(floor(ratio * experts * len(layers)), len(layers) * room)
    if share == 1:  # uniform: no single layer gives one expert more
        expected = layerwise * len(layers)
    assert removed(plan) == (len(layers) * layerwise if share == 1 else expected)
    assert all(len(layer.drop) >= layerwise for layer in plan.layers.values())


@settings(max_examples=40, deadline=None)
@given(case=cases(), share=st.sampled_from([0.25, 0.5, 0.75]), who=st.sampled_from(REPRESENTATIVES))
def test_c_prune_s_second_stage_adds_to_its_first(case: tuple[Stats, Fraction], share: float, who: str) -> None:
    stats, ratio = case
    both = make_plan("c-prune", float(ratio), stats, options={"layerwise_share": share, "representative": who})
    first = make_plan("c-prune", float(ratio) * share, stats, options={"layerwise_share": 1, "representative": who})
    for name, layer in both.layers.items():
        assert set(first.layers[name].drop) - set(layer.drop) == set()


def test_c_prune_removes_what_was_asked_for_at_extreme_ratios() -> None:
    stats = tiny.make_stats([list(range(40))] * 2, top_k=1)
    plan = make_plan("c-prune", 0.975, stats)
    assert [len(layer.keep) for layer in plan.layers.values()] == [1, 1]


@settings(max_examples=40, deadline=None)
@given(case=cases(), allocation=st.sampled_from(["uniform", "global"]))
def test_c_prune_by_importance_removes_what_it_should(case: tuple[Stats, Fraction], allocation: str) -> None:
    stats, ratio = case
    options = {"selection": "importance", "allocation": allocation}
    plan = make_plan("c-prune", float(ratio), stats, options=options)
    layers = plan.layers.values()
    each = floor(ratio * next(iter(layers)).experts)
    if allocation == "uniform":
        assert [len(layer.drop) for layer in layers] == [each] * len(layers)
    else:
        room = next(iter(layers)).experts - next(iter(layers)).top_k
        assert len(layers) * each <= removed(plan) <= floor(ratio * sum(layer.experts for layer in layers))
        assert max(len(layer.drop) for layer in layers) <= room


class TestImportance:
    def test_a_cluster_keeps_one_and_it_has_the_use_of_all(self) -> None:
        # Experts 0 to 3 put out the same and are used most; 4 to 7 are each alone, in directions of their own.
        points = torch.zeros(8, 8)
        points[:4, 0] = 1
        points[torch.arange(4, 8), torch.arange(1, 5)] = 1
        stats = tiny.make_stats([[9, 8, 7, 6, 4, 3, 2, 1]], points[None, None])
        plan = make_plan("c-prune", 0.5, stats, make_clusters(stats, clusters_per_layer=5), {"selection": "importance"})
        (layer,) = plan.layers.values()
        assert len(set(layer.keep) & {0, 1, 2, 3}) == 1
        assert set(layer.keep) >= {4, 5}
        assert layer.scores is not None
        (kept,) = set(layer.keep) & {0, 1, 2, 3}
        variety = 1 - 12 / 56  # 12 of the 56 pairs have the cosine 1, the others 0
        assert layer.scores[kept] == pytest.approx(30 / 5 * variety)  # a multiple of an even share, 40 / 8
        assert layer.scores[7] == pytest.approx(1 / 5 * variety)

    def test_a_homogeneous_layer_loses_more(self) -> None:
        apart = torch.eye(8)
        alike = torch.eye(8) + 1.5  # all resemble each other, and each other cluster of one as well
        stats = tiny.make_stats([[1] * 8] * 2, torch.stack([apart, alike])[:, None])
        options = {"selection": "importance", "allocation": "global"}
        plan = make_plan("c-prune", 0.25, stats, make_clusters(stats, clusters_per_layer=8), options)
        assert [len(layer.drop) for layer in plan.layers.values()] == [0, 4]

    def test_how_much_a_layer_is_routed_to_does_not_matter(self) -> None:
        points = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(1)).expand(2, 1, 8, 4)
        stats = tiny.make_stats([[8, 7, 6, 5, 4, 3, 2, 1], [80, 70, 60, 50, 40, 30, 20, 10]], points)
        plan = make_plan("c-prune", 0.5, stats, options={"selection": "importance", "allocation": "global"})
        one, other = plan.layers.values()
        assert one.keep == other.keep


def test_a_method_that_removes_fewer_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def timid(evidence: Evidence, ratio: float, options: Options) -> Decision:
        return Decision(make_decision(evidence, ratio / 2).layers)

    def make_decision(evidence: Evidence, ratio: float) -> Decision:
        return frequency.decide(evidence, ratio, Options())

    monkeypatch.setattr("moeprune.methods.find", lambda name: Method("timid", "", timid))
    with pytest.raises(InputError, match=r"removes only 4 of the 16 .* 0\.5 of them, 8, .* reaches is 0\.25"):
        make_plan("timid", 0.5, tiny.make_stats([list(range(8))] * 2))


@pytest.mark.parametrize(("ratio", "each"), [(0.5, 4), (0.3, 2), (0.74, 5)])
def test_c_prune_s_first_stage_alone_is_uniform(ratio: float, each: int) -> None:
    stats = tiny.make_stats([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21]])
    plan = make_plan("c-prune", ratio, stats, options={"layerwise_share": 1})
    assert [len(layer.drop) for layer in plan.layers.values()] == [each] * 3


def test_c_prune_s_second_stage_looks_across_layers() -> None:
    # The experts of one layer are all alike; those of the other are far from each other and from everything.
    alike = torch.full((8, 8), 5.0) + torch.linspace(0, 0.1, 8)[:, None]
    apart = 100 * torch.eye(8)
    stats = tiny.make_stats([[1] * 8] * 2, torch.stack([alike, apart])[:, None])
    plan = make_plan("c-prune", 0.25, stats, options={"layerwise_share": 0, "global_clusters": 9})
    lost = {name: len(layer.drop) for name, layer in plan.layers.items()}
    assert lost == {"model.layers.0.mlp.experts": 4, "model.layers.1.mlp.experts": 0}


def test_c_prune_keeps_the_representatives_of_each_cluster() -> None:
    # Two clusters of four: experts 0 to 3 around one point and 4 to 7 around another, at known distances from it.
    offsets = torch.tensor([0.1, -0.3, 2.2, -2.0])[:, None] * torch.tensor([0.0, 1.0])
    points = torch.cat([offsets + torch.tensor([50.0, 0.0]), offsets[[2, 0, 3, 1]] - torch.tensor([50.0, 0.0])])
    stats = tiny.make_stats([list(range(8))], points[None, None])
    layer = "model.layers.0.mlp.experts"
    assert representatives(4, 0.5, 8) == 1
    nearest, used = (
        make_plan("c-prune", 0.5, stats, options={"layerwise_share": 1, "representative": who}).layers[layer].keep
        for who in ("nearest", "most-used")
    )
    # The nearest to each centre are voted for, 0 and 5; all others have no vote, and of these the least used go.
    assert nearest == [0, 5, 6, 7]
    # The most used of each cluster are 3 and 7.
    assert used == [3, 5, 6, 7]


@given(
    seed=st.integers(0, 2**32),
    ratio=st.floats(0, 0.5),
    share=st.floats(0, 1),
    shape=st.sampled_from([(2, 1), (4, 2), (2, 2)]),
)
@settings(max_examples=40)
def test_each_of_the_router_s_groups_loses_the_same(
    seed: int, ratio: float, share: float, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = torch.randint(0, 100, (3, 16), generator=generator).tolist()
    stats = tiny.make_stats(used, torch.randn(3, 2, 16, 4, generator=generator))
    groups = RouterGroups(*shape)
    for layer in stats.layers.values():
        layer.groups = groups
    for method, options in (("frequency", {}), ("random", {"seed": seed}), ("c-prune", {"layerwise_share": share})):
        plan = make_plan(method, ratio, stats, options=options)
        for layer_plan in plan.layers.values():
            assert len(set(groups.of_each(layer_plan.keep, 16))) == 1
        assert -1e-9 <= ratio - plan.removed < (groups.count / 16 if method != "c-prune" else 2 * groups.count / 16)


def test_groups_lose_their_own_least_used() -> None:
    stats = tiny.make_stats([[1, 2, 3, 4, 50, 60, 70, 80]])
    next(iter(stats.layers.values())).groups = RouterGroups(2, 1)
    assert make_plan("frequency", 0.5, stats).layers["model.layers.0.mlp.experts"].keep == [2, 3, 6, 7]
    with pytest.raises(InputError, match=r"taken from 1 of 2 equal groups.*largest ratio for this model is 0\.5"):
        make_plan("frequency", 0.75, stats)


def test_clusters_made_beforehand_give_the_same_plan() -> None:
    stats = tiny.make_stats([[3, 1, 4, 1, 5, 9, 2, 6]] * 3)
    assert make_plan("c-prune", 0.5, stats, make_clusters(stats)) == make_plan("c-prune", 0.5, stats)
    uneven = make_clusters(stats, clusters_per_layer=5)
    assert make_plan("c-prune", 0.5, stats, uneven).layers != make_plan("c-prune", 0.5, stats).layers


class TestFrequency:
    def test_the_least_used_go(self) -> None:
        stats = tiny.make_stats([[5, 0, 7, 2, 9, 1, 8, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
        plan = make_plan("frequency", 0.5, stats)
        assert [layer.keep for layer in plan.layers.values()] == [[0, 2, 4, 6], [4, 5, 6, 7]]

    def test_among_equals_the_first_go(self) -> None:
        plan = make_plan("frequency", 0.5, tiny.make_stats([[1] * 8, [0, 1, 0, 1, 0, 1, 1, 1]]))
        assert [layer.drop for layer in plan.layers.values()] == [[0, 1, 2, 3], [0, 1, 2, 4]]

    def test_another_domain_keeps_others(self) -> None:
        use = [90, 80, 70, 60, 1, 2, 3, 4]
        code, prose = (make_plan("frequency", 0.5, tiny.make_stats([use[::way]])) for way in (1, -1))
        assert [layer.keep for plan in (code, prose) for layer in plan.layers.values()] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class TestRandom:
    def test_seeds_draw_differently(self) -> None:
        stats = tiny.make_stats([[1] * 16] * 4)
        plans = [make_plan("random", 0.5, stats, options={"seed": seed}).keep for seed in range(5)]
        assert all(one != other for place, one in enumerate(plans) for other in plans[:place])

    def test_every_expert_can_go(self) -> None:
        stats = tiny.make_stats([[1] * 8])
        gone = {
            expert
            for seed in range(40)
            for layer in make_plan("random", 0.25, stats, options={"seed": seed}).layers.values()
            for expert in layer.drop
        }
        assert gone == set(range(8))

    def test_layers_draw_for_themselves(self) -> None:
        plan = make_plan("random", 0.5, tiny.make_stats([[1] * 16] * 4))
        assert len({tuple(keep) for keep in plan.keep.values()}) > 1

    def test_the_data_do_not_matter(self) -> None:
        one, other = (make_plan("random", 0.5, tiny.make_stats([use] * 3)) for use in ([1] * 8, list(range(8))))
        assert one.keep == other.keep


def test_a_ratio_is_a_whole_number_of_experts() -> None:
    # All of them: those that a rounding error makes one too few are rare.
    for percent in range(101):
        for experts in range(1, 513):
            assert count_of(percent / 100, experts) == percent * experts // 100


class TestRefusals:
    stats = tiny.make_stats([[1] * 8] * 2)

    def test_an_unknown_method(self) -> None:
        with pytest.raises(InputError, match=r"unknown method 'magic'; known: c-prune, .*random"):
            make_plan("magic", 0.5, self.stats)

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
    def test_a_ratio_outside_its_range(self, ratio: float) -> None:
        with pytest.raises(InputError, match="at least 0 and below 1, not"):
            make_plan("frequency", ratio, self.stats)

    @pytest.mark.parametrize("method", OF_EXPERTS)
    def test_a_ratio_that_leaves_fewer_than_run_for_a_token(self, method: str) -> None:
        with pytest.raises(InputError, match=r"leaves fewer than the 2 .*largest ratio for this model is 0\.75"):
            make_plan(method, 0.9, self.stats)
        assert {len(keep) for keep in make_plan(method, 0.75, self.stats).keep.values()} == {2}

    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.tries])
    def test_a_ratio_of_nothing_removes_nothing(self, method: str) -> None:
        assert removed(make_plan(method, 0, self.stats)) == 0

    @pytest.mark.parametrize("method", METHODS)
    def test_an_unknown_option(self, method: str) -> None:
        known = ", ".join(METHODS[method].options.model_fields) or "none"
        with pytest.raises(InputError, match=f"option colour of {method}: .*its options: {known}"):
            make_plan(method, 0.5, self.stats, options={"colour": "red"})

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("c-prune", {"layerwise_share": 1.5}),
            ("c-prune", {"global_clusters": 1}),
            ("c-prune", {"layerwise_share": "much"}),
            ("c-prune", {"representative": "loudest"}),
            ("random", {"seed": "a"}),
        ],
    )
    def test_a_value_that_an_option_cannot_take(self, method: str, options: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"option {next(iter(options))} of {method}"):
            make_plan(method, 0.5, self.stats, options=options)

    def test_options_come_as_text_too(self) -> None:
        plan = make_plan("c-prune", 0.5, self.stats, options={"layerwise_share": "0.25"})
        assert plan.options["layerwise_share"] == 0.25

    def test_clusters_of_other_stats(self) -> None:
        for other in ({"model": "a" * 64}, {"data": "2" * 32}):
            clusters = make_clusters(tiny.make_stats([[1] * 8] * 2, **other))  # type: ignore[arg-type]
            with pytest.raises(InputError, match="not made from these Stats"):
                make_plan("c-prune", 0.5, self.stats, clusters)


class TestVoting:
    """The published rule on cases small enough to follow by hand."""

    @pytest.mark.parametrize(
        ("members", "rate", "experts", "expected"),
        [
            (1, 0.9, 64, 1),
            (2, 0.9, 64, 2),
            (3, 0.0, 8, 2),  # p = 3/8: d = e^.125 - e^-.125 / (e^-.125 + e^.125) = 0.6955, c = 0.9173; 2.75
            (4, 0.5, 8, 1),  # p = 1/2: d = 1/2, c = 0.8; 1.6
            (8, 0.0, 8, 3),  # p = 1: d = e^-.5 - e^.5 / (e^.5 + e^-.5) = -0.1245, c = 0.4253; 3.4
            (32, 0.0, 8, -2),  # p = 4: d = -0.9689, c = -0.0813; -2.6: all but the last two are voted for
        ],
    )
    def test_how_many_of_a_cluster(self, members: int, rate: float, experts: int, expected: int) -> None:
        assert representatives(members, rate, experts) == expected

    def test_votes_add_up_over_groups(self) -> None:
        labels = np.array([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]])
        distances = np.array([[3.0, 1.0, 2.0, 9.0, 9.0, 9.0], [4.0, 3.0, 2.0, 1.0, 9.0, 9.0]])
        # First group: of the cluster of three the nearest (1), and all others. Second: of the four 3, and both others.
        assert [representatives(n, 0.25, 6) for n in (3, 4)] == [1, 1]
        assert count_votes(labels, distances, 0.25, 6).tolist() == [0, 1, 0, 2, 2, 2]

    def test_ties_between_distances_go_by_index(self) -> None:
        assert count_votes(np.zeros((1, 4), int), np.ones((1, 4)), 0.5, 8).tolist() == [1, 0, 0, 0]

    def test_fewest_votes(self) -> None:
        votes = np.array([2, 1, 2, 1, 0])
        assert ascending(votes)[:3] == [4, 1, 3]
        assert ascending(votes, np.array([0, 9, 0, 1, 5]))[:3] == [4, 3, 1]

    def test_a_layer_loses_no_more_than_it_has_room_for(self) -> None:
        votes = np.array([0, 0, 0, 1, 2, 3])
        layers = ["a", "a", "a", "b", "b", "b"]
        assert fewest_votes_across_layers(votes, layers, {"a": 2, "b": 9}, 3) == [0, 1, 3]
        assert fewest_votes_across_layers(votes, layers, {"a": 1, "b": 1}, 6) == [0, 3]
        assert fewest_votes_across_layers(votes, layers, {"a": 3, "b": 3}, 0) == []
