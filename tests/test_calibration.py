"""What goes into calibration may be padded, mixed, cut and interrupted; what comes out does not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from moeprune.errors import InputError
from moeprune.fitting import Fitting, is_out_of_memory
from moeprune.methods import METHODS, make_plan, statistics_for
from moeprune.methods.base import Trial
from moeprune.statistics import Stats, collectors
from moeprune.statistics.calibration import calibrate, make_batches
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import Batch, InMemoryPass

GROUPS = 3
LENGTHS = [24, 24, 17, 9, 9, 5, 1]


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral"])
def model(request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return model_of(request.param)


def sequences(lengths: Sequence[int], seed: int = 3) -> list[torch.Tensor]:
    return [tiny.token_ids(seed + place, 1, length)[0] for place, length in enumerate(lengths)]


def padded(rows: Sequence[torch.Tensor], width: int, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS = torch.full((len(rows), width), filler)
    mask_BS = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids_BS[place, : len(row)], mask_BS[place, : len(row)] = row, True
    return ids_BS, mask_BS


def stats_of(model: PreTrainedModel, rows: Sequence[torch.Tensor], batch_blocks: int = 3) -> Stats:
    return calibrate(InMemoryPass(model), "model", *padded(rows, 24), groups=GROUPS, batch_blocks=batch_blocks)


def assert_same(one: Stats, other: Stats) -> None:
    """Counts exactly, sums to rounding."""
    assert (one.data, one.tokens, one.blocks_per_group) == (other.data, other.tokens, other.blocks_per_group)
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        for key, total in layer.counts.items():
            assert torch.equal(total, other.layers[name].counts[key]), (name, key)
        for key in layer.sums:
            assert torch.allclose(layer.sum(key), other.layers[name].sum(key), rtol=1e-4, atol=1e-4), (name, key)


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel) -> list[Stats]:
    """The Stats of each sequence by itself, without any padding."""
    return [
        calibrate(InMemoryPass(model), "model", row[None], groups=GROUPS, batch_blocks=1) for row in sequences(LENGTHS)
    ]


def test_padding_counts_in_nothing(model: PreTrainedModel, alone: list[Stats]) -> None:
    together = stats_of(model, sequences(LENGTHS))
    assert together.tokens == sum(LENGTHS)
    assert together.blocks_per_group == [
        sum(counts) for counts in zip(*(s.blocks_per_group for s in alone), strict=True)
    ]
    for name, layer in together.layers.items():
        assert layer.count("routed_tokens").sum() == sum(LENGTHS) * tiny.TOP_K
        for key in ("gate", "probe_output"):
            expected = torch.stack([stats.layers[name].sum(key) for stats in alone]).sum(0)
            assert torch.allclose(layer.sum(key), expected, rtol=1e-4, atol=1e-4)
        expected = torch.stack([stats.layers[name].count("routed_tokens") for stats in alone]).sum(0)
        assert torch.equal(layer.count("routed_tokens"), expected)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    width=st.integers(24, 40),
    filler=st.integers(0, tiny.VOCABULARY - 1),
    data=st.data(),
)
def test_any_padding_and_any_order_give_the_same(
    lengths: list[int], width: int, filler: int, data: st.DataObject, model: PreTrainedModel
) -> None:
    rows = sequences(lengths)
    expected = stats_of(model, rows)
    given_BS = padded(data.draw(st.permutations(rows)), width, filler)
    batch_blocks = data.draw(st.integers(1, 6))
    found = calibrate(InMemoryPass(model), "model", *given_BS, groups=GROUPS, batch_blocks=batch_blocks)
    assert_same(found, expected)


def test_batches_waste_little_on_padding() -> None:
    batches = make_batches(*padded(sequences([3, 24, 4, 20]), 24), 2)
    assert [batch.ids_BS.shape for batch in batches] == [(2, 24), (2, 4)]
    assert sum(int(batch.mask_BS.sum()) for batch in batches) == 51


def test_a_choice_that_weighs_nothing_is_none(model: PreTrainedModel) -> None:
    calls: list[ExpertsCall] = []
    with observe(model, calls.append):
        model(input_ids=tiny.token_ids(1))
    weight_TK = calls[0].weight_TK.clone()
    weight_TK[::2, 0] = 0
    call = replace(calls[0], weight_TK=weight_TK)
    seen = collectors.Seen(call, torch.ones(2, 24, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1)
    counted = collectors.COLLECTORS["routed_tokens"].values(seen)
    assert counted.sum() == call.index_TK.numel() - 24
    assert torch.equal(counted, torch.bincount(call.index_TK[weight_TK != 0], minlength=tiny.EXPERTS))


class TestTheOrderOfCalls:
    """Whoever brings the layers in one at a time shows all batches to a layer, and perhaps its experts in parts."""

    class Recorded:
        def __init__(self, model: PreTrainedModel) -> None:
            self._inner = InMemoryPass(model)
            self.layers = self._inner.layers
            self.calls: list[tuple[int, slice, ExpertsCall]] = []

        def __call__(
            self, batches: Sequence[Batch], watch: Callable[..., None], on_progress: object, *, inside: bool = False
        ) -> None:
            self._inner(batches, lambda *call: self.calls.append(call), lambda *_: None)
            for number, rows, call in sorted(self.calls, key=lambda seen: (seen[2].layer, -seen[0]), reverse=True):
                watch(number, rows, call)

    def test_does_not_matter(self, model: PreTrainedModel, alone: list[Stats]) -> None:
        ids_BS, mask_BS = padded(sequences(LENGTHS), 24)
        usual = stats_of(model, sequences(LENGTHS))
        other = calibrate(self.Recorded(model), "model", ids_BS, mask_BS, groups=GROUPS, batch_blocks=3)
        assert_same(other, usual)
        for name, layer in usual.layers.items():
            for key, total in layer.sums.items():
                assert torch.equal(total.limbs, other.layers[name].sums[key].limbs)

    def test_a_layer_may_come_in_parts(self, model: PreTrainedModel) -> None:
        class InParts(TestTheOrderOfCalls.Recorded):
            def __call__(
                self, batches: Sequence[Batch], watch: Callable[..., None], on_progress: object, *, inside: bool = False
            ) -> None:
                def split(number: int, rows: slice, call: ExpertsCall) -> None:
                    for experts in (range(3), range(3, tiny.EXPERTS)):
                        # The layer's own module answers for the experts of the part alone.
                        def forward(module, x, index, weight, first=experts.start, call=call):  # type: ignore[no-untyped-def]
                            return call.forward(module, x, index + first, weight)

                        watch(number, rows, replace(call, experts=experts, forward=forward))

                self._inner(batches, split, lambda *_: None)

        ids_BS, mask_BS = padded(sequences(LENGTHS), 24)
        parts = calibrate(InParts(model), "model", ids_BS, mask_BS, groups=GROUPS, batch_blocks=3)
        assert_same(parts, stats_of(model, sequences(LENGTHS)))


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ..."
)


class TestOutOfMemory:
    @settings(max_examples=25, deadline=None)
    @given(
        most=st.integers(1, 6),
        place=st.integers(0, 40),
        error=st.sampled_from([CPU_ERROR, torch.OutOfMemoryError("CUDA out of memory")]),
        late=st.booleans(),
    )
    def test_the_stats_are_those_of_a_run_without_it(
        self, most: int, place: int, error: Exception, late: bool, model: PreTrainedModel
    ) -> None:
        """Memory runs out at some layer, whenever more rows than `most` come; before or after that is taken down."""
        rows = sequences(LENGTHS, seed=9)
        expected = stats_of(model, rows, batch_blocks=6)
        name = InMemoryPass(model).layers[place % len(InMemoryPass(model).layers)]
        module = model.get_submodule(name.rpartition(".")[0])

        def fail(_: torch.nn.Module, given_args: tuple[torch.Tensor, ...], *__: object) -> None:
            if given_args[0].shape[0] > most:
                raise error

        handle = module.register_forward_hook(fail) if late else module.register_forward_pre_hook(fail)
        try:
            assert_same(stats_of(model, rows, batch_blocks=6), expected)
        finally:
            handle.remove()

    def test_what_takes_it_down_may_run_out_too(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = sequences(LENGTHS)
        expected = stats_of(model, rows, batch_blocks=6)
        every_expert, calls = ExpertsCall.every_expert, count()

        def sometimes(call: ExpertsCall, x_NH: torch.Tensor) -> torch.Tensor:
            if next(calls) in {1, 2}:
                raise CPU_ERROR
            return every_expert(call, x_NH)

        monkeypatch.setattr(ExpertsCall, "every_expert", sometimes)
        assert_same(stats_of(model, rows, batch_blocks=6), expected)

    def test_it_is_said_once_per_halving_and_remembered(self, capsys: pytest.CaptureFixture[str]) -> None:
        fitting = Fitting("trying")
        tried: list[int] = []
        done: list[int] = []

        def work(rows: slice) -> None:
            tried.append(rows.stop - rows.start)
            if tried[-1] > 2:
                raise CPU_ERROR
            done.extend(range(rows.start, rows.stop))

        for _ in range(2):
            fitting.run(8, work)
        assert done == [*range(8), *range(8)]
        assert tried == [8, 4, *[2] * 8]
        assert capsys.readouterr().err.splitlines() == [
            "note: memory ran out while trying 8 sequences at once; going on with 4",
            "note: memory ran out while trying 4 sequences at once; going on with 2",
        ]

    def test_a_single_sequence_is_the_end(self, model: PreTrainedModel) -> None:
        def fail(*_: object) -> None:
            raise CPU_ERROR

        handle = model.register_forward_pre_hook(fail), model.base_model.register_forward_pre_hook(fail)
        try:
            with pytest.raises(InputError, match="memory ran out while calibrating on a single sequence"):
                stats_of(model, sequences(LENGTHS))
        finally:
            for each in handle:
                each.remove()

    def test_other_errors_are_left_alone(self) -> None:
        def work(rows: slice) -> None:
            raise RuntimeError("shapes do not match")

        with pytest.raises(RuntimeError, match="shapes"):
            Fitting("trying").run(4, work)
        assert not is_out_of_memory(RuntimeError("shapes"))


class TestStatisticsOnRequest:
    def test_only_what_is_asked_for_is_collected(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ExpertsCall, "every_expert", lambda *_: pytest.fail("nobody asked for the probes"))
        run = partial(calibrate, InMemoryPass(model), "model", tiny.token_ids(1))
        stats = run(statistics=statistics_for(["frequency"]))
        for layer in stats.layers.values():
            assert (layer.counts.keys(), layer.sums.keys()) == ({"routed_tokens"}, set())
        assert make_plan("frequency", 0.5, stats)
        with pytest.raises(InputError, match=r"do not hold gate, probe_output, which c-prune needs; .* --for c-prune"):
            make_plan("c-prune", 0.5, stats)
        assert all(not layer.counts for layer in run(statistics=statistics_for(["random"])).layers.values())

    @pytest.mark.parametrize("method", METHODS)
    def test_a_method_decides_on_what_it_asks_for(self, method: str, model: PreTrainedModel) -> None:
        stats = calibrate(
            InMemoryPass(model), "model", tiny.token_ids(1, blocks=8), statistics=statistics_for([method])
        )
        plan = make_plan(method, 0.5, stats, trial=lambda: Trial(model, tiny.token_ids(1)))
        assert plan.removed > 0 or plan.sparsity

    def test_methods_name_what_is_there(self) -> None:
        assert set(statistics_for(METHODS)) <= collectors.COLLECTORS.keys()
        with pytest.raises(
            InputError, match=r"unknown statistics: magic; known: gate, .*, probe_output, routed_tokens"
        ):
            collectors.find(["magic", "gate"])
