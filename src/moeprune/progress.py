"""Progress on screen: a bar on a terminal, a line now and then in a log; and what a user should know of besides."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0

Advance = Callable[..., None]


@contextmanager
def progress(label: str) -> Iterator[Advance]:
    """Yield a function to call with what is done and what there is in all; it ignores anything more."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total, *_: bar.update(task, completed=done, total=total)
        return

    started = last = time.monotonic()

    def say(done: int, total: int, *_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / done * (total - done)
            sys.stderr.write(f"{label}: {done}/{total}" + (f", {left:.0f} s left\n" if done < total else "\n"))
            sys.stderr.flush()

    yield say


def note(sentence: str) -> None:
    """Tell the user of something that is no error, but not as it was asked for either."""
    sys.stderr.write(f"note: {sentence}\n")
    sys.stderr.flush()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
