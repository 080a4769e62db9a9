"""A checkpoint's tensors as they lie in its safetensors files, read one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeprune.errors import InputError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is, and what it is, without its values."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: BF16, F32, ...


class CheckpointFiles:
    """The tensors of a checkpoint directory, by name. Only headers are read until a tensor is asked for.

    Raises:
        InputError: the directory holds no safetensors, a shard that its index names is missing, or one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        found: dict[str, TensorEntry] = {}
        for shard in self._shards():
            try:
                with safe_open(self.directory / shard, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                        view = file.get_slice(name)
                        found[name] = TensorEntry(shard, tuple(view.get_shape()), view.get_dtype())
            except (OSError, SafetensorError) as error:
                raise InputError(f"the shard {self.directory / shard} is missing or damaged ({error})") from error
        return found

    def _shards(self) -> list[str]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{index} is damaged: it does not say which shard holds what ({error})") from error
        if (self.directory / SINGLE_NAME).is_file():  # others beside it are not this model's, or hold it once more
            return [SINGLE_NAME]
        shards = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not shards:
            raise InputError(f"{self.directory} holds no safetensors files; moeprune reads no other format of weights")
        return shards

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, file after file, holding one at a time."""
        for shard in self._shards():
            with safe_open(self.directory / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read a few tensors by name."""
        with ExitStack() as stack:
            shards = {self.entries[name].file for name in names}
            files = {shard: stack.enter_context(safe_open(self.directory / shard, "pt")) for shard in shards}
            return {name: files[self.entries[name].file].get_tensor(name) for name in names}

    @property
    def bytes_on_disk(self) -> int:
        return sum((self.directory / shard).stat().st_size for shard in self._shards())

    @property
    def parameters(self) -> int:
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors into a directory as they come: one safetensors file, or shards with their index.

    Memory holds one shard; a tensor larger than `shard_bytes` gets a shard of its own.
    """
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    if len(shards) == 1:
        (out / "shard-0").rename(out / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number}").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_other_files(source: Path, target: Path) -> None:
    """Carry over what lies beside the weights: config, tokenizer, chat template, generation config, licence.

    Not the model card, which tells of the source only, nor the same weights in other formats.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in {INDEX_NAME, "README.md"}:
            shutil.copy(path, target / path.name)
