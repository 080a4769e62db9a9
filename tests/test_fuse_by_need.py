"""More experts for the layers that matter more: what is measured, what is made of it, how the budget is shared out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import cases
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.methods import fuse_by_need, make_plan, sensitivity
from moeprune.methods.base import Trial
from moeprune.methods.fuse_by_need import need, share_out
from moeprune.methods.medoids import choose, lost_by_count
from moeprune.methods.sensitivity import moved_by
from moeprune.router_groups import RouterGroups
from moeprune.statistics import ExactSum, LayerStats, Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass

IDS_BS = tiny.token_ids(3, blocks=2)
ModelOf = Callable[[str], PreTrainedModel]
LOSSES = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
)


def layer_of(experts: int = 4, top_k: int = 1, groups: RouterGroups | None = None) -> LayerStats:
    (layer,) = tiny.make_stats([[1] * experts], top_k=top_k).layers.values()
    if groups:
        layer.groups = groups
    return layer


def exact(value: torch.Tensor) -> ExactSum:
    return ExactSum.zeros(*value.shape).add_(value)


class TestWhatIsMeasured:
    @pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
    def test_it_is_what_a_model_says_that_has_the_weights_of_those_that_answer(
        self, family: str, model_of: ModelOf
    ) -> None:
        model = model_of(family)
        for name in experts_modules(model):
            answers = [0, 0, *range(2, tiny.EXPERTS)]
            changed = copy.deepcopy(model)
            for parameter in changed.get_submodule(name).parameters():
                if parameter.shape[0] == tiny.EXPERTS:
                    parameter.data[1] = parameter.data[0]
            with torch.inference_mode():
                before, after = (m(input_ids=IDS_BS, use_cache=False).logits.log_softmax(-1) for m in (model, changed))
            expected = float((before.exp() * (before - after)).sum(-1).mean())
            moved = moved_by(Trial(model, IDS_BS), {name: answers})
            assert moved == {name: pytest.approx(expected, rel=1e-3, abs=1e-6)}
            assert expected > 0

    def test_nothing_moves_where_each_answers_for_itself(self, model_of: ModelOf) -> None:
        model = model_of("qwen2_moe")
        moved = moved_by(Trial(model, IDS_BS), {name: list(range(tiny.EXPERTS)) for name in experts_modules(model)})
        assert moved == dict.fromkeys(moved, 0.0)

    def test_what_is_no_number_is_refused(self, model_of: ModelOf) -> None:
        model = copy.deepcopy(model_of("qwen2_moe"))
        model.get_output_embeddings().weight.data[0] = float("nan")
        with pytest.raises(InputError, match="is no number"):
            moved_by(Trial(model, IDS_BS), {next(iter(experts_modules(model))): [1, 1, *range(2, tiny.EXPERTS)]})

    def test_what_is_past_the_experts_stays_as_it_is(self) -> None:
        """As some routers send tokens nowhere."""
        index_TK = torch.tensor([[0, 3], [4, 2]])
        assert sensitivity._answered(index_TK, [1, 1, 0, 3]).tolist() == [[1, 3], [4, 0]]


class TestLostByCount:
    @given(LOSSES)
    def test_it_falls_and_is_never_less_than_what_the_best_choice_loses(self, loss: list[list[float]]) -> None:
        loss_NN = np.array(loss)
        np.fill_diagonal(loss_NN, 0)
        lost = lost_by_count(loss_NN)
        assert lost[0] == np.inf
        assert lost[len(loss_NN)] == 0
        assert (np.diff(lost[1:]) <= 1e-9).all()
        for count in range(1, len(loss_NN) + 1):
            assert lost[count] >= loss_NN[:, choose(loss_NN, count)].min(1).sum() - 1e-9


class TestNeed:
    @pytest.fixture
    def layer(self) -> LayerStats:
        layer = layer_of()
        loss_EE = torch.tensor([[5.0, 1, 9, 9], [2, 5, 9, 9], [9, 9, 5, 3], [9, 9, 4, 5]], dtype=torch.float64)
        layer.sums["stand_in"] = exact(loss_EE)
        return layer

    def test_it_goes_with_the_square_of_what_is_lost(self, layer: LayerStats) -> None:
        # With three, the first is answered for by the second (1); with two, the third by the fourth, too (3).
        need_E = need(layer, 2, moved=0.5)
        assert need_E[2] == pytest.approx(0.5)
        assert need_E[3] == pytest.approx(0.5 / 16)
        assert need_E[4] == 0

    def test_fewer_than_run_for_a_token_are_no_choice(self, layer: LayerStats) -> None:
        layer.top_k = 2
        assert list(np.isfinite(need(layer, 3, moved=1))) == [False, False, True, True, True]

    def test_where_nothing_is_lost_none_is_needed(self, layer: LayerStats) -> None:
        layer.sums["stand_in"] = exact(torch.zeros(4, 4, dtype=torch.float64))
        assert list(need(layer, 2, moved=0.5)) == [np.inf, 0, 0, 0, 0]

    def test_where_the_model_does_not_move_no_more_go_than_of_an_even_share(self, layer: LayerStats) -> None:
        assert list(need(layer, 3, moved=0.0)) == [np.inf, np.inf, np.inf, 0, 0]

    def test_of_each_group_of_the_router_as_many_stay(self, layer: LayerStats) -> None:
        layer.groups = RouterGroups(count=2, chosen=1)
        need_E = need(layer, 2, moved=0.5)  # one of each group: what is lost is 1 and 3
        assert list(np.isfinite(need_E)) == [False, False, True, False, True]
        assert need_E[2] == pytest.approx(0.5)
        assert need_E[4] == 0


class TestSharingOut:
    @settings(max_examples=100)
    @given(st.data())
    def test_no_other_way_leaves_less_need_where_each_more_helps_less(self, data: st.DataObject) -> None:
        experts, layers = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
        needs = {}
        for number in range(layers):
            steps = sorted(data.draw(st.lists(st.floats(0, 9), min_size=experts - 1, max_size=experts - 1)))
            falling = np.cumsum([0.0, *steps])[::-1]  # convex
            needs[f"layer {number}"] = np.array([np.inf, *falling])
        whole = data.draw(st.integers(layers, layers * experts))
        counts = share_out(needs, dict.fromkeys(needs, layer_of(experts)), whole)
        assert sum(counts.values()) == whole

        def left(those: tuple[int, ...]) -> float:
            return float(sum(need_E[count] for need_E, count in zip(needs.values(), those, strict=True)))

        every = [those for those in product(range(1, experts + 1), repeat=layers) if sum(those) == whole]
        assert left(tuple(counts.values())) <= min(map(left, every)) + 1e-9

    def test_layers_alike_get_as_many(self) -> None:
        need_E = np.array([np.inf, 9, 4, 1, 0])
        needs = dict.fromkeys("abc", need_E)
        assert set(share_out(needs, dict.fromkeys(needs, layer_of()), 9).values()) == {3}

    def test_what_no_layer_needs_goes_to_those_that_have_fewest(self) -> None:
        needs = dict.fromkeys("abc", np.array([np.inf, 0, 0, 0, 0]))
        assert set(share_out(needs, dict.fromkeys(needs, layer_of()), 6).values()) == {2}

    def test_groups_of_the_router_stay_equal(self) -> None:
        groups = RouterGroups(count=2, chosen=1)
        need_E = np.array([np.inf, np.inf, 9, np.inf, 1])
        layers = dict.fromkeys("ab", layer_of(groups=groups))
        counts = share_out({"a": need_E, "b": need_E / 2}, layers, 7)
        assert counts == {"a": 4, "b": 2}


class TestPlans:
    @settings(max_examples=40)
    @given(case=cases(), data=st.data())
    def test_as_many_stay_as_with_fuse(self, case: tuple[Stats, float], data: st.DataObject) -> None:
        stats, ratio = case
        moved = {name: data.draw(st.floats(0, 9)) for name in stats.layers}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuse_by_need, "moved_by", lambda trial, answers: moved)
            plan, again = (
                make_plan("fuse-by-need", float(ratio), stats, trial=lambda: Trial(None, IDS_BS)) for _ in range(2)
            )
        assert plan == again
        even = make_plan("fuse", float(ratio), stats)
        assert sum(len(it.keep) for it in plan.layers.values()) == sum(len(it.keep) for it in even.layers.values())
        for name, planned in plan.layers.items():
            assert len(planned.keep) >= stats.layers[name].top_k
            stood_for = {gone for those in planned.stands_for.values() for gone in those}
            assert stood_for == set(planned.drop)

    def test_the_layer_that_matters_keeps_more_and_the_checkpoint_runs(self, qwen: Path, tmp_path: Path) -> None:
        source = Checkpoint(qwen)
        model = source.load()
        first = next(iter(experts_modules(model)))
        with torch.no_grad():  # what this layer puts out is all that counts
            for parameter in model.get_submodule(first).parameters():
                parameter *= 6
        stats = calibrate(InMemoryPass(model), source.fingerprint, tiny.token_ids(1, blocks=4), statistics=["stand_in"])
        plan = make_plan("fuse-by-need", 0.5, stats, trial=lambda: Trial(model, IDS_BS))
        counts = {name: len(layer.keep) for name, layer in plan.layers.items()}
        assert counts[first] > max(count for name, count in counts.items() if name != first)
        made = apply(source, plan, tmp_path / "cut").load()
        with torch.inference_mode():
            assert made(input_ids=IDS_BS).logits.isfinite().all()
