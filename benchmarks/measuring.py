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
from typing import Any, TypeVar

import torch
import transformers

T = TypeVar("T")

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


def pairs(one: Callable[[], T], other: Callable[[], T], repeats: int) -> tuple[list[T], list[T]]:
    """Measure two things in turns, each first as often as the other; what disturbs the machine disturbs both."""
    ones: list[T] = []
    others: list[T] = []
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


# A process begins with the peak memory of the one that starts it, so a small one starts it.
_LAUNCHER = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
told = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]
os.write(int(sys.argv[1]), json.dumps(told).encode())
"""


def run(command: Sequence[str | Path], before_start: Callable[[], None] | None = None, **environment: str) -> Ran:
    """Run a command to its end.

    Args:
        before_start: called in the new process, for example to set limits.
        environment: variables on top of ours.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    read_end, write_end = os.pipe()
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(write_end), *(str(part) for part in command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        preexec_fn=before_start,
        pass_fds=[write_end],
    ) as process:
        os.close(write_end)
        output, _ = process.communicate()
    took = time.perf_counter() - started
    with os.fdopen(read_end) as pipe:
        told = pipe.read()
    code, cpu_seconds, peak = json.loads(told) if told else (process.returncode, 0.0, 0)
    if code:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {code}:\n{output[-4000:]}")
    return Ran(took, cpu_seconds, peak if sys.platform == "darwin" else peak * 1024, output)


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


def publish(
    name: str, title: str, rows: Sequence[dict[str, Any]], raw: Any, notes: str = "", *, script: str = ""
) -> None:
    """Print the table, and write it with the raw numbers as `results/<name>.md` and `.json`.

    Args:
        script: that made it, where it is not called as the results are.
    """
    command = f"python benchmarks/{script or name}.py {' '.join(sys.argv[1:])}".strip()
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = f"# {title}\n\n`{command}`, {datetime.now(UTC):%Y-%m-%d}; {where}\n\n{table(rows)}\n"
    if notes:
        text += f"\n{notes}\n"
    sys.stdout.write(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    record = {"command": command, "machine": machine(), "raw": raw}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, default=asdict) + "\n")
