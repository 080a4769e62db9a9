"""What a stopped pass holds: its large tensors, put on disk and taken back.

A tensor's values lie in a storage that may be emptied and filled again while everything that refers to it stays as it
is. So the pass need not know: it is stopped when its storages are empty, and they are full again before it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WORTH_BYTES = 1 << 16  # smaller ones stay


@dataclass
class Held:
    """The large storages that one pass has made and still refers to.

    Attributes:
        file: where they go.
    """

    file: Path
    _storages: dict[int, StorageWeakRef] = field(default_factory=dict)
    _on_disk: list[tuple[StorageWeakRef, int]] = field(default_factory=list)

    def note(self, tensor: torch.Tensor) -> None:
        """An operation of the pass has made this tensor."""
        storage = tensor.untyped_storage()
        if storage.nbytes() >= _WORTH_BYTES:
            reference = StorageWeakRef(storage)
            self._storages[reference.cdata] = reference

    @property
    def bytes_in_memory(self) -> int:
        return sum(storage.nbytes() for _, storage in self._alive())

    def spill(self) -> None:
        """Put the values on disk."""
        alive = [(reference, storage) for reference, storage in self._alive() if storage.nbytes()]
        if self._on_disk or not alive:
            return
        on_disk = self._mapped(sum(storage.nbytes() for _, storage in alive))
        for (reference, storage), place in zip(alive, on_disk.split([s.nbytes() for _, s in alive]), strict=True):
            place.copy_(_as_bytes(storage))
            self._on_disk.append((reference, storage.nbytes()))
            storage.resize_(0)

    def restore(self) -> None:
        """Take them back."""
        if not self._on_disk:
            return
        sizes = [size for _, size in self._on_disk]
        for (reference, size), place in zip(self._on_disk, self._mapped(sum(sizes)).split(sizes), strict=True):
            if (storage := _referred(reference)) is not None:
                storage.resize_(size)
                _as_bytes(storage).copy_(place)
        self._on_disk.clear()

    def forget(self) -> None:
        """The pass has ended."""
        self._storages.clear()
        self._on_disk.clear()
        self.file.unlink(missing_ok=True)

    def _mapped(self, size: int) -> torch.Tensor:
        """The file as a tensor: what is written to it is the system's to keep in memory or not."""
        return torch.from_file(str(self.file), shared=True, size=size, dtype=torch.uint8)

    def _alive(self) -> Iterator[tuple[StorageWeakRef, torch.UntypedStorage]]:
        for key, reference in list(self._storages.items()):
            storage = _referred(reference)
            if storage is None:
                del self._storages[key]
            else:
                yield reference, storage


class NotInMemoryError(Exception):
    """A pass computes with weights that are not in memory."""


class Noting(TorchDispatchMode):
    """What the operations of a pass make is noted by whoever holds for that pass, inside `on_behalf_of`.

    Raises:
        NotInMemoryError: an operation of the pass is given a tensor on the meta device.
    """

    _held: Held

    @contextmanager
    def on_behalf_of(self, held: Held) -> Iterator[None]:
        self._held = held
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors((args, kwargs)))
        if any(tensor.is_meta for tensor in given):  # on the meta device operations run, and give nothing
            raise NotInMemoryError(f"{func} is given weights of a part that the pass has not entered")
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in known:  # a view of a weight is the weight's
                self._held.note(tensor)
        return out


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _referred(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    return None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
