"""Shards are planned before they are written, hold what torch would have selected, and pass every dtype through."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moeprune.checkpoint import byte_sources, pieces, shards
from moeprune.checkpoint.byte_sources import LocalDirectory
from moeprune.checkpoint.files import SINGLE_NAME, CheckpointFiles, TensorEntry
from moeprune.checkpoint.pieces import PlannedTensor, Range, Values, selected, unchanged
from moeprune.checkpoint.shards import PlannedShard, index_of, is_written, plan_shards, write_shard
from moeprune.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


class FromSeveralThreads(LocalDirectory):
    """A directory that is read by several threads at once, as S3 is."""

    parallel_reads = 4


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


@st.composite
def stored_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any dtypes and shapes, as a checkpoint may hold them."""
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return {
        f"tensor.{number}": torch.randint(0, 2, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        for number, shape in enumerate(shapes)
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tensors=stored_tensors())
def test_selections_are_those_of_torch(
    data: st.DataObject, tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source_directory, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    names = list(tensors)
    half = data.draw(st.integers(0, len(names)))
    for number, part in enumerate([names[:half], names[half:]]):
        if part:
            save_file({name: tensors[name] for name in part}, source_directory / f"{number}.safetensors")
    files = CheckpointFiles(source_directory)
    planned, expected = [], {}
    for name, entry in files.entries.items():
        if len(entry.shape) > 0 and data.draw(st.booleans()):
            axis = data.draw(st.integers(0, len(entry.shape) - 1))
            keep = (
                data.draw(st.lists(st.sampled_from(range(entry.shape[axis])), max_size=5)) if entry.shape[axis] else []
            )
            planned.append(selected(name, entry, axis, keep))
            expected[name] = tensors[name].view(torch.uint8 if tensors[name].itemsize == 1 else tensors[name].dtype)
            chosen = expected[name].index_select(axis, torch.tensor(keep, dtype=torch.int64))
            expected[name] = chosen.view(tensors[name].dtype)
        else:
            planned.append(unchanged(f"new.{name}", entry))
            expected[f"new.{name}"] = tensors[name]
    found: dict[str, torch.Tensor] = {}
    source = data.draw(st.sampled_from([LocalDirectory, FromSeveralThreads]))(source_directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_SMALLEST_RANGE_BYTES", data.draw(st.sampled_from([1, 8, 1 << 20])))
        patch.setattr(pieces, "_BLOCK_BYTES", data.draw(st.sampled_from([1, 50, 1 << 20])))
        patch.setattr(shards, "_LONGEST_RANGE_BYTES", data.draw(st.sampled_from([3, 1 << 20])))
        planned_shards = plan_shards(planned, data.draw(st.integers(1, 2000)))
        for shard in planned_shards:
            write_shard(shard, source, out / shard.name)
            assert (out / shard.name).stat().st_size == shard.file_bytes
            found |= load_file(out / shard.name)
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    assert sum(shard.parameters for shard in planned_shards) == sum(tensor.numel() for tensor in expected.values())


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file of dtypes that no library here need know."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw for *_, raw in tensors.values()))


def test_dtypes_that_torch_does_not_know_pass_through(tmp_path: Path) -> None:
    scales, weights = bytes(range(12)), bytes(range(100, 124))
    write_raw(tmp_path / SINGLE_NAME, {"scales": ("F8_E8M0", [3, 4], scales), "weights": ("F4", [3, 16], weights)})
    files = CheckpointFiles(tmp_path)
    planned = [selected(name, files.entries[name], 0, [2, 0]) for name in ("scales", "weights")]
    (shard,) = plan_shards([*planned, selected("columns", files.entries["scales"], 1, [1])], 1000)
    write_shard(shard, files.source, tmp_path / "out.safetensors")
    (tmp_path / SINGLE_NAME).unlink()
    written = CheckpointFiles(tmp_path)
    assert {name: (entry.dtype, entry.shape) for name, entry in written.entries.items()} == {
        "scales": ("F8_E8M0", (2, 4)),
        "weights": ("F4", (2, 16)),
        "columns": ("F8_E8M0", (3, 1)),
    }
    raw = (tmp_path / "out.safetensors").read_bytes()
    values = {name: raw[entry.start : entry.stop] for name, entry in written.entries.items()}
    assert values == {
        "scales": scales[8:] + scales[:4],
        "weights": weights[16:] + weights[:8],
        "columns": scales[1::4],
    }


def test_an_axis_whose_items_share_bytes_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_NAME, {"weights": ("F4", [2, 3], b"abc")})
    with pytest.raises(InputError, match="weights is stored as F4"):
        selected("weights", CheckpointFiles(tmp_path).entries["weights"], 1, [0])


def tensor_of(size: int, name: str = "a") -> PlannedTensor:
    return PlannedTensor(name, "U8", (size,), (Range("file", 0, size),))


@given(sizes=st.lists(st.integers(0, 50), min_size=1), limit=st.integers(1, 100))
def test_no_shard_is_larger_than_was_said(sizes: list[int], limit: int) -> None:
    planned = [tensor_of(size, f"{number}") for number, size in enumerate(sizes)]
    made = plan_shards(planned, limit)
    assert [tensor for shard in made for tensor in shard.tensors] == planned
    assert all(shard.data_bytes <= limit or len(shard.tensors) == 1 for shard in made)
    for one, other in pairwise(made):
        assert one.data_bytes + other.tensors[0].nbytes > limit
    assert bool(index_of(made)) == (len(made) > 1)


def test_neighbours_in_the_source_are_one_range() -> None:
    tensors = [tensor_of(4, "a"), PlannedTensor("b", "U8", (4,), (Range("file", 4, 4),)), tensor_of(4, "c")]
    joined = [piece for _, piece in shards._placed(piece for tensor in tensors for piece in tensor.pieces)]
    assert joined == [Range("file", 0, 8), Range("file", 0, 4)]


def test_wide_values_lie_where_they_may(tmp_path: Path) -> None:
    (shard,) = plan_shards(
        [tensor_of(3), PlannedTensor("b", "F64", (1,), (Values(8, lambda: torch.zeros(1, dtype=torch.float64)),))], 100
    )
    (tmp_path / "file").write_bytes(b"abc")
    write_shard(shard, LocalDirectory(tmp_path), tmp_path / SINGLE_NAME)
    entry = CheckpointFiles(tmp_path).entries["b"]
    assert entry.start % 8 == 0


class TestCopying:
    CONTENT = os.urandom(3 << 20)

    def copy(self, directory: Path, start: int, count: int, offset: int) -> bytes:
        (directory / "source").write_bytes(self.CONTENT)
        with (directory / "target").open("w+b") as file:
            LocalDirectory(directory).copy_into("source", start, count, file.fileno(), offset)
            return file.read()

    @pytest.mark.parametrize("how", ["kernel", "no such call", "refused", "refused halfway", "says nothing"])
    def test_in_and_outside_of_the_kernel(self, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = os.copy_file_range, []

        def instead(*arguments: int) -> int:
            calls.append(arguments)
            if how == "refused" or (how == "refused halfway" and len(calls) > 1):
                raise OSError(errno.EXDEV, "across devices")
            if how == "says nothing":
                return 0
            return real(arguments[0], arguments[1], min(1000, arguments[2]), *arguments[3:])

        if how == "no such call":
            monkeypatch.delattr(os, "copy_file_range")
        else:
            monkeypatch.setattr(os, "copy_file_range", instead)
        assert self.copy(tmp_path, 5, 2 << 20, 7) == bytes(7) + self.CONTENT[5 : 5 + (2 << 20)]
        assert bool(calls) == (how != "no such call")

    def test_a_source_that_ends_too_early(self, tmp_path: Path) -> None:
        with pytest.raises(EOFError, match="source ends too early"):
            self.copy(tmp_path, 1, 3 << 20, 0)

    def test_a_full_disk_is_not_taken_for_a_file_system_without_the_call(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "copy_file_range", full)
        (tmp_path / "file").write_bytes(b"abcd")
        (shard,) = plan_shards([tensor_of(4)], 100)
        with pytest.raises(InputError, match="No space left on device"):
            write_shard(shard, LocalDirectory(tmp_path), tmp_path / "out")

    def test_a_source_that_shrank_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"abc")
        (shard,) = plan_shards([tensor_of(4)], 100)
        with pytest.raises(InputError, match=f"{tmp_path} changed while it was read: file ends too early"):
            write_shard(shard, LocalDirectory(tmp_path), tmp_path / "out")


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abcd")
    shard = PlannedShard("out", (tensor_of(4),))
    source, out = LocalDirectory(tmp_path), tmp_path / "out"
    assert not is_written(shard, out)
    write_shard(shard, source, out)
    assert is_written(shard, out)
    whole = out.read_bytes()
    for other in (whole[:-1], whole + b"x", whole[:12] + b"?" + whole[13:]):
        out.write_bytes(other)
        assert not is_written(shard, out)
    monkeypatch.setattr(byte_sources.LocalDirectory, "copy_into", lambda *_: (out.write_bytes(b""), None)[1])
    with pytest.raises(InputError, match="not what was written"):
        write_shard(shard, source, out)


def test_an_interruption_does_not_wait_for_all_ranges(tmp_path: Path) -> None:
    begun, gate = [], threading.Event()

    class Slow(FromSeveralThreads):
        def copy_into(self, name: str, start: int, count: int, target: int, offset: int) -> None:
            begun.append(start)
            if start:
                gate.wait(timeout=5)

    planned = [PlannedTensor(f"{n}", "U8", (4,), (Range("file", 8 * n, 4),)) for n in range(100)]
    (shard,) = plan_shards(planned, 1000)

    def interrupt(done: int) -> None:
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(shard, Slow(tmp_path), tmp_path / "out", interrupt)
    assert len(begun) < 20


@pytest.mark.parametrize("axis", [0, 1])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, axis: int) -> None:
    shape = (100, 300, 1000) if axis == 0 else (300_000, 100)
    size = 4 * math.prod(shape)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)  # of zeros, which take no room
    entry = TensorEntry("file", shape, "F32", 0, size)
    (shard,) = plan_shards([selected("a", entry, axis, range(0, 100, 2))], 1 << 40)
    tracemalloc.start()
    try:
        write_shard(shard, LocalDirectory(tmp_path), tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size == len(shard.header) + size // 2
    assert peak < (1 << 20 if axis == 0 else 60 << 20)
