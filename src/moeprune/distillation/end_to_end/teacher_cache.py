"""The teacher's most probable next tokens on disk, so that it need not be in memory while the student learns.

They lie in files of some rows each, written beside and put in place whole: what is there is not computed again, and
several processes can write at the same time. They are read by the row, mapped into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeprune.atomic import refuse_without_room, write_beside
from moeprune.distillation.end_to_end.teacher import Top

ROWS_PER_FILE = 16
_BYTES_PER_TOKEN_AND_K = 4 + 2


class TeacherCache:
    """Of some text: row by row, the teacher's most probable tokens (int32) and their shares' logarithms (float16).

    Args:
        directory: of this teacher, text and objective alone.
        rows: of the text.
    """

    def __init__(self, directory: Path, rows: int) -> None:
        self._directory, self._rows = directory, rows

    @property
    def missing(self) -> list[range]:
        """Rows that are not there yet, file by file."""
        starts = range(0, self._rows, ROWS_PER_FILE)
        return [
            range(start, min(start + ROWS_PER_FILE, self._rows)) for start in starts if not self._path(start).is_file()
        ]

    def refuse_without_room(self, tokens_per_row: int, top: int) -> None:
        """Raise InputError where the disk has no room for what is missing."""
        self._directory.mkdir(parents=True, exist_ok=True)
        rows = sum(map(len, self.missing))
        refuse_without_room(self._directory, rows * tokens_per_row * top * _BYTES_PER_TOKEN_AND_K)

    def write(self, rows: range, tops: Sequence[Top]) -> None:
        """Write one file.

        Args:
            rows: one of `missing`.
            tops: what the teacher said of them, batch by batch, and maybe of others after.
        """
        with write_beside(self._path(rows.start)) as beside:
            save_file(
                {
                    "index": torch.cat([top.index_BSK.cpu() for top in tops])[: len(rows)].contiguous(),
                    "log_share": torch.cat([top.log_share_BSK.to("cpu", torch.float16) for top in tops])[
                        : len(rows)
                    ].contiguous(),
                },
                beside,
            )

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, K]` int32 and float16."""
        start = row // ROWS_PER_FILE * ROWS_PER_FILE
        opened = _open(self._path(start))
        return opened.get_slice("index")[row - start], opened.get_slice("log_share")[row - start]

    def _path(self, start: int) -> Path:
        return self._directory / f"rows-{start:08d}.safetensors"


@lru_cache(maxsize=64)
def _open(path: Path) -> safe_open:
    return safe_open(path, framework="pt")
