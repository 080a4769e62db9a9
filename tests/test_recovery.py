"""What stays is fitted in closed form: each piece by what it is defined as, and the whole by what a model then says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.methods import make_plan
from moeprune.methods.medoids import choose as choose_medoids
from moeprune.methods.medoids import nearest
from moeprune.plan import Plan, Recovery, Sparsity
from moeprune.recovery import projections, recover_checkpoint, routers, say
from moeprune.recovery.fusing import fuse
from moeprune.recovery.neurons import Neurons, activations, choose, matched_mean, read, write
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.inside import hidden_of, output_of
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import InMemoryPass

FAMILIES = [*tiny.FAMILIES]


def first_experts(model: PreTrainedModel) -> torch.nn.Module:
    return next(iter(experts_modules(model).values()))


def output(module: torch.nn.Module, neurons: Neurons, x_TH: torch.Tensor) -> torch.Tensor:
    out_TH = activations(module, neurons, x_TH) @ neurons.down_IH
    return out_TH if neurons.down_bias_H is None else out_TH + neurons.down_bias_H


def shuffled(neurons: Neurons, seed: int) -> Neurons:
    return neurons.of(torch.randperm(len(neurons.down_IH), generator=torch.Generator().manual_seed(seed)))


class TestNeurons:
    @pytest.fixture(params=FAMILIES)
    def module(self, request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel]) -> torch.nn.Module:
        return first_experts(model_of(request.param))

    def test_they_compute_what_the_expert_does(self, module: torch.nn.Module) -> None:
        x_TH = torch.randn(5, tiny.HIDDEN)
        with torch.no_grad():
            for expert in (0, tiny.EXPERTS - 1):
                hidden_TI = hidden_of(module, expert, x_TH)
                torch.testing.assert_close(activations(module, read(module, expert), x_TH), hidden_TI)
                expected = output_of(module, expert, hidden_TI)
                torch.testing.assert_close(output(module, read(module, expert), x_TH), expected)

    def test_their_order_is_nothing_to_an_expert(self, module: torch.nn.Module) -> None:
        x_TH, neurons = torch.randn(5, tiny.HIDDEN), read(module, 1)
        torch.testing.assert_close(output(module, shuffled(neurons, 0), x_TH), output(module, neurons, x_TH))

    def test_an_expert_is_written_as_it_is_read(self, module: torch.nn.Module) -> None:
        before = {name: value.clone() for name, value in module.named_parameters()}
        neurons, replaced = read(module, 2), read(module, 3)
        write(module, 3, neurons)
        for one, other in zip(vars(read(module, 3)).values(), vars(neurons).values(), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        write(module, 3, replaced)
        for name, value in module.named_parameters():
            assert torch.equal(value, before[name]), "only that expert was written"


class TestChoosing:
    @given(st.integers(1, 12), st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None)
    def test_of_independent_neurons_those_that_matter_most_stay(self, keep: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        energy_n = torch.rand(12, generator=rng) + 0.1
        weight_nH = torch.randn(12, 3, generator=rng)
        chosen = choose(torch.diag(energy_n), energy_n[:, None] * weight_nH, keep)
        worth_n = energy_n * weight_nH.square().sum(1)
        assert sorted(chosen.tolist()) == sorted(worth_n.argsort(descending=True)[:keep].tolist())

    def test_what_others_can_make_up_for_goes_first(self) -> None:
        neuron_Tn = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
        doubled = torch.cat([neuron_Tn, neuron_Tn[:, :3]], dim=1)  # three of them twice, and worth most
        target_TH = neuron_Tn @ torch.diag(torch.tensor([9.0, 8.0, 7.0, 1.0, 1.0, 1.0]))
        moment = doubled.T @ doubled + 1e-2 * torch.eye(9)
        chosen = set(choose(moment, doubled.T @ target_TH, 6).tolist())
        assert {3, 4, 5} <= chosen
        assert all(len(chosen & {one, one + 6}) == 1 for one in range(3))

    def test_the_mean_of_one_expert_in_several_orders_is_that_expert(
        self, model_of: Callable[[str], PreTrainedModel]
    ) -> None:
        module = first_experts(model_of("qwen2_moe"))
        neurons, x_TH = read(module, 0), torch.randn(7, tiny.HIDDEN)
        mean = matched_mean([neurons, shuffled(neurons, 1), shuffled(neurons, 2)], [0.5, 0.2, 0.3])
        torch.testing.assert_close(output(module, mean, x_TH), output(module, neurons, x_TH))


class TestMedoids:
    @given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.data())
    @settings(max_examples=60, deadline=None)
    def test_no_exchange_of_one_is_better(self, points: int, seed: int, data: st.DataObject) -> None:
        loss_NN = np.random.default_rng(seed).random((points, points))
        np.fill_diagonal(loss_NN, 0)
        stay = choose_medoids(loss_NN, data.draw(st.integers(1, points - 1)))
        total = loss_NN[:, stay].min(1).sum()
        for gone in stay:
            for come in set(range(points)) - set(stay):
                assert loss_NN[:, [*(set(stay) - {gone}), come]].min(1).sum() >= total - 1e-9
        assert loss_NN[range(points), nearest(loss_NN, stay)].sum() == pytest.approx(total)
        assert nearest(loss_NN, stay)[stay].tolist() == stay


class TestRouters:
    @pytest.mark.parametrize("bias", [False, True])
    def test_one_that_stands_for_itself_keeps_its_row(self, bias: bool) -> None:
        rng = torch.Generator().manual_seed(3)
        x_TH, row_EH = torch.randn(200, 6, generator=rng), torch.randn(4, 6, generator=rng)
        watched = routers.Watched([x_TH], [x_TH @ row_EH.T])
        rows_KH, biases_K = routers.change(watched, [torch.ones(200, dtype=torch.bool)], [[0], [2, 1], [3]], bias=bias)
        assert not rows_KH[[0, 2]].any()
        assert rows_KH[1].any()
        assert (biases_K is not None) == bias
        if biases_K is not None:
            assert not biases_K[[0, 2]].any()

    def test_copies_gain_nothing_from_being_two(self) -> None:
        """Else every expert that stands for two would be chosen before all others."""
        rng = torch.Generator().manual_seed(4)
        x_TH, row_EH = torch.randn(300, 6, generator=rng), torch.randn(2, 6, generator=rng)
        logits_TE = x_TH @ row_EH[[0, 0, 1]].T
        everything = [torch.ones(300, dtype=torch.bool)]
        rows_KH, biases_K = routers.change(routers.Watched([x_TH], [logits_TE]), everything, [[0, 1], [2]], bias=True)
        assert biases_K is not None
        torch.testing.assert_close(rows_KH, torch.zeros_like(rows_KH))
        torch.testing.assert_close(biases_K, torch.zeros_like(biases_K))

    def test_one_that_stands_for_two_is_chosen_for_both(self) -> None:
        """Of two tasks, each with an expert of its own, and a third that all the rest go to."""
        rng = torch.Generator().manual_seed(5)
        task_T = torch.randint(3, (300,), generator=rng)
        x_TH = torch.nn.functional.one_hot(task_T, 3).float() + 0.1 * torch.randn(300, 3, generator=rng)
        logits_TE = 2 * x_TH
        everything = [torch.ones(300, dtype=torch.bool)]
        rows_KH, _ = routers.change(routers.Watched([x_TH], [logits_TE]), everything, [[0, 1], [2]], bias=False)
        chosen_T = (logits_TE[:, [0, 2]] + x_TH @ rows_KH.T).argmax(1)
        assert torch.equal(chosen_T, (task_T == 2).long())
        assert not torch.equal(logits_TE[:, [0, 2]].argmax(1), chosen_T)

    def test_padding_has_no_say(self) -> None:
        x_TH, row_EH = torch.randn(50, 4), torch.randn(3, 4)
        garbage = routers.Watched([torch.cat([x_TH, x_TH + 9])], [torch.cat([x_TH @ row_EH.T, torch.randn(50, 3)])])
        counts = [torch.arange(100) < 50]
        clean = routers.change(routers.Watched([x_TH], [x_TH @ row_EH.T]), [counts[0][:50]], [[0, 2], [1]], bias=False)
        torch.testing.assert_close(routers.change(garbage, counts, [[0, 2], [1]], bias=False)[0], clean[0])


def calls_of(model: PreTrainedModel, ids_BS: torch.Tensor) -> list[ExpertsCall]:
    """Of the first layer, one for each sequence."""
    seen: list[ExpertsCall] = []
    with torch.no_grad(), observe(model, seen.append):
        for ids_S in ids_BS:
            model.base_model(input_ids=ids_S[None], use_cache=False)
    return [call for call in seen if call.layer == seen[0].layer]


class TestLayers:
    everything = (torch.ones(tiny.BLOCK_TOKENS),) * 6
    unseen = tuple(torch.full((tiny.BLOCK_TOKENS,), place % 3 == 2) for place in range(6))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_copies_of_an_expert_become_that_expert(
        self, family: str, tmp_path: Path, checkpoint_of: Callable[[str], Path]
    ) -> None:
        model = Checkpoint(checkpoint_of(family)).load()
        module = first_experts(model)
        for copy in (3, 5):
            write(module, copy, shuffled(read(module, 1), copy))
        calls = calls_of(model, tiny.token_ids(2, 6))
        with torch.no_grad():
            made = fuse(calls, self.everything, self.unseen, [1, 3, 5])
            assert made is not None
            x_TH = calls[0].x_TH
            expected = output(module, read(module, 1), x_TH)
            torch.testing.assert_close(output(module, made, x_TH), expected, rtol=1e-2, atol=1e-3)

    def test_what_is_made_of_different_experts_is_better_than_one_of_them(
        self, model_of: Callable[[str], PreTrainedModel]
    ) -> None:
        calls = calls_of(model_of("mixtral"), tiny.token_ids(2, 60))
        module, members = calls[0].module, [1, 3]
        everything, unseen = self.everything * 10, self.unseen * 10
        with torch.no_grad():
            made = fuse(calls, everything, unseen, members)
            assert made is not None

            def missed(by: Neurons) -> float:
                """On the tokens held out, of what both experts put out together."""
                total = 0.0
                for call, held_T in zip(calls, unseen, strict=True):
                    gate_TM = torch.stack(
                        [((call.index_TK == member) * call.weight_TK).sum(1) for member in members], dim=1
                    )
                    outputs = [output(module, read(module, member), call.x_TH) for member in members]
                    wanted_TH = sum(gate_TM[:, place, None] * out_TH for place, out_TH in enumerate(outputs))
                    given_TH = gate_TM.sum(1, keepdim=True) * output(module, by, call.x_TH)
                    total += float((wanted_TH - given_TH)[held_T].square().sum())
                return total

            assert missed(made) < 0.9 * min(missed(read(module, member)) for member in members)

    def test_experts_that_no_token_chose_make_none(self, model_of: Callable[[str], PreTrainedModel]) -> None:
        calls = calls_of(model_of("mixtral"), tiny.token_ids(2, 6))
        chosen_by_none = [replace(call, index_TK=torch.zeros_like(call.index_TK)) for call in calls]
        assert fuse(chosen_by_none, self.everything, self.unseen, [4, 5]) is None

    def test_projections_that_were_moved_come_back(self, checkpoint_of: Callable[[str], Path]) -> None:
        model = Checkpoint(checkpoint_of("mixtral")).load()
        calls = calls_of(model, tiny.token_ids(2, 60))
        with torch.no_grad():
            wanted = [call.run() for call in calls]
            first_experts(model).get_parameter("down_proj").mul_(0.5)
        moved = [replace(call) for call in calls]
        before, after = projections.fit(moved, wanted, self.everything * 10, self.unseen * 10)
        assert before == pytest.approx(0.25, rel=1e-3)
        assert after < before / 10

    def test_tokens_without_a_say_are_as_if_they_were_not_there(self, checkpoint_of: Callable[[str], Path]) -> None:
        fitted = []
        for present in (60, 30):
            model = Checkpoint(checkpoint_of("mixtral")).load()
            calls = calls_of(model, tiny.token_ids(2, 60))
            with torch.no_grad():
                wanted = [call.run() for call in calls]
                first_experts(model).get_parameter("down_proj").mul_(0.5)
            roots = [torch.full_like(self.everything[0], float(place < 30)) for place in range(present)]
            moved = [replace(call) for call in calls[:present]]
            projections.fit(moved, wanted[:present], roots, (self.unseen * 10)[:present])
            fitted.append(first_experts(model).get_parameter("down_proj").detach())
        torch.testing.assert_close(fitted[0], fitted[1])

    def test_what_only_padding_says_changes_nothing(self, checkpoint_of: Callable[[str], Path]) -> None:
        model = Checkpoint(checkpoint_of("mixtral")).load()
        calls = calls_of(model, tiny.token_ids(2, 6))
        module = first_experts(model)
        weights = module.get_parameter("down_proj").clone()
        with torch.no_grad():
            wanted = [call.run() + 1 for call in calls]
        none = [torch.zeros_like(counts_T) for counts_T in self.everything]
        projections.fit([replace(call) for call in calls], wanted, none, self.unseen)
        assert torch.equal(module.get_parameter("down_proj"), weights)


def test_a_few_huge_outputs_are_heard_half_way_between_squares_and_shares() -> None:
    out_TH = torch.randn(100, 8, generator=torch.Generator().manual_seed(5))
    out_TH[3] *= 100
    counts_T = torch.arange(100) < 90
    (root_T,) = say.roots([out_TH], [counts_T])
    heard_T = (out_TH * root_T[:, None]).square().sum(1)
    usual = out_TH[:90].square().sum(1).median()
    in_squares = float(out_TH[3].square().sum())
    assert heard_T[3] == pytest.approx((in_squares * float(usual)) ** 0.5, rel=1e-4)
    assert (root_T[90:] == 0).all()
    quieter = counts_T & (out_TH.square().sum(1) < usual)
    assert (root_T[quieter] == 1).all()


class Case:
    """A tiny model in which each expert has one that is nearly like it, pruned by `fuse`, before and after recovery."""

    def __init__(self, family: str, source: Path, folder: Path, ratio: float = 0.5) -> None:
        self.checkpoint = Checkpoint(self.with_pairs(source, folder / "pairs"))
        self.original = self.checkpoint.load()
        self.ids_BS = tiny.token_ids(11, 64)
        self.plan = self.plan_for(ratio)
        self.cut = apply(self.checkpoint, self.plan, folder / "cut")
        self.folder = folder

    @staticmethod
    def with_pairs(source: Path, out: Path) -> Path:
        model = Checkpoint(source).load()
        for module in experts_modules(model).values():
            for expert in range(tiny.EXPERTS // 2):
                alike = shuffled(read(module, expert), expert)
                noise_IH = 0.05 * torch.randn(alike.down_IH.shape, generator=torch.Generator().manual_seed(expert))
                write(module, expert + tiny.EXPERTS // 2, replace(alike, down_IH=alike.down_IH + noise_IH))
        model.save_pretrained(out)
        return out

    def plan_for(self, ratio: float, method: str = "fuse") -> Plan:
        stats = calibrate(
            InMemoryPass(self.original),
            self.checkpoint.fingerprint,
            self.ids_BS,
            statistics=["stand_in", "routed_tokens"],
            router_groups=self.checkpoint.layout.groups,
        )
        return make_plan(method, ratio, stats)

    def recover(self, out: str = "recovered", plan: Plan | None = None, ids_BS: torch.Tensor | None = None) -> Path:
        text_BS = self.ids_BS if ids_BS is None else ids_BS
        recover_checkpoint(
            self.checkpoint, self.original, self.cut, plan or self.plan, text_BS, None, self.folder / out
        )
        return self.folder / out

    def divergence(self, directory: Path) -> float:
        """Of what a pruned model predicts for text that nothing was fitted to from what the original does, in nats."""
        ids_BS = tiny.token_ids(99, 12)
        with torch.no_grad():
            mine, true = (
                model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)
                for model in (Checkpoint(directory).load(), self.original)
            )
        return float((true.exp() * (true - mine)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recovered_model_is_nearer_to_the_original(
    family: str, tmp_path: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    case = Case(family, checkpoint_of(family), tmp_path)
    assert any(layer.stands_for for layer in case.plan.layers.values())
    recovered = case.recover()
    assert case.divergence(recovered) < 0.9 * case.divergence(case.cut.directory)
    assert Checkpoint(recovered).experts_per_layer == case.plan.experts_per_layer


class TestRefusals:
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Case:
        return Case("mixtral", checkpoint_of("mixtral"), tmp_path_factory.mktemp("refused"))

    def test_a_plan_without_recovery(self, case: Case) -> None:
        with pytest.raises(InputError, match="asks for no recovery"):
            case.recover(plan=case.plan.model_copy(update={"recovery": None}))

    def test_a_plan_that_makes_zeros(self, case: Case) -> None:
        zeros = Sparsity(pattern="2:4", score="magnitude")
        with pytest.raises(InputError, match="makes weights zero"):
            case.recover(plan=case.plan.model_copy(update={"sparsity": zeros}))

    def test_too_little_text(self, case: Case) -> None:
        with pytest.raises(InputError, match="too few sequences"):
            case.recover(ids_BS=case.ids_BS[:1])

    def test_nothing_is_left_behind(self, case: Case) -> None:
        assert not (case.folder / "recovered").exists()


def test_a_plan_by_another_method_can_be_recovered(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    case = Case("olmoe", checkpoint_of("olmoe"), tmp_path)
    plan = case.plan_for(0.5, "frequency").model_copy(update={"recovery": Recovery(router=False)})
    case.cut = apply(case.checkpoint, plan, tmp_path / "by frequency")
    recovered = case.recover(plan=plan)
    assert case.divergence(recovered) < case.divergence(case.cut.directory)
    one, other = case.cut.load(), Checkpoint(recovered).load()
    changed = {
        name
        for (name, before), after in zip(one.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert changed
    assert all(name.endswith("down_proj") for name in changed), "the router and everything else are as they were"
