"""Nothing is written half, and what is written can be read by others."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeprune.atomic import build_beside, refuse_to_overwrite, write_beside
from moeprune.errors import InputError
from moeprune.places import output

Beside = Callable[[Path], AbstractContextManager[Path]]


def put(beside: Path, kind: Beside) -> Path:
    """Write something where it was said; returns the file."""
    file = beside if kind is write_beside else beside / "deeper" / "file"
    file.parent.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(3)}, file)
    return file


@pytest.fixture(params=[write_beside, build_beside])
def kind(request: pytest.FixtureRequest) -> Beside:
    found: Beside = request.param
    return found


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_it_is_there_when_it_is_done_and_not_before(kind: Beside, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with kind(out) as beside:
        put(beside, kind)
        assert not out.exists()
        assert beside.parent == out.parent
    assert out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_nothing_is_left_of_what_failed(kind: Beside, error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with kind(tmp_path / "out") as beside:
            put(beside, kind)
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_until_then(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("before")
    with pytest.raises(ValueError, match="no"), write_beside(out) as beside:  # noqa: PT012
        beside.write_text("half")
        raise ValueError("no")
    assert out.read_text() == "before"
    with write_beside(out) as beside:
        beside.write_text("after")
    assert out.read_text() == "after"


def test_it_can_be_read_by_whom_the_umask_lets(kind: Beside, umask: int, tmp_path: Path) -> None:
    with kind(tmp_path / "out") as beside:
        put(beside, kind)
    file = tmp_path / "out" if kind is write_beside else tmp_path / "out" / "deeper" / "file"
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~umask
    current = os.umask(umask)
    assert current == umask


def test_places_where_nothing_can_be_written(kind: Beside, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(InputError, match="nothing can be written at"), kind(out):
            pytest.fail("work was begun")
    with pytest.raises(InputError, match="nothing can be written at"), output(str(tmp_path / "file" / "out")):
        pytest.fail("work was begun")
    with pytest.raises(InputError, match="is a directory"), write_beside(tmp_path):
        pytest.fail("work was begun")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_would_be_lost_is_not_overwritten(tmp_path: Path) -> None:
    refuse_to_overwrite(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refuse_to_overwrite(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match="exists already"):
            refuse_to_overwrite(taken)
