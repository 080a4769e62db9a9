"""Tensors of a checkpoint are read by name and by parts, and whatever is wrong with a shard is told by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeprune.checkpoint.byte_sources import LocalDirectory
from moeprune.checkpoint.files import INDEX_NAME, SINGLE_NAME, CheckpointFiles
from moeprune.errors import InputError


class NotingReads(LocalDirectory):
    """A directory that remembers how many bytes of values were asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.asked = 0

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.asked += len(buffer)
        super().read_into(name, start, buffer)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{str(dtype).removeprefix('torch.')}.{'x'.join(map(str, shape))}": torch.randint(
            0, 2 if dtype == torch.bool else 100, shape, generator=generator
        ).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
        for shape in ((), (0, 3), (5,), (4, 3), (1, 6, 2), (3, 4, 5))
    }
    save_file(tensors, directory / SINGLE_NAME)
    return directory, tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        (one.dtype, one.shape) == (other.dtype, other.shape)
        and one.flatten().view(torch.uint8).tolist() == other.flatten().view(torch.uint8).tolist()
    )  # fmt: skip


def test_tensors_are_what_was_stored(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = stored
    files = CheckpointFiles(directory)
    read = files.read(list(tensors))
    assert list(read) == list(tensors)
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    assert dict(files.tensors()).keys() == tensors.keys()
    assert files.bytes_on_disk == (directory / SINGLE_NAME).stat().st_size
    assert files.parameters == sum(tensor.numel() for tensor in tensors.values())


@given(data=st.data())
def test_a_part_is_what_torch_makes_of_the_whole(
    data: st.DataObject, stored: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = stored
    name = data.draw(st.sampled_from([name for name, tensor in tensors.items() if tensor.dim()]))
    tensor = tensors[name]
    axis = data.draw(st.integers(0, tensor.dim() - 1))
    start = data.draw(st.integers(0, tensor.shape[axis]))
    stop = data.draw(st.integers(start, tensor.shape[axis]))
    part = CheckpointFiles(directory).read_slice(name, axis, start, stop)
    assert same(part, tensor.narrow(axis, start, stop - start).contiguous())


@pytest.mark.parametrize(("name", "axis", "bytes_read"), [("float32.3x4x5", 0, 80), ("float32.1x6x2", 1, 8)])
def test_only_a_part_s_bytes_are_read(
    stored: tuple[Path, dict[str, torch.Tensor]], name: str, axis: int, bytes_read: int
) -> None:
    source = NotingReads(stored[0])
    files = CheckpointFiles(source)
    assert files.entries
    source.asked = 0
    files.read_slice(name, axis, 1, 2)
    assert source.asked == bytes_read


@pytest.mark.parametrize("part", [(2, 0, 1), (-1, 0, 1), (0, 2, 5), (0, 3, 2), (0, -1, 2)])
def test_a_part_that_is_not_there(stored: tuple[Path, dict[str, torch.Tensor]], part: tuple[int, int, int]) -> None:
    with pytest.raises(IndexError, match=r"float32\.4x3"):
        CheckpointFiles(stored[0]).read_slice("float32.4x3", *part)


def write(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(start: Any, stop: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


class TestDamage:
    @pytest.mark.parametrize(
        ("header", "data", "said"),
        [
            (b"{", 0, "header cannot be read"),
            (b"[]", 0, "header cannot be read"),
            (b"\xff\xfe", 0, "header cannot be read"),
            ({"a": {"dtype": "F32", "shape": [2]}}, 8, "header cannot be read"),
            ({"a": entry(0, "8")}, 8, "header cannot be read"),
            ({"a": entry(0, 8, shape=[2.0])}, 8, "header cannot be read"),
            ({"a": entry(0, 8, dtype=1)}, 8, "header cannot be read"),
            ({"a": entry(0, 8)}, 7, "tells of 8 bytes of tensors, but there are 7"),
            ({"a": entry(0, 8)}, 9, "tells of 8 bytes of tensors, but there are 9"),
            ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps what comes before it, at byte 4"),
            ({"a": entry(0, 8), "b": entry(9, 17)}, 17, "b leaves a hole before it, at byte 9"),
            ({"a": entry(0, 8, shape=[3])}, 8, "a has 8 bytes"),
        ],
    )
    def test_is_told_by_the_shard_s_name(self, tmp_path: Path, header: Any, data: int, said: str) -> None:
        write(tmp_path / "model-00001-of-00002.safetensors", {"fine": entry(0, 8)}, bytes(8))
        write(tmp_path / "model-00002-of-00002.safetensors", header, bytes(data))
        with pytest.raises(InputError, match=f"model-00002-of-00002.*missing or damaged.*{said}"):
            _ = CheckpointFiles(tmp_path).entries

    @pytest.mark.parametrize("content", [b"", b"\1\2", (1 << 40).to_bytes(8, "little") + b"{}"])
    def test_of_the_very_beginning(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / SINGLE_NAME).write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged"):
            _ = CheckpointFiles(tmp_path).entries

    def test_of_the_index(self, tmp_path: Path) -> None:
        write(tmp_path / "one.safetensors", {"a": entry(0, 8)}, bytes(8))
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
        with pytest.raises(InputError, match=r"one\.safetensors is missing or damaged.* holds b"):
            _ = CheckpointFiles(tmp_path).entries

    def test_that_comes_later(self, stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
        whole = (stored[0] / SINGLE_NAME).read_bytes()
        (tmp_path / SINGLE_NAME).write_bytes(whole)
        files = CheckpointFiles(tmp_path)
        last = list(files.entries)[-1]
        (tmp_path / SINGLE_NAME).write_bytes(whole[:-1])
        with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged"):
            files.read([last])


def test_dtypes_that_torch_has_not_are_known_by_name_only(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_NAME, {"a": entry(0, 3, dtype="F12")}, b"abc")
    files = CheckpointFiles(tmp_path)
    assert files.entries["a"].nbytes == 3
    with pytest.raises(InputError, match=r"a in .* is stored as F12"):
        files.read(["a"])


def test_where_the_index_says_that_a_tensor_is(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"{number}.safetensors", {"a": entry(0, 8), str(number): entry(8, 16)}, bytes([number]) * 16)
    names = {"a": "1.safetensors", "1": "1.safetensors", "2": "2.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    files = CheckpointFiles(tmp_path)
    assert {name: found.file for name, found in files.entries.items()} == names
