"""Batches that turn out too large for the memory there is are run in halves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeprune.errors import InputError
from moeprune.progress import note


class Fitting:
    """Runs rows together, as many as fit; what did not fit once is not tried again with later batches."""

    def __init__(self, doing: str) -> None:
        """`doing` is what the rows are run for, as it reads in a sentence: `calibrating`."""
        self._doing = doing
        self._largest: int | None = None

    def run(self, rows: int, work: Callable[[slice], object]) -> None:
        """Do the work on all of so many rows, in order.

        Where it runs out of memory, its slice is cut into halves, so that each slice that is tried lies within one
        that failed, or starts afresh.

        Raises:
            InputError: memory does not suffice for a single row.
        """
        pending = [slice(0, rows)]
        while pending:
            part = pending.pop()
            size = part.stop - part.start
            if self._largest is None or size <= self._largest:
                if self._fits(work, part):
                    continue
                if size == 1:
                    raise InputError(
                        f"memory ran out while {self._doing} a single sequence; use shorter blocks, a smaller dtype or "
                        "a machine with more memory"
                    )
                self._largest = (size + 1) // 2
                note(f"memory ran out while {self._doing} {size} sequences at once; going on with {self._largest}")
            middle = part.start + (size + 1) // 2
            pending += [slice(middle, part.stop), slice(part.start, middle)]

    def _fits(self, work: Callable[[slice], object], part: slice) -> bool:
        try:
            work(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        # Only here, where the error and with it the frames that hold the tensors are gone, is there something to free.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; on a CPU, PyTorch has no class for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
