"""Ctrl-C, SIGTERM and a closed terminal: when they may interrupt, and that they always run the code that cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold stop signals back until the block is done; then the first of them takes effect.

    For what must not be half done: starting a process and writing down its number, and stopping processes.
    """
    pending: list[int] = []
    try:
        with _handling(lambda number, _: pending.append(number), lambda handler: handler is not signal.SIG_IGN):
            yield
    finally:
        if pending:
            signal.raise_signal(pending[0])


@contextmanager
def raised() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block with SystemExit, so that `finally` clauses run, as Ctrl-C does anyway."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling(leave, lambda handler: handler is signal.SIG_DFL):
        yield


@contextmanager
def announced(stopping: threading.Event) -> Iterator[None]:
    """Set the event when a stop signal comes, before it takes effect: what other threads wait for must know, too."""
    previous = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}

    def announce(number: int, frame: FrameType | None) -> None:
        stopping.set()
        handler = previous[number]
        assert callable(handler)
        handler(number, frame)

    with _handling(announce, callable):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], replaces: Callable[[object], bool]) -> Iterator[None]:
    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other thread sees signals, or may set handlers
            for number in STOP_SIGNALS:
                current = signal.getsignal(number)
                if current is not None and replaces(current):  # None: set by C code, and not ours to restore
                    previous[number] = current
                    signal.signal(number, handler)
        yield
    finally:
        for number, current in previous.items():
            signal.signal(number, current)
