"""A job done by several processes on this machine, which share the model, its optimizer and the work (FSDP2)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moeprune.distillation.end_to_end.job import Job
from moeprune.distillation.end_to_end.telling import LAUNCHER_VARIABLE, EventFile, Listener
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.errors import InputError, ServiceError

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_END = 30.0
_LAST_LINES = 5


def train_in_processes(job: Job, listener: Listener) -> Outcome:
    """Have `torchrun` start the job's processes, pass on what they say, and wait for what they come to.

    Raises:
        InputError: as `train`, or a process ended without a word, most likely for want of memory.
    """
    failure_file(job.directory).unlink(missing_ok=True)
    events, log = EventFile.of(job.directory), job.directory / "processes.log"
    events.clear()
    with log.open("wb") as output, _running(command(job.directory, job.processes), job.processes, output) as torchrun:
        while True:
            with suppress(subprocess.TimeoutExpired):
                torchrun.wait(_SECONDS_BETWEEN_LOOKS)
            ended = torchrun.returncode is not None
            for event in events.new():
                listener(event)
            if ended:
                break
    outcome = Outcome.of(job.directory)
    if torchrun.returncode == 0 and outcome is not None:
        return outcome
    raise why_it_failed(job.directory, log.read_text(errors="replace"))


def command(directory: Path, processes: int) -> list[str]:
    """What starts the processes of the job in a directory, on one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "-m", f"{__package__}", str(directory)]


def why_it_failed(directory: Path, log: str) -> InputError | ServiceError:
    """From what the processes left behind."""
    if (failure := failure_file(directory)).is_file():
        return InputError(failure.read_text())
    last = " ".join(line.strip() for line in deque(log.splitlines(), maxlen=_LAST_LINES))
    return ServiceError(
        f"the processes that train ended without a result; most likely memory ran out: take fewer blocks per step, "
        f"more accumulation, or more machines. The same command goes on where they were. Their last words: {last}"
    )


def failure_file(directory: Path) -> Path:
    """Where a process that found an error that the user can mend says what it is."""
    return directory / "failure.txt"


@contextmanager
def _running(torchrun: list[str], processes: int, output: BinaryIO) -> Iterator[subprocess.Popen]:
    """Start it with a fair share of the cores for each process; end it and all that it started with the block."""
    environment = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid())}
    environment["OMP_NUM_THREADS"] = str(max(1, _cores() // processes))
    started = subprocess.Popen(
        torchrun, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)  # torchrun passes it on
            with suppress(subprocess.TimeoutExpired):
                started.wait(_SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def _cores() -> int:
    """Those that this process may use."""
    if given := os.environ.get("OMP_NUM_THREADS"):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
