"""Steps in containers of the image, on this machine's Docker engine, held as tightly as on a cluster.

No root, no capabilities, nothing to write to but the run's outputs and /tmp; nothing to read of this machine but what
the run names. The network is this machine's, where MLflow and S3 are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from kfp import local
from kfp.local import docker_task_handler

from moeprune.errors import InputError
from moeprune.services.signals import deferred
from moeprune.tracking import PARENT_RUN_VARIABLE

from .on_a_cluster import VARIABLES
from .processes import GRACE_SECONDS

# What a step on a cluster has in its environment, and what on this machine leads there, or to the hub.
_PASSED_ON = (
    *(*VARIABLES, "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", PARENT_RUN_VARIABLE),
    *(
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "NO_PROXY",
        "no_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
    ),
    "OMP_NUM_THREADS",
)
_IMAGE_USER = 1000  # of the Dockerfile
_SHARED_MEMORY = 1 << 30  # bytes; NCCL needs more than an engine's default
_SECONDS_BETWEEN_LOOKS = 0.2

Run = Callable[[list[str], Callable[[Callable[[str], None]], int]], int]


def image_id(image: str) -> str:
    """The digest of an image's contents, by which it is what it is whatever its name comes to mean.

    Raises:
        InputError: no engine answers, or it has no such image.
    """
    with _engine() as client:
        from docker.errors import ImageNotFound

        try:
            return str(client.images.get(image).id)
        except ImageNotFound as error:
            raise InputError(
                f"the Docker engine has no image {image}: `make image` builds it, or docker pull gets it"
            ) from error


@dataclass(frozen=True)
class Containers:
    """That steps run in containers of an image."""

    image: str  # its digest
    inputs: tuple[Path, ...]  # files and directories on this machine that the steps read; at the same paths inside

    def runner(self, *theirs: Path, scratch: Path) -> local.DockerRunner:
        """How `kfp.local` starts the containers.

        Args:
            theirs: directories that kfp shows to the steps, which write there.
            scratch: directory that is /tmp for all steps.
        """
        from docker.types import DeviceRequest, Mount

        mounts = [Mount("/tmp", str(scratch), type="bind")]
        inputs = dict.fromkeys(path for each in self.inputs for path in _with_targets(each))
        mounts += [Mount(str(path), str(path), type="bind", read_only=True) for path in inputs]
        with _engine() as client:
            gpus = "nvidia" in client.info().get("Runtimes", {})
        return local.DockerRunner(
            mounts=mounts,
            user=_user(*theirs, scratch),
            environment={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else [],
            shm_size=_SHARED_MEMORY,
            network_mode="host",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
        )

    @contextmanager
    def started_by_kfp(self, run: Run, stopping: Event) -> Iterator[None]:
        """Take over from `kfp.local` how it runs a container: its own way takes one that ends at once for a success.

        Args:
            run: called with a step's command, and a function that carries it out, telling each line it puts out.
            stopping: set when this process is told to stop.
        """

        def start(*, client: Any, command: list[str], **options: Any) -> int:
            def carry_out(hear: Callable[[str], None]) -> int:
                # Our image, whatever the pipeline was compiled with.
                return _follow(client, options | {"image": self.image, "command": command}, hear, stopping)

            return run(command, carry_out)

        original = docker_task_handler.run_docker_container
        docker_task_handler.run_docker_container = start
        try:
            yield
        finally:
            docker_task_handler.run_docker_container = original


def _with_targets(path: Path) -> Iterator[Path]:
    """A file or directory, and the directories that its links lead to: a snapshot of the hub's cache is all links."""
    yield path
    links = path.iterdir() if path.is_dir() else [path]
    yield from dict.fromkeys(link.resolve().parent for link in links if link.is_symlink())


def _user(*theirs: Path) -> str:
    """Who the steps run as: whoever runs us. For root it is the image's user, to whom these directories are given."""
    if os.getuid() != 0:
        return f"{os.getuid()}:{os.getgid()}"
    for directory in theirs:
        directory.mkdir(parents=True, exist_ok=True)
        os.chown(directory, _IMAGE_USER, _IMAGE_USER)
    return f"{_IMAGE_USER}:{_IMAGE_USER}"


def _follow(client: Any, options: dict[str, Any], hear: Callable[[str], None], stopping: Event) -> int:
    """Run a container to its end, or until this process is told to stop; returns its exit code."""
    with deferred():
        container = client.containers.create(**options)
    try:
        container.start()
        reader = Thread(target=_read, args=(container, hear), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(_SECONDS_BETWEEN_LOOKS)
                if stopping.is_set():
                    raise KeyboardInterrupt
            return int(container.wait()["StatusCode"])
        except BaseException:
            _interrupt(container, reader)
            raise
    finally:
        container.remove(force=True)


def _read(container: Any, hear: Callable[[str], None]) -> None:
    rest = b""
    for part in container.logs(stream=True, follow=True):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            hear(line.decode(errors="replace"))
    if rest:
        hear(rest.decode(errors="replace"))


def _interrupt(container: Any, reader: Thread) -> None:
    """Ctrl-C for the step, which has some time to end in good order. A signal to the container reaches a shell only."""
    from docker.errors import APIError

    with suppress(APIError):  # it has ended
        container.exec_run(["sh", "-c", "kill -INT -1"])
    reader.join(GRACE_SECONDS)


@contextmanager
def _engine() -> Iterator[Any]:
    try:
        import docker
    except ImportError as error:
        raise InputError("steps in containers need Docker's client: pip install 'moeprune[local]'") from error
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise InputError(f"no Docker engine answers ({error}); start it, or leave out --runner docker") from error
    try:
        yield client
    finally:
        client.close()
