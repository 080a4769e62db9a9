"""One step as a process: its output followed line by line, and all it started ended with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Protocol

from moeprune.services.signals import deferred

_SECONDS_BETWEEN_LOOKS = 0.2
GRACE_SECONDS = 20.0  # for an interrupted step to tell MLflow and remove what it was writing


class Started(Protocol):
    """A process that leads a group of its own."""

    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """Until it ends; its exit code, or less the number of the signal that ended it."""
        ...


def follow(start: Callable[[int], Started], on_line: Callable[[str], None], stopping: Event | None = None) -> int:
    """Run a process to its end, or until this one is told to stop; returns its exit code.

    The terminal's Ctrl-C reaches only us, whoever it was sent by or to; we pass it on and wait, so that the step can
    end in good order, and then end what is left of the group.

    Args:
        start: begins it, with the file that its output goes to, standard error included.
        on_line: called with each line of that, in a thread.
        stopping: set when this process is told to stop; a thread that is not the main one hears of it in no other way.
    """
    process = None
    heard, says = os.pipe()
    reader = Thread(target=_read, args=(heard, on_line), daemon=True)
    reader.start()
    try:
        with deferred():
            try:
                process = start(says)
            finally:
                os.close(says)  # the output ends when all who can write to it have ended
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


def _read(heard: int, on_line: Callable[[str], None]) -> None:
    with open(heard, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            on_line(line.rstrip("\n"))


def _interrupt(process: Started, reader: Thread) -> None:
    # Not the leader is waited for: what it started may take longer than itself.
    try:
        _signal(process, signal.SIGINT)
        reader.join(GRACE_SECONDS)
    finally:  # also where the user's patience ends earlier
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: Started, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all gone, or (macOS) only not yet reaped
        os.killpg(process.pid, number)
