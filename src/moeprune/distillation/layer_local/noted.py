"""What a layer's block is given and puts out, for all sequences, however many at a time they pass it.

Axes: N sequences in all, S tokens of each, T tokens of some sequences, H hidden size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moeprune.atomic import refuse_without_room
from moeprune.errors import InputError


class Memory:
    """Tensors in memory as long as there is room, then in files, mapped, which are gone when nobody refers to them."""

    def __init__(self, limit: int, directory: Path) -> None:
        """Up to `limit` bytes in all are kept in memory."""
        self._left = limit
        self._directory = directory

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Raises InputError where the disk has no room."""
        size = torch.Size(shape).numel() * dtype.itemsize
        with torch.inference_mode(False):
            if size <= self._left:
                self._left -= size
                return torch.empty(shape, dtype=dtype)
            return self._mapped(size).view(dtype).view(shape)

    def _mapped(self, size: int) -> torch.Tensor:
        refuse_without_room(self._directory, size)
        file = self._directory / f"noted-{os.getpid()}"
        try:
            with file.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, size)  # a full disk is told here, and not by a signal later
            return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            raise InputError(
                f"{self._directory} has no room for the {size / 1e9:.1f} GB that a layer is given: {error.strerror}"
            ) from error
        finally:
            file.unlink(missing_ok=True)


@dataclass
class _Leaf:
    """A tensor of which there is a part for each sequence; `per_token` where its first axis counts their tokens."""

    values: torch.Tensor
    per_token: bool

    def put(self, rows: slice, value: torch.Tensor) -> None:
        part = self.values[rows]
        part.copy_(value.view(part.shape))

    def get(self, rows: torch.Tensor) -> torch.Tensor:
        value = self.values[rows]
        return value.flatten(0, 1) if self.per_token else value


class Noted:
    """A tree of tensors and other things, for all sequences. What has no part for each is the same for all."""

    def __init__(self, sequences: int, tokens: int, memory: Memory) -> None:
        self._sequences, self._tokens, self._memory = sequences, tokens, memory
        self._leaves: list[Any] = []
        self._spec: TreeSpec | None = None

    def put(self, rows: slice, tree: Any) -> None:
        """Note it for some sequences; the first time for as many as will ever come at once."""
        leaves, spec = tree_flatten(tree)
        if self._spec is None:
            self._spec = spec
            self._leaves = [self._kept(leaf, rows.stop - rows.start) for leaf in leaves]
        for kept, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(kept, _Leaf):
                kept.put(rows, leaf)

    def get(self, rows: torch.Tensor) -> Any:
        """For any sequences, by their numbers."""
        assert self._spec is not None
        return tree_unflatten(
            [leaf.get(rows) if isinstance(leaf, _Leaf) else leaf for leaf in self._leaves], self._spec
        )

    def _kept(self, leaf: Any, rows: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() and len(leaf) == rows:
            return _Leaf(self._memory.empty((self._sequences, *leaf.shape[1:]), leaf.dtype), per_token=False)
        if leaf.dim() and len(leaf) == rows * self._tokens:
            shape = (self._sequences, self._tokens, *leaf.shape[1:])
            return _Leaf(self._memory.empty(shape, leaf.dtype), per_token=True)
        with torch.inference_mode(False):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device).copy_(leaf)
