"""The pipeline on this machine: the same object that a cluster gets, run by `kfp.local`, a process per step."""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol, TextIO

from kfp import local
from kfp.local import subprocess_task_handler

from moeprune.errors import MoepruneError
from moeprune.services.signals import announced

from .processes import follow
from .prune import prune

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
    arguments: dict[str, Any], *, outputs: Path, cache: Path, log: TextIO, watcher: Watcher
) -> dict[str, Any]:
    """Run the pipeline; returns its outputs by name.

    Args:
        arguments: of the pipeline.
        outputs: directory for what the steps put out; each run makes one of its own in it.
        cache: directory that remembers which outputs can be used again.
        log: gets everything that the steps and `kfp.local` say.

    Raises:
        StepError: with the error of the step, for the user.
    """
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        steps = _Steps(watcher, log, scratch)
        with _kfp_runs_through(steps):
            local.init(
                local.SubprocessRunner(use_venv=False),
                pipeline_root=str(outputs),
                workspace_root=str(Path(scratch) / "workspace"),
                enable_caching=True,
                cache_root=str(cache),
            )
            try:
                return dict(prune(**arguments).outputs)
            except RuntimeError:
                if steps.failure:
                    raise steps.failure from None
                raise


class _Steps:
    """Stands where `kfp.local` starts a step's process, and where it logs."""

    def __init__(self, watcher: Watcher, log: TextIO, scratch: str) -> None:
        self.failure: StepError | None = None
        self._watcher = watcher
        self._log = log
        self._one_at_a_time = Lock()
        self.stopping = Event()
        # kfp leaves the step's source text in the temporary directory; this one goes when the run does.
        self._environment = {"TMPDIR": scratch}

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """In place of `run_local_subprocess`: the command of a step, to its exit code.

        kfp runs the shards of a loop in threads. Here they take turns: they would share the same cores and memory.
        """
        with self._one_at_a_time:
            if self.failure or self.stopping.is_set():
                return _NOT_STARTED
            return self._run(full_command, env_vars or {})

    def _run(self, full_command: list[str], env_vars: dict[str, str]) -> int:
        step = full_command[full_command.index("--function_to_execute") + 1].replace("_", "-")
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

        code = follow(full_command, os.environ | self._environment | env_vars, hear, self.stopping)
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
def _kfp_runs_through(steps: _Steps) -> Iterator[None]:
    """Take over from `kfp.local` how it starts a process, and what it prints, logs and warns of."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level, original = root.level, subprocess_task_handler.run_local_subprocess
    root.addHandler(silent)  # without any, the first message would add one for standard error
    root.addFilter(steps)
    root.setLevel(logging.INFO)
    subprocess_task_handler.run_local_subprocess = steps.run
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), announced(steps.stopping):
            warnings.simplefilter("ignore")  # that the image may not be Python's: no image is used
            yield
    finally:
        subprocess_task_handler.run_local_subprocess = original
        root.setLevel(level)
        root.removeFilter(steps)
        root.removeHandler(silent)
