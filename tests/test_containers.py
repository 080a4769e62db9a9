"""Steps in containers: what is asked of the engine, and what is made of what it says. The engine here is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from kfp import local
from kfp.local import docker_task_handler

from moeprune.errors import InputError
from moeprune.pipelines.containers import Containers, image_id


class FakeContainer:
    def __init__(self, said: list[bytes], code: int, ends: Event) -> None:
        self.said, self.code, self.ends = said, code, ends
        self.calls: list[Any] = []

    def start(self) -> None:
        self.calls.append("start")

    def logs(self, **_: bool) -> Iterator[bytes]:
        yield from self.said
        self.ends.wait(30)

    def wait(self) -> dict[str, int]:
        return {"StatusCode": self.code}

    def exec_run(self, command: list[str]) -> None:
        self.calls.append(command)
        self.ends.set()

    def remove(self, force: bool) -> None:
        self.calls.append(f"remove, force={force}")


class FakeEngine:
    """Where `docker.from_env` and kfp look for one."""

    def __init__(self, *said: bytes, code: int = 0, runs_on: bool = False) -> None:
        ends = Event()
        if not runs_on:
            ends.set()
        self.container = FakeContainer(list(said), code, ends)
        self.containers = self
        self.asked: dict[str, Any] = {}

    def create(self, **options: Any) -> FakeContainer:
        self.asked = options
        return self.container

    def ping(self) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return {"Runtimes": {"runc": {}}}

    def close(self) -> None:
        pass


def carried_out(engine: FakeEngine, stopping: Event | None = None) -> tuple[int, list[str]]:
    """A step's code, and its lines, run as kfp runs it."""
    lines: list[str] = []
    held = Containers("sha256:ours", ())
    with held.started_by_kfp(lambda command, carry_out: carry_out(lines.append), stopping or Event()):
        code = docker_task_handler.run_docker_container(
            client=engine, image="that of the pipeline", command=["sh"], volumes={"/runs": {}}, read_only=True
        )
    return code, lines


class TestAStep:
    def test_runs_in_our_image_with_all_that_kfp_gives(self) -> None:
        engine = FakeEngine()
        carried_out(engine)
        assert engine.asked == {"image": "sha256:ours", "command": ["sh"], "volumes": {"/runs": {}}, "read_only": True}

    def test_lines_come_in_parts(self) -> None:
        engine = FakeEngine(b"one\ntw", b"o\n", b"\xc3", b"\xa9 three")
        assert carried_out(engine) == (0, ["one", "two", "é three"])

    def test_that_fails_at_once_has_failed(self) -> None:
        """kfp's own way asks an engine that has removed the container already, and then takes it for a success."""
        engine = FakeEngine(b"no\n", code=3)
        assert carried_out(engine) == (3, ["no"])
        assert engine.container.calls == ["start", "remove, force=True"]

    def test_that_is_interrupted_may_end_in_good_order(self) -> None:
        stopping = Event()
        stopping.set()
        engine = FakeEngine(runs_on=True)
        with pytest.raises(KeyboardInterrupt):
            carried_out(engine, stopping)
        assert engine.container.calls == ["start", ["sh", "-c", "kill -INT -1"], "remove, force=True"]

    def test_kfp_has_its_own_way_again_afterwards(self) -> None:
        before = docker_task_handler.run_docker_container
        carried_out(FakeEngine())
        assert docker_task_handler.run_docker_container is before


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr("docker.from_env", lambda: fake)
    return fake


class TestHowStepsAreHeld:
    @pytest.fixture
    def runner(self, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
        monkeypatch.setenv("PIP_INDEX_URL", "https://secret")
        snapshot = tmp_path / "snapshots" / "a"
        snapshot.mkdir(parents=True)
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "1").touch()
        (snapshot / "config.json").symlink_to("../../blobs/1")
        made = Containers("ours", (snapshot, snapshot)).runner(tmp_path / "runs", scratch=tmp_path / "scratch")
        assert isinstance(made, local.DockerRunner)
        return made.container_run_args

    def test_tightly(self, runner: dict[str, Any]) -> None:
        assert runner["read_only"] is True
        assert runner["cap_drop"] == ["ALL"]
        assert runner["security_opt"] == ["no-new-privileges"]
        assert not runner["user"].startswith("0:")

    def test_they_see_what_they_read_and_write(self, runner: dict[str, Any], tmp_path: Path) -> None:
        seen = {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in runner["mounts"]}
        snapshot, blobs = str(tmp_path / "snapshots" / "a"), str(tmp_path / "blobs")
        assert seen == {
            "/tmp": (str(tmp_path / "scratch"), False),
            snapshot: (snapshot, True),
            blobs: (blobs, True),
        }

    def test_they_know_what_leads_to_the_services_and_no_more(self, runner: dict[str, Any]) -> None:
        assert runner["environment"]["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
        assert not {"PIP_INDEX_URL", "PATH", "HOME"} & runner["environment"].keys()

    def test_root_gives_what_they_write_to_the_image_s_user(
        self, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        given: list[tuple[Path, int, int]] = []
        monkeypatch.setattr(os, "getuid", lambda: 0)
        monkeypatch.setattr(os, "chown", lambda *arguments: given.append(arguments))
        made = Containers("ours", ()).runner(tmp_path / "runs", scratch=tmp_path)
        assert made.container_run_args["user"] == "1000:1000"
        assert given == [(tmp_path / "runs", 1000, 1000), (tmp_path, 1000, 1000)]

    def test_whoever_is_not_root_stays_who_they_are(
        self, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(os, "getuid", lambda: 501)
        monkeypatch.setattr(os, "getgid", lambda: 20)
        assert Containers("ours", ()).runner(scratch=tmp_path).container_run_args["user"] == "501:20"


def test_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing")
    with pytest.raises(InputError, match="no Docker engine answers"):
        image_id("moeprune:1")


def test_no_such_image(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from docker.errors import ImageNotFound

    class Images:
        def get(self, name: str) -> None:
            raise ImageNotFound(name)

    engine.images = Images()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no image moeprune:1: `make image`"):
        image_id("moeprune:1")
