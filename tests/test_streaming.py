"""Models brought into memory part by part: the same Stats as with all of it in memory, and what makes that work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import test_quantised
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.services.addresses import BUCKET
from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import ForwardPass, InMemoryPass
from moeprune.streaming import holding, room, streamed
from moeprune.streaming.holding import Held, Noting
from moeprune.streaming.lanes import Lane, stop_at
from moeprune.streaming.paging import PagedModel
from moeprune.streaming.room import Room, memory_in_use, parse_bytes, share_out
from moeprune.streaming.streamed import StreamedPass

# Families whose layers hand on more than hidden states; that all families can be streamed is shown in test_families.
UNUSUAL = ["deepseek_v4", "gemma4_text", "jamba"]
CRAMPED = Room(experts=0, activations=0)  # a few experts at a time, and nothing that is stopped stays in memory
LIMIT = 100 << 30


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a limit, whatever it is, leave next to no room, and everything count as large."""
    monkeypatch.setattr(streamed, "share_out", lambda *args, **kwargs: CRAMPED)
    monkeypatch.setattr(holding, "_WORTH_BYTES", 1)


def stats_of(run: ForwardPass, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> Stats:
    return calibrate(run, "model", ids_BS, mask_BS, groups=2, batch_blocks=2)


def assert_equal_to_rounding(one: Stats, other: Stats) -> None:
    assert (list(one.layers), one.tokens, one.data) == (list(other.layers), other.tokens, other.data)
    for name, layer in one.layers.items():
        same = other.layers[name]
        assert (layer.experts, layer.top_k, layer.counts.keys(), layer.sums.keys()) == (
            same.experts,
            same.top_k,
            same.counts.keys(),
            same.sums.keys(),
        )
        for key in layer.counts:
            assert torch.equal(layer.count(key), same.count(key)), (name, key)
        for key in layer.sums:
            torch.testing.assert_close(layer.sum(key), same.sum(key), rtol=1e-4, atol=1e-5)


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS = tiny.token_ids(5, blocks=5)
    length_B = torch.tensor([24, 7, 15, 24, 2])
    mask_BS = torch.arange(24) < length_B[:, None]
    return ids_BS.where(mask_BS, 0), mask_BS


@pytest.mark.usefixtures("cramped")
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *UNUSUAL])
def test_streamed_stats_are_those_of_a_model_in_memory(
    family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if family in tiny.FAMILIES:
        checkpoint = Checkpoint(checkpoint_of(family))
    else:
        checkpoint = Checkpoint(tiny.write(tmp_path, families.tiny_config(family)))
    ids_BS, mask_BS = ragged()
    in_memory = stats_of(InMemoryPass(checkpoint.load()), ids_BS, mask_BS)
    assert_equal_to_rounding(stats_of(StreamedPass(checkpoint), ids_BS, mask_BS), in_memory)
    assert_equal_to_rounding(stats_of(StreamedPass(checkpoint, memory_limit=LIMIT), ids_BS, mask_BS), in_memory)


@pytest.mark.usefixtures("cramped")
@pytest.mark.parametrize("form", test_quantised.FORMS)
def test_quantised_weights_are_undone_as_they_are_brought_in(form: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(test_quantised.write(tmp_path / "model", *test_quantised.FORMS[form]))
    ids_BS, mask_BS = ragged()
    in_memory = stats_of(InMemoryPass(checkpoint.load(torch.float32)), ids_BS, mask_BS)
    assert_equal_to_rounding(stats_of(StreamedPass(checkpoint, memory_limit=LIMIT), ids_BS, mask_BS), in_memory)


def test_bfloat16_is_streamed_as_bfloat16(qwen: Path) -> None:
    checkpoint = Checkpoint(qwen)
    ids_BS = tiny.token_ids(6)
    in_memory = stats_of(InMemoryPass(checkpoint.load(torch.bfloat16)), ids_BS)
    streamed_stats = stats_of(StreamedPass(checkpoint, dtype=torch.bfloat16), ids_BS)
    assert_equal_to_rounding(streamed_stats, in_memory)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(stats_of(StreamedPass(checkpoint), ids_BS), in_memory)


def test_never_more_than_one_layer_is_in_memory(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = StreamedPass(Checkpoint(qwen))
    paged = run._paged
    largest = max(paged.bytes_of(part) for part in paged.parts)
    largest += max(paged.bytes_per_expert(layer) * paged.experts_of(layer) for layer in paged.layers)
    whole = sum(tensor.nbytes for tensor in paged.model.parameters())
    seen = []

    def measure(*_: object) -> None:
        seen.append(sum(tensor.nbytes for tensor in paged.model.parameters() if not tensor.is_meta))

    stats_of(_Watched(run, measure), tiny.token_ids(7))
    assert 0 < max(seen) <= largest < whole / 2
    assert all(parameter.is_meta for parameter in paged.model.parameters())


class _Watched:
    """A pass that says when a call is shown."""

    def __init__(self, run: StreamedPass, on_call: Callable[..., None]) -> None:
        self.layers = run.layers
        self._run, self._on_call = run, on_call

    def __call__(self, batches, watch, on_progress, *, inside=False) -> None:  # type: ignore[no-untyped-def]
        def both(*shown: object) -> None:
            self._on_call(*shown)
            watch(*shown)

        self._run(batches, both, on_progress, inside=inside)


@pytest.mark.usefixtures("cramped")
def test_an_error_on_the_way_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    run = StreamedPass(Checkpoint(qwen), memory_limit=LIMIT, scratch=tmp_path)
    calls = []

    def fail_late(*_: object) -> None:
        calls.append(list(tmp_path.rglob("*")))
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stats_of(_Watched(run, fail_late), tiny.token_ids(8, blocks=6))
    assert any(path.stat().st_size for path in calls[-2] if path.exists()) or len(calls[-2]) > 1
    assert list(tmp_path.iterdir()) == []
    assert all(parameter.is_meta for parameter in run._paged.model.parameters())


def test_progress_ends_at_the_end(qwen: Path) -> None:
    said: list[tuple[int, int]] = []
    run = StreamedPass(Checkpoint(qwen))
    calibrate(run, "model", tiny.token_ids(9, blocks=4), batch_blocks=2, on_progress=lambda *step: said.append(step))
    assert said == sorted(said)
    assert said[-1] == (2 * len(run.layers),) * 2


def test_a_limit_that_cannot_be_kept_says_what_would_do(qwen: Path) -> None:
    with pytest.raises(InputError, match=r"too small.*at least"):
        stats_of(StreamedPass(Checkpoint(qwen), memory_limit=1 << 20), tiny.token_ids(10))


def test_parts_that_use_each_other_s_weights_are_refused(qwen: Path) -> None:
    run = StreamedPass(Checkpoint(qwen))
    first, second = run._paged.model.model.layers[:2]
    forward = second.forward

    def with_the_first_s_norm(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return forward(hidden_states * first.input_layernorm.weight, *args, **kwargs)

    second.forward = with_the_first_s_norm
    with pytest.raises(InputError, match="use weights of each other"):
        stats_of(run, tiny.token_ids(13))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("you tried: can't allocate memory")])
def test_memory_that_runs_out_is_a_sentence(qwen: Path, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    with pytest.raises(InputError, match=r"memory ran out.*--batch-blocks"):
        stats_of(_Watched(StreamedPass(Checkpoint(qwen)), fail), tiny.token_ids(14))


def test_a_missing_tensor_is_named(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(qwen)
    del checkpoint.files.entries["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        stats_of(StreamedPass(checkpoint), tiny.token_ids(11))


def test_experts_of_a_range_are_those_of_the_layer(qwen: Path) -> None:
    checkpoint = Checkpoint(qwen)
    paged = PagedModel(checkpoint, torch.float32, torch.device("cpu"))
    model = checkpoint.load()
    for layer in paged.layers:
        whole = model.get_submodule(layer).state_dict()
        for which in (range(8), range(2, 5), range(5, 8)):
            with paged.experts(layer, which) as module:
                assert module.num_experts == len(which)
                for name, tensor in module.state_dict().items():
                    assert torch.equal(tensor, whole[name][which.start : which.stop])
            assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_sums_in_files_are_the_same_sums(qwen: Path, tmp_path: Path) -> None:
    run, ids_BS = StreamedPass(Checkpoint(qwen)), tiny.token_ids(12, blocks=4)
    (tmp_path / "sums").mkdir()
    in_files = calibrate(run, "model", ids_BS, groups=2, batch_blocks=2, sums_in=tmp_path / "sums")
    in_files.save(tmp_path / "files")
    stats_of(run, ids_BS).save(tmp_path / "memory")
    assert (tmp_path / "files").read_bytes() == (tmp_path / "memory").read_bytes()
    sums = sum(layer.sums[name].limbs.nbytes for layer in in_files.layers.values() for name in layer.sums)
    assert sum(file.stat().st_size for file in (tmp_path / "sums").iterdir()) == sums


def test_a_model_on_s3_is_calibrated_there(
    qwen: Path, corpus: Path, client: Any, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    address = f"s3://{BUCKET}/streamed/model"
    for file in qwen.iterdir():
        client.upload_file(str(file), BUCKET, f"streamed/model/{file.name}")
    same = ("--data", corpus, "--block-tokens", 24, "--max-blocks", 8)
    here, there = tmp_path / "here", tmp_path / "there"
    assert run_cli("calibrate", "--model", qwen, *same, "--out", here)[0] == 0
    assert run_cli("calibrate", "--model", address, *same, "--out", there, "--memory-limit", "20GiB")[0] == 0
    assert_equal_to_rounding(Stats.load(there), Stats.load(here))


def test_the_command_says_what_is_no_size(qwen: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = run_cli(
        "calibrate", "--model", qwen, "--data", "builtin://code", "--out", "x", "--memory-limit", "much"
    )
    assert code == 1
    assert "'much' is not a size" in said


class TestLanes:
    def test_they_take_turns(self) -> None:
        heard: list[object] = []

        def run(name: str) -> None:
            heard.append((name, stop_at("first")))
            heard.append((name, stop_at("second")))

        lanes: list[Lane[str]] = [Lane(lambda name=name: run(name)) for name in "ab"]  # type: ignore[misc]
        for lane in lanes:
            lane.go_on()
        assert [lane.door for lane in lanes] == ["first", "first"]
        lanes[1].go_on(1)
        lanes[0].go_on(2)
        assert [lane.door for lane in lanes] == ["second", "second"]
        assert heard == [("b", 1), ("a", 2)]
        lanes[0].go_on(3)
        assert lanes[0].door is None
        assert heard[-1] == ("a", 3)

    def test_an_error_comes_out_where_it_was_let_go_on(self) -> None:
        def run() -> None:
            stop_at("door")
            raise ValueError("inside")

        lane: Lane[str] = Lane(run)
        lane.go_on()
        with pytest.raises(ValueError, match="inside"):
            lane.go_on()

    def test_ended_early_it_cleans_up(self) -> None:
        cleaned = []

        def run() -> None:
            try:
                stop_at("door")
            finally:
                cleaned.append(True)

        lane: Lane[str] = Lane(run)
        lane.go_on()
        lane.end()
        lane.end()
        assert cleaned == [True]
        assert lane.door is None

    def test_nobody_stops_outside(self) -> None:
        with pytest.raises(RuntimeError, match="lane"):
            stop_at("door")


class TestHolding:
    @given(st.lists(st.sampled_from(["new", "view", "drop", "spill", "restore", "change"]), max_size=30))
    def test_whatever_is_held_comes_back(self, tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
        file = tmp_path_factory.mktemp("held") / "file"
        held, noting, ours, theirs = Held(file), Noting(), [], []
        away = False
        for number, step in enumerate(steps):
            if step == "spill":
                held.spill()
                away = True
                assert held.bytes_in_memory == 0
                continue
            held.restore()
            away = False
            with noting, noting.on_behalf_of(held):
                if step == "new":
                    ours.append(torch.full((300, 100), float(number)))
                    theirs.append([float(number)] * 30_000)
                elif step == "view" and ours:
                    ours.append(ours[-1][:])
                    theirs.append(theirs[-1])
                elif step == "change" and ours:
                    ours[-1].add_(1)
                    theirs[-1][:] = [value + 1 for value in theirs[-1]]
                elif step == "drop" and ours:
                    ours.pop(0)
                    theirs.pop(0)
        if away:
            held.restore()
        assert [tensor.flatten().tolist() for tensor in ours] == theirs
        assert held.bytes_in_memory == sum(
            size for size in {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in ours}.values()
        )
        held.forget()
        assert not file.exists()

    def test_a_view_of_a_weight_is_not_the_passes(self, tmp_path: Path) -> None:
        weight, held, noting = torch.ones(300, 300), Held(tmp_path / "file"), Noting()
        with noting, noting.on_behalf_of(held):
            kept = weight.t()
        held.spill()
        assert kept.sum() == weight.numel()

    def test_memory_is_really_given_back(self, tmp_path: Path) -> None:
        room.return_freed_memory()
        before, held, noting = memory_in_use(), Held(tmp_path / "file"), Noting()
        with noting, noting.on_behalf_of(held):
            kept = torch.ones(16 << 20)
        with_it = memory_in_use()
        held.spill()
        assert with_it - before > 60 << 20
        assert memory_in_use() - before < 8 << 20
        held.restore()
        assert kept.sum() == 16 << 20


class TestRoom:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("2GiB", 2 << 30),
            ("1.5G", 3 << 29),
            ("900MB", 900_000_000),
            ("0.3kB", 300),
            (" 512 k ", 512 << 10),
            ("4096", 4096),
        ],
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "two", "1GG", "1e9"])
    def test_what_is_no_size(self, text: str) -> None:
        with pytest.raises(InputError, match="is not a size"):
            parse_bytes(text)

    @given(
        limit=st.integers(1 << 20, 1 << 40),
        part=st.integers(0, 1 << 36),
        fewest=st.integers(1, 1 << 34),
        times=st.integers(1, 200),
        one_pass=st.integers(0, 1 << 34),
    )
    def test_what_is_shared_out_is_there(self, limit: int, part: int, fewest: int, times: int, one_pass: int) -> None:
        wanted = {"largest_part": part, "fewest_experts": fewest, "all_experts": fewest * times, "one_pass": one_pass}
        try:
            shared = share_out(limit, **wanted)
        except InputError:
            needed = 2 * part + 2 * fewest + one_pass + memory_in_use()
            assert needed + (96 << 20) > limit - (64 << 20)  # it was too small indeed; memory in use may change
            return
        assert fewest <= shared.experts <= fewest * times
        assert shared.activations >= 0
        assert 2 * part + 2 * shared.experts + shared.activations + one_pass <= limit
