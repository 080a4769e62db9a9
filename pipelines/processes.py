"""One step as a process: its output followed line by line, and all it started ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import IO

from moeprune.services.signals import deferred

_SECONDS_BETWEEN_LOOKS = 0.2
GRACE_SECONDS = 20.0  # for an interrupted step to tell MLflow and remove what it was writing


def follow(
    command: list[str], environment: dict[str, str], on_line: Callable[[str], None], stopping: Event | None = None
) -> int:
    """Run a command to its end, or until this process is told to stop; returns its exit code.

    It leads a process group of its own. The terminal's Ctrl-C reaches only us, whoever it was sent by or to; we pass it
    on and wait, so that the step can end in good order, and then end what is left of the group.

    Args:
        on_line: called with each line of its output, standard error included, in a thread.
        stopping: set when this process is told to stop; a thread that is not the main one hears of it in no other way.
    """
    process = None
    try:
        with deferred():
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            reader = Thread(target=_read, args=(process.stdout, on_line), daemon=True)
            reader.start()
        while reader.is_alive():
            # Not without end: a signal that comes just before the wait begins would not be heard until it is over.
            reader.join(_SECONDS_BETWEEN_LOOKS)
            if stopping and stopping.is_set():
                raise KeyboardInterrupt
        return process.wait()
    except BaseException:
        if process:
            _interrupt(process, reader)
        raise


def _read(lines: IO[str], on_line: Callable[[str], None]) -> None:
    with lines:
        for line in lines:
            on_line(line.rstrip("\n"))


def _interrupt(process: subprocess.Popen[str], reader: Thread) -> None:
    # The output ends when all of the group's processes have: its leader is a shell, which may end before the step does.
    try:
        _signal(process, signal.SIGINT)
        reader.join(GRACE_SECONDS)
    finally:  # also where the user's patience ends earlier
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all gone, or (macOS) only not yet reaped
        os.killpg(process.pid, number)
