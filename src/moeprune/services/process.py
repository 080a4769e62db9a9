"""Server processes that outlive us: starting them, knowing them again, and stopping every process they started.

Each is started as the leader of a session and process group of its own: the terminal's Ctrl-C does not reach it, and
its children are found by its group. A number alone does not identify a process, since numbers are used again; its
number with its start time does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel

from moeprune.errors import ServiceError

GRACE_SECONDS = 3.0  # after SIGTERM; both servers' files survive SIGKILL, so there is no reason to be more patient
KILL_SECONDS = 10.0  # for the kernel to remove what was killed
POLL_SECONDS = 0.05

_children: dict[int, subprocess.Popen[bytes]] = {}  # those started by this process, so that they can be reaped


@dataclass(frozen=True)
class Launch:
    """How to start a server."""

    name: str
    command: list[str]
    environment: dict[str, str]
    directory: Path  # it is started here, so that paths in the command can be relative whatever characters are above
    log: Path
    port: int
    leftovers: tuple[Path, ...] = ()  # files that it may not remove when it ends


class Server(BaseModel):
    """A server that was started: enough to find all its processes from another process, later."""

    name: str
    port: int
    log: Path
    group: int  # process group = number of the first process
    started: dict[int, str]  # process number -> start time, of the group's processes seen so far
    leftovers: list[Path] = []

    @property
    def alive(self) -> bool:
        """Whether any process of the server is."""
        return not self.started.items().isdisjoint(members(self.group).items())

    def seen(self) -> Server:
        """The same with the processes that it has by now: if the first is killed, the others are still known."""
        return self.model_copy(update={"started": self.started | members(self.group)})


def start(launch: Launch) -> Server:
    """Start the server, its output in its log. The caller holds back signals until the result is written down."""
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with launch.log.open("wb") as log:
            child = subprocess.Popen(
                launch.command,
                cwd=launch.directory,
                env=launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise ServiceError(f"{launch.name} cannot be started: {error}") from error
    _children[child.pid] = child
    # If it has ended already there is nothing to remember it by, and nothing that has to be stopped.
    started = {pid: moment for pid, moment in members(child.pid).items() if pid == child.pid}
    return Server(
        name=launch.name,
        port=launch.port,
        log=launch.log,
        group=child.pid,
        started=started,
        leftovers=list(launch.leftovers),
    )


def stop(servers: Sequence[Server]) -> None:
    """End all processes of the servers, at first politely; numbers that belong to others by now are left alone."""
    groups = {server.group: server.name for server in servers if server.alive}
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):  # gone, or (macOS) only not yet reaped
                os.killpg(group, number)
        deadline = time.monotonic() + seconds
        while groups and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            groups = {group: name for group, name in groups.items() if members(group)}
    for server in servers:
        if (child := _children.pop(server.group, None)) is not None:
            child.poll()
        for leftover in server.leftovers:
            leftover.unlink(missing_ok=True)
    if groups:
        raise ServiceError(f"could not stop {', '.join(groups.values())}: process groups {sorted(groups)} are left")


def last_words(server: Server, lines: int = 15) -> str:
    """The end of the server's log and where it is, for an error message."""
    try:
        with server.log.open(errors="replace") as log:
            before_stack = takewhile(lambda line: not line.startswith("goroutine "), log)  # SeaweedFS adds Go's stack
            tail = "".join(f"  | {line.rstrip()}\n" for line in deque(before_stack, lines))
    except OSError:
        tail = ""
    return f"the end of its log, {server.log}:\n{tail}" if tail else f"its log, {server.log}, is empty"


def members(group: int) -> dict[int, str]:
    """Number -> start time of each living process of a process group."""
    return _members_proc(group) if Path("/proc/self/stat").exists() else _members_ps(group)


def _members_proc(group: int) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # proc(5): after the name in parentheses come state, ppid, pgrp, ... and, 19 further, the start time.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found[int(process.name)] = fields[19]
    return found


def _members_ps(group: int) -> dict[int, str]:
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,pgid=,state=,lstart="],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = (line.split(maxsplit=3) for line in listing.stdout.splitlines())
    return {int(pid): moment for pid, pgid, state, moment in rows if int(pgid) == group and state[0] != "Z"}
