"""Nothing is written half, and what is written can be read by others."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeprune.atomic import build_beside, continue_beside, refuse_to_overwrite, refuse_without_room, write_beside
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


class TestContinued:
    """A directory whose making goes on after an interruption."""

    def interrupted(self, out: Path, job: str = "job") -> None:
        with pytest.raises(KeyboardInterrupt), continue_beside(out, job) as beside:  # noqa: PT012
            (beside / "finished").write_text(job)
            (beside / "next.part").write_text("half")
            raise KeyboardInterrupt

    def test_what_is_finished_is_there_again(self, tmp_path: Path) -> None:
        out = tmp_path / "deeper" / "out"
        self.interrupted(out)
        assert not out.exists()
        with continue_beside(out, "job") as beside:
            assert [path.name for path in beside.iterdir()] == ["finished"]
            (beside / "more").write_text("more")
        assert sorted(path.name for path in out.iterdir()) == ["finished", "more"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]

    def test_nothing_is_left_where_nothing_is_finished(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), continue_beside(tmp_path / "out", "job") as beside:  # noqa: PT012
            (beside / "next.part").write_text("half")
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    def test_another_job_finds_nothing_of_it(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "out", "one")
        with continue_beside(tmp_path / "out", "other") as beside:
            assert not list(beside.iterdir())
            assert {path.name for path in beside.parent.iterdir()} == {"lock", "other"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_of_neighbours_nothing_is_touched(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "one")
        with continue_beside(tmp_path / "other", "job") as beside:
            assert not list(beside.iterdir())
        self.interrupted(tmp_path / "one")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".one.unfinished", "other"]

    @pytest.mark.parametrize("job", ["job", "other"])
    def test_the_second_at_once_is_refused(self, tmp_path: Path, job: str) -> None:
        out = tmp_path / "out"
        with continue_beside(out, "job") as beside:
            (beside / "finished").write_text("first")
            with pytest.raises(InputError, match=f"another process is writing {out}"), continue_beside(out, job):
                pytest.fail("let in")
        assert (out / "finished").read_text() == "first"
        with pytest.raises(InputError, match="exists already"), continue_beside(out, job):
            pytest.fail("let in")

    def test_of_many_at_once_each_has_it_to_itself(self, tmp_path: Path) -> None:
        out, inside, made = tmp_path / "out", [], []

        def make(_: int) -> None:
            try:
                with continue_beside(out, "job") as beside:
                    inside.append(1)
                    assert len(inside) == 1
                    (beside / "file").write_text("whole")
                    time.sleep(0.001)
                    inside.pop()
                made.append((out / "file").read_text())
                shutil.rmtree(out)
            except InputError as error:
                assert "another process" in str(error) or "exists already" in str(error)  # noqa: PT017

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(200)))
        assert made
        assert set(made) == {"whole"}

    def test_a_lock_that_was_removed_while_it_was_taken_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = fcntl.flock, []

        def taken_late(descriptor: int, how: int) -> None:
            real(descriptor, how)
            calls.append(descriptor)
            if len(calls) == 1:  # the one before was just done, and cleaned up
                shutil.rmtree(tmp_path / ".out.unfinished")

        monkeypatch.setattr(fcntl, "flock", taken_late)
        with (
            continue_beside(tmp_path / "out", "job"),
            pytest.raises(InputError, match="another process"),
            continue_beside(tmp_path / "out", "job"),
        ):
            pytest.fail("let in")
        assert len(calls) == 2

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
        with continue_beside(tmp_path / "out", "job") as beside:
            (beside / "file").write_text("whole")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_it_can_be_read_by_whom_the_umask_lets(self, umask: int, tmp_path: Path) -> None:
        with continue_beside(tmp_path / "out", "job") as beside:
            put(beside, build_beside)
        file = tmp_path / "out" / "deeper" / "file"
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~umask

    def test_places_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InputError, match="nothing can be written"), continue_beside(tmp_path / "file" / "out", "a"):
            pytest.fail("work was begun")


def test_room_is_told_before_it_is_missed(tmp_path: Path) -> None:
    refuse_without_room(tmp_path, 1)
    with pytest.raises(InputError, match="make room"):
        refuse_without_room(tmp_path, 1 << 60)
