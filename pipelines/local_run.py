"""The pipeline on this machine: the same object that a cluster gets, run by `kfp.local` in processes or containers."""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol, TextIO

from kfp import local
from kfp.local import subprocess_task_handler
from kfp.local.orchestrator import task_executor

from moeprune.errors import MoepruneError
from moeprune.services.signals import announced

from .containers import Containers
from .forked_steps import start_step
from .processes import follow

# What moeprune.progress writes where there is no terminal.
_PROGRESS = re.compile(r"[a-z][a-z -]*: \d+/\d+(, \d+ s left)?")
_COLOUR = re.compile(r"\x1b\[\d*m")
_CACHE_HIT = re.compile(r"Task (\S+) cache hit")
_OUR_ERROR = re.compile(r"moeprune\.errors\.\w+: (.+)")
_NOTE = re.compile(r"note: .+")
_KILLED = 128 + 9  # as a shell says it
_NOT_STARTED = 1


class StepError(MoepruneError):
    """A step of the run ended with an error."""


class Watcher(Protocol):
    """Whoever wants to know how the run goes. Steps are named as in the pipeline: `global-prune`."""

    def started(self, step: str) -> None: ...

    def progress(self, step: str, text: str) -> None: ...

    def noted(self, step: str, note: str) -> None: ...

    def finished(self, step: str) -> None: ...

    def reused(self, step: str) -> None: ...


def run_locally(
    pipeline: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    outputs: Path,
    cache: Path,
    log: TextIO,
    watcher: Watcher,
    containers: Containers | None = None,
) -> dict[str, Any]:
    """Run a pipeline; returns its outputs by name.

    Args:
        pipeline: as kfp makes it (`building.built_once`).
        arguments: of the pipeline.
        outputs: directory for what the steps put out; each run makes one of its own in it.
        cache: directory that remembers which outputs can be used again.
        log: gets everything that the steps and `kfp.local` say.
        containers: None: the steps are processes of this machine's Python.

    Raises:
        InputError: there is no engine for containers, or no such image.
        StepError: with the error of the step, for the user.
    """
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        workspace = Path(scratch) / "workspace"
        steps = _Steps(watcher, log, scratch)
        if containers:
            runner = containers.runner(outputs, workspace, scratch=Path(scratch))
            started = containers.started_by_kfp(steps.run, steps.stopping)
        else:
            runner, started = local.SubprocessRunner(use_venv=False), _kfp_starts_processes(steps)
        with _kfp_tells(steps), started:
            local.init(
                runner,
                pipeline_root=str(outputs.absolute()),
                workspace_root=str(workspace),
                enable_caching=True,
                cache_root=str(cache),
            )
            try:
                return dict(pipeline(**arguments).outputs)
            except RuntimeError:
                if steps.failure:
                    raise steps.failure from None
                raise


class _NoWaiting:
    """In place of the `time` that `kfp.local` waits by before it tries a step again."""

    @staticmethod
    def sleep(seconds: float) -> None:
        pass


class _Steps:
    """Stands where `kfp.local` starts a step, and where it logs."""

    def __init__(self, watcher: Watcher, log: TextIO, scratch: str) -> None:
        self.failure: StepError | None = None
        self._watcher = watcher
        self._log = log
        self._one_at_a_time = Lock()
        self.stopping = Event()
        # kfp leaves the step's source text in the temporary directory; this one goes when the run does.
        self._environment = {"TMPDIR": scratch}

    def run_process(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """In place of `run_local_subprocess`: the command of a step, to its exit code."""
        environment = os.environ | self._environment | (env_vars or {})

        def carry_out(hear: Callable[[str], None]) -> int:
            return follow(lambda out: start_step(full_command, environment, out), hear, self.stopping)

        return self.run(full_command, carry_out)

    def run(self, command: list[str], carry_out: Callable[[Callable[[str], None]], int]) -> int:
        """The command of a step, carried out by a function that tells each line it puts out, to its exit code.

        kfp runs the shards of a loop in threads. Here they take turns: they would share the same cores and memory.
        """
        with self._one_at_a_time:
            if self.failure or self.stopping.is_set():
                return _NOT_STARTED
            return self._run(command[command.index("--function_to_execute") + 1].replace("_", "-"), carry_out)

    def _run(self, step: str, carry_out: Callable[[Callable[[str], None]], int]) -> int:
        self._watcher.started(step)
        self._log.write(f"==== {step}\n")
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            self._log.write(line + "\n")
            self._log.flush()
            if _PROGRESS.fullmatch(line):
                self._watcher.progress(step, line)
            elif _NOTE.fullmatch(line):
                self._watcher.noted(step, line)

        code = carry_out(hear)
        if code == 0:
            self._watcher.finished(step)
        else:
            self.failure = StepError(f"{step}: {_reason(said, code)}")
        return code

    def filter(self, record: logging.LogRecord) -> bool:
        """What `kfp.local` logs goes to the log and no further; that a step was not run is heard only here."""
        message = _COLOUR.sub("", record.getMessage())
        self._log.write(message + "\n")
        if hit := _CACHE_HIT.match(message):
            self._watcher.reused(hit[1])
        return False


def _reason(said: list[str], code: int) -> str:
    """Why a step failed, from what it said: our own error's sentence, else the last line."""
    for place in range(len(said) - 1, -1, -1):
        if ours := _OUR_ERROR.match(said[place]):
            return "\n".join([ours[1], *said[place + 1 :]]).strip()
    if code in (_KILLED, -9):
        return "was killed, most likely because memory ran out"
    return next((line.strip() for line in reversed(said) if line.strip()), f"ended with code {code}")


@contextmanager
def _kfp_starts_processes(steps: _Steps) -> Iterator[None]:
    """Take over from `kfp.local` how it starts a process."""
    original = subprocess_task_handler.run_local_subprocess
    subprocess_task_handler.run_local_subprocess = steps.run_process
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = original


@contextmanager
def _kfp_tells(steps: _Steps) -> Iterator[None]:
    """Take over from `kfp.local` what it prints, logs and warns of, and how long it waits after a step has failed."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level, clock = root.level, task_executor.time
    task_executor.time = _NoWaiting  # a step that failed here is not tried again
    root.addHandler(silent)  # without any, the first message would add one for standard error
    root.addFilter(steps)
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), announced(steps.stopping):
            warnings.simplefilter("ignore")  # that the image may not be Python's: it is not used, or is ours
            yield
    finally:
        task_executor.time = clock
        root.setLevel(level)
        root.removeFilter(steps)
        root.removeHandler(silent)
