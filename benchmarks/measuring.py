"""What the benchmarks share: pairs, medians and their spread, processes with their peak memory, tables of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, form: str) -> str:
        """The median, and in brackets the least and the most."""
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pairs(one: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Measure two things in turns, each first as often as the other; what disturbs the machine disturbs both."""
    ones, others = [], []
    for repeat in range(repeats):
        if repeat % 2:
            others.append(other())
            ones.append(one())
        else:
            ones.append(one())
            others.append(other())
    return ones, others


def ratio(ones: Sequence[float], others: Sequence[float]) -> Spread:
    """Of each pair."""
    return Spread.of([one / other for one, other in zip(ones, others, strict=True)])


@dataclass(frozen=True)
class Ran:
    """A process that has ended: how long it took, its peak of resident memory, and what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run(command: Sequence[str | Path], before_start: Callable[[], None] | None = None, **environment: str) -> Ran:
    """Run a command to its end.

    Args:
        before_start: called in the new process, for example to set limits.
        environment: variables on top of ours.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        preexec_fn=before_start,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{output[-4000:]}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return Ran(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak, output)


def machine() -> dict[str, str]:
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(name: str, title: str, rows: Sequence[dict[str, Any]], raw: Any, notes: str = "") -> None:
    """Print the table, and write it with the raw numbers as `results/<name>.md` and `.json`."""
    command = f"python benchmarks/{name}.py {' '.join(sys.argv[1:])}".strip()
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = f"# {title}\n\n`{command}`, {datetime.now(UTC):%Y-%m-%d}; {where}\n\n{table(rows)}\n"
    if notes:
        text += f"\n{notes}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    record = {"command": command, "machine": machine(), "raw": raw}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, default=asdict) + "\n")
