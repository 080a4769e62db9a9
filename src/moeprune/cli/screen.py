"""What a run shows while it goes: a line per step, and on a terminal what the present one is doing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

_STEP_WIDTH = 14


class Screen:
    """Told how a run goes (a `Watcher` of `moeprune.pipelines.local_run`), it tells the user."""

    def __init__(self) -> None:
        # Bound to this moment's standard output: others may be silenced by pointing it elsewhere.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.reused_steps: list[str] = []
        self._status: Status | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def started(self, step: str) -> None:
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._status = self.console.status(step)
            self._status.start()
        else:
            self.console.print(f"{step} ...")

    def progress(self, step: str, text: str) -> None:
        if self._status:
            self._status.update(text if text.startswith(step) else f"{step}: {text}")
        else:
            self.console.print(f"  {text}")

    def noted(self, step: str, note: str) -> None:
        self.console.print(f"  {step}: {note}")

    def finished(self, step: str, remark: str = "") -> None:
        self._stop()
        seconds = time.monotonic() - self._started
        self.console.print(f"{step:<{_STEP_WIDTH}}{seconds:6.1f} s  {remark}".rstrip())

    def reused(self, step: str) -> None:
        self.reused_steps.append(step)
        self.console.print(f"{step + ':':<{_STEP_WIDTH}} reused from an earlier run")

    def _stop(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None
