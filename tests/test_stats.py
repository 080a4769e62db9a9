"""Stats add up: the same bytes however the data was shared out, and a sentence where they cannot be added."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moeprune.errors import InputError
from moeprune.statistics import Stats, merge
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass

BATCHES = 7
BATCH_BLOCKS = 3


def file_bytes(stats: Stats, directory: Path) -> bytes:
    path = directory / "stats.safetensors"
    stats.save(path)
    return path.read_bytes()


@pytest.fixture(name="ids_BS", scope="module")
def token_ids() -> torch.Tensor:
    return tiny.token_ids(11, blocks=BATCHES * BATCH_BLOCKS - 1)  # the last batch is a smaller one


@pytest.fixture(scope="module", params=["qwen2_moe", "deepseek_v2"])
def model(request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel, ids_BS: torch.Tensor) -> Stats:
    return calibrate(InMemoryPass(model), "model", ids_BS, groups=3, batch_blocks=BATCH_BLOCKS)


@pytest.fixture(scope="module")
def parts(model: PreTrainedModel, ids_BS: torch.Tensor) -> list[Stats]:
    """One Stats of each batch."""
    return [
        calibrate(
            InMemoryPass(model), "model", ids_BS, groups=3, batch_blocks=BATCH_BLOCKS, shard=shard, shards=BATCHES
        )
        for shard in range(BATCHES)
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, BATCHES])
def test_shards_merged_are_one_run_bit_for_bit(
    shards: int, model: PreTrainedModel, ids_BS: torch.Tensor, whole: Stats, tmp_path: Path
) -> None:
    of_shards = [
        calibrate(InMemoryPass(model), "model", ids_BS, groups=3, batch_blocks=BATCH_BLOCKS, shard=shard, shards=shards)
        for shard in range(shards)
    ]
    assert sum(stats.blocks for stats in of_shards) == len(ids_BS)
    assert file_bytes(merge(of_shards[::-1]), tmp_path) == file_bytes(whole, tmp_path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_merging_gives_the_same_bytes(
    data: st.DataObject, parts: list[Stats], whole: Stats, tmp_path_factory: pytest.TempPathFactory
) -> None:
    heap = list(parts)
    while len(heap) > 1:
        heap = data.draw(st.permutations(heap))
        count = data.draw(st.integers(2, len(heap)))
        heap = [merge(heap[:count]), *heap[count:]]
    directory = tmp_path_factory.mktemp("merging")
    assert file_bytes(heap[0], directory) == file_bytes(whole, directory)


def test_merging_leaves_its_parts_as_they_were(parts: list[Stats], tmp_path: Path) -> None:
    before = [file_bytes(part, tmp_path) for part in parts]
    merge(parts)
    merge(parts[:1]).layers.popitem()[1].sums["gate"].add_(torch.ones(tiny.EXPERTS))
    assert [file_bytes(part, tmp_path) for part in parts] == before


def test_two_data_sets_add_up(model: PreTrainedModel) -> None:
    one, other = (calibrate(InMemoryPass(model), "model", tiny.token_ids(seed, blocks=4)) for seed in (1, 2))
    both = merge([one, other])
    assert both.data not in (one.data, other.data)
    assert both.data == merge([other, one]).data
    for name, layer in both.layers.items():
        summed = one.layers[name].count("routed_tokens") + other.layers[name].count("routed_tokens")
        assert torch.equal(layer.count("routed_tokens"), summed)


def test_what_is_saved_is_what_is_loaded(whole: Stats, tmp_path: Path) -> None:
    written = file_bytes(whole, tmp_path)
    loaded = Stats.load(tmp_path / "stats.safetensors")
    assert file_bytes(loaded, tmp_path) == written
    assert list(loaded.layers) == list(whole.layers)
    assert (loaded.model, loaded.data, loaded.blocks_per_group) == (whole.model, whole.data, whole.blocks_per_group)
    for name, layer in loaded.layers.items():
        assert (layer.experts, layer.top_k) == (whole.layers[name].experts, whole.layers[name].top_k)
        assert torch.equal(layer.count("routed_tokens"), whole.layers[name].count("routed_tokens"))
        for key, total in whole.layers[name].sums.items():
            assert torch.equal(layer.sums[key].limbs, total.limbs)


def test_the_order_of_many_layers_survives_the_file(tmp_path: Path) -> None:
    stats = tiny.make_stats([[1, 2, 3, 4]] * 12)
    stats.save(tmp_path / "stats")
    assert list(Stats.load(tmp_path / "stats").layers) == [f"model.layers.{layer}.mlp.experts" for layer in range(12)]


def test_the_file_says_what_it_is(whole: Stats, tmp_path: Path) -> None:
    file_bytes(whole, tmp_path)
    with safe_open(tmp_path / "stats.safetensors", "pt") as file:
        header = json.loads(file.metadata()["moeprune_stats"])
    assert header["version"] == 2
    assert {key: header[key] for key in ("model", "data", "blocks")} == {
        "model": "model",
        "data": whole.data,
        "blocks": whole.blocks,
    }


def changed(stats: Stats, tmp_path: Path, **values: Any) -> Stats:
    file_bytes(stats, tmp_path)
    copy = Stats.load(tmp_path / "stats.safetensors")
    for name, value in values.items():
        setattr(copy, name, value)
    return copy


class TestWhatDoesNotAddUp:
    def test_nothing(self) -> None:
        with pytest.raises(InputError, match="no Stats"):
            merge([])

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model": "another"}, "differ in model"),
            ({"block_tokens": 12}, "differ in block_tokens"),
            ({"blocks_per_group": [1, 2]}, "groups"),
        ],
    )
    def test_another_model_length_or_grouping(
        self, change: dict[str, Any], said: str, parts: list[Stats], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=rf"Stats 3 .*{said}"):
            merge([*parts[:2], changed(parts[2], tmp_path, **change)])

    def test_other_groups_as_calibrated(self, model: PreTrainedModel) -> None:
        ids_BS = tiny.token_ids(1)
        with pytest.raises(InputError, match="groups"):
            merge([calibrate(InMemoryPass(model), "model", ids_BS, groups=groups) for groups in (2, 3)])

    def test_other_statistics(self, parts: list[Stats], tmp_path: Path) -> None:
        for drop in ("gate", "probe_output"):
            other = changed(parts[1], tmp_path)
            for layer in other.layers.values():
                del layer.sums[drop]
            for pair in ([parts[0], other], [other, parts[0]]):
                with pytest.raises(InputError, match="other statistics"):
                    merge(pair)

    def test_other_layers(self, parts: list[Stats], tmp_path: Path) -> None:
        other = changed(parts[1], tmp_path)
        other.layers.popitem()
        for pair in ([parts[0], other], [other, parts[0]]):
            with pytest.raises(InputError, match="other statistics"):
                merge(pair)


class TestWhatCannotBeLoaded:
    @pytest.fixture
    def path(self, whole: Stats, tmp_path: Path) -> Path:
        file_bytes(whole, tmp_path)
        return tmp_path / "stats.safetensors"

    def rewritten(self, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["moeprune_stats"])
        change(header)
        save_file(load_file(path), path, metadata={"moeprune_stats": json.dumps(header)})
        return path

    def refused(self, path: Path, said: str) -> None:
        with pytest.raises(InputError, match=said) as raised:
            Stats.load(path)
        assert str(path) in str(raised.value)

    def test_no_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nothing", "not a readable Stats file")

    def test_a_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "not a readable Stats file")

    @pytest.mark.parametrize("length", [0, 7, 100, -1])
    def test_part_of_a_file(self, path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])
        self.refused(path, "not a readable Stats file")

    def test_another_kind_of_file(self, path: Path, qwen: Path) -> None:
        self.refused(qwen / "model.safetensors", "not a readable Stats file")
        path.write_text('{"moeprune_plan": 1}')
        self.refused(path, "not a readable Stats file")

    def test_another_version(self, path: Path) -> None:
        self.refused(self.rewritten(path, lambda header: header.update(version=1)), "another version")

    @pytest.mark.parametrize("key", ["version", "model", "layers", "statistics", "blocks_per_group"])
    def test_an_incomplete_header(self, path: Path, key: str) -> None:
        self.refused(self.rewritten(path, lambda header: header.pop(key)), "not a readable Stats file")

    def test_a_statistic_of_another_type(self, path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors[next(name for name in tensors if name.endswith("/gate"))] = torch.zeros(2, tiny.EXPERTS)
        save_file(tensors, path, metadata=metadata)
        self.refused(path, "int64")


def test_a_statistic_that_was_not_collected(whole: Stats) -> None:
    layer = next(iter(whole.layers.values()))
    for ask in (layer.count, layer.sum):
        with pytest.raises(InputError, match=r"do not hold 'output_norm' \(they hold gate, .*calibrate again"):
            ask("output_norm")


def test_saving_is_all_or_nothing(whole: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.safetensors"
    path.write_text("what was there before")

    def interrupted(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]
    assert path.read_text() == "what was there before"
