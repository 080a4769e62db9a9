"""A cut that is interrupted goes on where it was; nothing half is ever in its place."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import cut
from moeprune.checkpoint.targets import LocalTarget
from moeprune.errors import InputError

SMALL_SHARD = 20_000  # bytes; the model has several times as much


class Interruption:
    """A cut that is interrupted when a share of its tensors is done, and what was said."""

    def __init__(self, source: Path, out: Path, keep: list[int], shard_bytes: int = SMALL_SHARD) -> None:
        self.source, self.out, self.keep, self.shard_bytes = source, out, keep, shard_bytes
        self.said: list[str] = []

    def run(self, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> None:
        source = Checkpoint(self.source)
        plan = tiny.plan_for(list(source.layout.layers), [self.keep] * 3, source.fingerprint)
        self.said.clear()
        cut(
            source,
            plan,
            LocalTarget(self.out),
            shard_bytes=self.shard_bytes,
            on_tensor=on_tensor,
            say=self.said.append,
        )

    def interrupt(self, error: BaseException, share: float = 0.6) -> None:
        def stop(done: int, total: int) -> None:
            assert list(self.out.parent.iterdir()), "nothing was being written; the test shows nothing"
            assert not self.out.exists()
            if done > share * total:
                raise error

        with pytest.raises(type(error)):
            self.run(stop)
        assert not self.out.exists()

    @property
    def shards(self) -> dict[str, tuple[int, int]]:
        """Finished shards that are kept -> which file it is, and when it was written."""
        found = self.out.parent.glob(".out.unfinished/*/*")
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestInterrupted:
    @pytest.fixture
    def source(self, qwen: Path, tmp_path: Path) -> Path:
        shutil.copytree(qwen, tmp_path / "source")
        return tmp_path / "source"

    @pytest.fixture
    def job(self, source: Path, tmp_path: Path) -> Interruption:
        (tmp_path / "outputs").mkdir()
        return Interruption(source, tmp_path / "outputs" / "out", [0, 1])

    @pytest.fixture
    def whole(self, source: Path, tmp_path: Path) -> dict[str, bytes]:
        job = Interruption(source, tmp_path / "whole", [0, 1])
        job.run()
        assert job.said == []
        return contents(job.out)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("the disk is full"), SystemExit()])
    def test_it_goes_on_where_it_was(self, job: Interruption, whole: dict[str, bytes], error: BaseException) -> None:
        job.interrupt(error)
        kept = job.shards
        total = sum(name.endswith(".safetensors") for name in whole)
        assert 1 < len(kept) < total - 1
        assert job.said == [f"stopped: {len(kept)} of {total} shards are kept, and the same command goes on from there"]
        assert all(name.endswith(".safetensors") for name in kept)
        told: list[int] = []
        job.run(lambda done, total: told.append(done))
        assert job.said == [f"continuing: {len(kept)} of {total} shards are there"]
        assert told[0] > 0.4 * told[-1]  # progress begins where it was, too
        assert contents(job.out) == whole
        now = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in job.out.iterdir()}
        assert kept.items() <= now.items()
        assert [path.name for path in job.out.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("the disk is full")])
    def test_nothing_is_left_where_no_shard_is_finished(self, job: Interruption, error: BaseException) -> None:
        job.shard_bytes = 1 << 30
        job.interrupt(error, 0.0)
        assert job.said == []
        assert not list(job.out.parent.iterdir())

    def test_killed_it_goes_on_as_well(self, job: Interruption, whole: dict[str, bytes]) -> None:
        pid = os.fork()
        if not pid:
            job.run(lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total / 2 else None)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert any(name.endswith(".part") for name in job.shards)
        finished = sum(name.endswith(".safetensors") for name in job.shards)
        job.run()
        assert job.said[0].startswith(f"continuing: {finished} of ")
        assert contents(job.out) == whole

    @pytest.mark.parametrize("change", ["plan", "shard size", "source", "header"])
    def test_another_job_starts_clean(self, job: Interruption, change: str) -> None:
        job.interrupt(KeyboardInterrupt())
        before = job.shards
        weights = job.source / "model.safetensors"
        if change == "plan":
            job.keep = [0, 2]
        elif change == "shard size":
            job.shard_bytes -= 7000
        elif change == "source":
            os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
        else:
            tensors = load_file(weights)
            save_file({**tensors, "new": torch.zeros(1)}, weights)
        job.interrupt(KeyboardInterrupt(), 0.3)
        assert not any(said.startswith("continuing") for said in job.said)
        assert job.shards
        assert not set(before.values()) & set(job.shards.values())
        assert len(list((job.out.parent / ".out.unfinished").iterdir())) == 2  # the lock and one job
        job.run()
        assert [path.name for path in job.out.parent.iterdir()] == ["out"]

    def test_a_shard_that_was_damaged_meanwhile_is_written_again(
        self, job: Interruption, whole: dict[str, bytes]
    ) -> None:
        job.interrupt(KeyboardInterrupt())
        kept = len(job.shards)
        shard = next(job.out.parent.glob(".out.unfinished/*/model-00002-*"))
        shard.write_bytes(shard.read_bytes()[:-1])
        job.run()
        assert job.said[0].startswith(f"continuing: {kept - 1} of ")
        assert contents(job.out) == whole

    def test_a_second_one_at_the_same_time_is_refused(self, job: Interruption, whole: dict[str, bytes]) -> None:
        def another(done: int, total: int) -> None:
            for keep in ([0, 1], [0, 2]):
                with pytest.raises(InputError, match=f"another process is writing {job.out}"):
                    Interruption(job.source, job.out, keep).run()

        job.run(another)
        assert contents(job.out) == whole

    def test_no_room_is_told_before_anything_is_written(
        self, job: Interruption, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
        with pytest.raises(InputError, match=f"{job.out.parent} has 0.0 GB of free space"):
            job.run(lambda done, total: pytest.fail("work was begun"))
        assert not list(job.out.parent.iterdir())

    def test_a_source_of_which_nothing_can_be_read_leaves_nothing(self, job: Interruption) -> None:
        weights = job.source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged"):
            job.run()
        assert not list(job.out.parent.iterdir())
