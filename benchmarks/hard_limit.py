"""A limit on memory that the operating system keeps: whoever needs more is killed, or gets no memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HardLimit:
    """A limit for processes that are started.

    Attributes:
        kind: what keeps it, for people.
        enter: to be called in the new process before it becomes the command.
        peak: bytes that its processes took at most at once, cached files included; None where nobody counts.
    """

    kind: str
    enter: Callable[[], None]
    peak: Callable[[], int | None]


@contextmanager
def hard_limit(size: int) -> Iterator[HardLimit]:
    """A memory control group, which counts every page, cached files too; where we may not make one, `RLIMIT_DATA`,
    which counts all memory that is not a mapped file.
    """
    for controller, limit, peak in (
        (_ROOT / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (_ROOT, "memory.max", "memory.peak"),
    ):
        group = controller / f"moeprune-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield HardLimit(
                "control group",
                lambda group=group: (group / "cgroup.procs").write_text(str(os.getpid())) and None,  # type: ignore[misc]
                lambda group=group, peak=peak: int((group / peak).read_text()),  # type: ignore[misc]
            )
        finally:
            group.rmdir()
        return
    yield HardLimit("RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)), lambda: None)
