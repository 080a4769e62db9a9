"""Cells: one method's result at one amount, on one draw. Each is a file, so that what was measured stays measured."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

import moeprune
from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.evaluation.report import Quality


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


T = TypeVar("T", bound=_Record)


class Key(_Record):
    """What a cell's numbers depend on.

    Attributes:
        model: fingerprint of the original.
        held: fingerprints of the held-out texts that it is judged on, by domain.
        on: the domain that is calibrated on, or `texts.MIXTURE`.
        draw: the seed of the calibration text's blocks.
        data: their fingerprint.
        method, options, recovered, ratio: who removes how much.
        release: of moeprune.
    """

    model: str
    held: dict[str, str]
    on: str
    draw: int
    data: str
    method: str
    options: dict[str, Any]
    recovered: bool
    ratio: float
    release: str = moeprune.__version__

    @property
    def file_name(self) -> str:
        """Readable, and another for every key."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]
        start = re.sub(r"[^\w.-]", "_", f"{self.on}-{self.draw}-{self.method}-{self.ratio:.3g}")
        return f"{start}-{digest}.json"


class Original(_Record):
    """The model itself, on the same text."""

    parameters: int
    bytes_on_disk: int
    tokens_per_second: float
    quality: dict[str, Quality]


class Cell(_Record):
    """What became of the model.

    Attributes:
        removed: the share of routed experts that went.
        decide_seconds: from Stats to Plan.
        carry_out_seconds: from Plan to checkpoint, with its recovery.
        tokens_per_second: of forward passes over the held-out text.
        original_tokens_per_second: the original's, measured just before; None where speed was not compared.
    """

    key: Key
    removed: float
    decide_seconds: float
    carry_out_seconds: float
    parameters: int
    bytes_on_disk: int
    tokens_per_second: float
    original_tokens_per_second: float | None
    quality: dict[str, Quality]


class Store:
    """A directory of cells, and of the Plans that they come from."""

    def __init__(self, directory: Path) -> None:
        self._cells = directory / "cells"
        self._plans = directory / "plans"
        self._originals = directory / "originals"

    def get(self, key: Key) -> Cell | None:
        """Raises InputError for a file that is no cell."""
        return _read(self._cells / key.file_name, Cell)

    def put(self, cell: Cell, plan: str) -> None:
        _write(self._plans / cell.key.file_name, plan)
        _write(self._cells / cell.key.file_name, cell.model_dump_json(indent=1) + "\n")

    def forget(self, key: Key) -> None:
        (self._cells / key.file_name).unlink(missing_ok=True)

    def get_original(self, name: str) -> Original | None:
        """Raises InputError for a file that is no such record."""
        return _read(self._originals / f"{name}.json", Original)

    def put_original(self, name: str, original: Original) -> None:
        _write(self._originals / f"{name}.json", original.model_dump_json(indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with write_beside(path) as beside:
        beside.write_text(text)


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError as error:
        raise InputError(f"{path} is not what was measured by this release; remove it, and run again") from error
