"""The lines of a pod as they come, each once, though every look asks for some of them again."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime

from moeprune.errors import ServiceError
from moeprune.train_job.cluster import Cluster

_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
_SECONDS_AGAIN = 5  # of what was read: lines come late
_BEFORE_ALL = (datetime.min.replace(tzinfo=UTC), "")


class NodeLog:
    """What one node says, whichever pod it is in at the time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pod = ""
        self._last_time = _BEFORE_ALL
        self._asked_at: float | None = None

    def new_lines(self, pod: str) -> list[str]:
        """What `pod` has said since the last look. A log that cannot be read now may be readable at the next."""
        if pod != self._pod:
            self._pod, self._last_time, self._asked_at = pod, _BEFORE_ALL, None
        now = time.monotonic()
        since = {} if self._asked_at is None else {"since_seconds": math.ceil(now - self._asked_at) + _SECONDS_AGAIN}
        try:
            text = self._cluster.log(pod, **since)
        except ServiceError:
            return []
        self._asked_at = now
        stamped = [(_time(stamp), line) for stamp, _, line in (entry.partition(" ") for entry in text.splitlines())]
        new = [(said_at, line) for said_at, line in stamped if said_at > self._last_time]
        if new:
            self._last_time = new[-1][0]
        return [line for _, line in new]


def _time(stamp: str) -> tuple[datetime, str]:
    """When a line was said, to compare: to the nanosecond, which is finer than Python's times."""
    if not (parts := _TIME.fullmatch(stamp)):
        return _BEFORE_ALL
    second = datetime.fromisoformat(parts[1] + parts[3].replace("Z", "+00:00"))
    return second, parts[2] or ""  # which sorts as the fraction does
