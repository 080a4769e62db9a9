"""A step as a process: followed to its end, and all that it started ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from moeprune.pipelines import processes
from moeprune.services.signals import announced


def shell(script: str) -> Callable[[int], subprocess.Popen[bytes]]:
    return lambda out: subprocess.Popen(["sh", "-c", script], stdout=out, stderr=out, start_new_session=True)


def follow(script: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = processes.follow(shell(script), lines.append)
    return code, lines


class TestProcesses:
    def test_output_and_code(self) -> None:
        assert follow("echo one; echo two >&2; exit 7") == (7, ["one", "two"])

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_ctrl_c_ends_all_that_a_step_started(self, stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
        marker = f"{time.time():.6f}"  # a number of seconds to sleep that nobody else sleeps
        trap = "trap '' INT; " if stubborn else ""
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            follow(f"{trap}sleep {marker} & sleep {marker}")
        assert time.monotonic() - started < 5
        listing = subprocess.run(["ps", "-A", "-o", "stat=,args="], capture_output=True, text=True, check=True).stdout
        assert not [row for row in listing.splitlines() if f"sleep {marker}" in row and not row.startswith("Z")]

    def test_a_thread_hears_of_ctrl_c_too(self) -> None:
        """Shards run in threads of kfp's, which no signal reaches."""
        stopping, ended = threading.Event(), []

        def step() -> None:
            try:
                processes.follow(shell("sleep 60"), lambda _: None, stopping)
            except KeyboardInterrupt:
                ended.append(True)

        thread = threading.Thread(target=step)
        thread.start()
        with pytest.raises(KeyboardInterrupt), announced(stopping):
            signal.raise_signal(signal.SIGINT)
        thread.join(5)
        assert ended == [True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
