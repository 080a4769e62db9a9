"""Starting, finding and stopping the two services of a state directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeprune.errors import InputError, ServiceError
from moeprune.services import mlflow_server, weed
from moeprune.services.addresses import HOST, Services
from moeprune.services.ports import require_free
from moeprune.services.process import POLL_SECONDS, Launch, Server, last_words, start, stop
from moeprune.services.signals import deferred, raised
from moeprune.services.state import Record, Tenancy, locked, prepare

MLFLOW_PORT = 5000
S3_PORT = 8333
START_SECONDS = 120.0  # MLflow takes about 10 s on two cores, and longer where Python has yet to compile it


def up(state: Path, mlflow_port: int = MLFLOW_PORT, s3_port: int = S3_PORT) -> Services:
    """Have both services running until `down`; returns once both answer.

    What runs already is left as it is, on the port it has. Raises ServiceError if a port is taken or a server does not
    start, and InputError if a server is not installed; what this call started is stopped then.
    """
    state = prepare(state)
    with locked(state):
        return _start_missing(state, mlflow_port, s3_port, keep=True)


def down(state: Path) -> None:
    """Stop both services and all their processes; what they stored stays. Nothing happens where nothing runs."""
    state = state.absolute()
    if not state.is_dir():
        return
    with locked(state), deferred():
        _stop_all(state)


def running(state: Path) -> Services | None:
    """The services of this directory if both run and answer."""
    state = state.absolute()
    servers = Record.load(state).servers
    if not servers.keys() >= {"s3", "mlflow"} or not all(server.alive for server in servers.values()):
        return None
    services = _services(state, servers["mlflow"].port, servers["s3"].port)
    return services if not any(probe() for probe in _probes(services).values()) else None


@contextmanager
def session(state: Path, mlflow_port: int = MLFLOW_PORT, s3_port: int = S3_PORT) -> Iterator[Services]:
    """Both services for the length of a block.

    Those that `up` started, or another session is using, are used and left running. Otherwise they are stopped at the
    end, however it comes: an exception, Ctrl-C, SIGTERM or SIGHUP (these two raise SystemExit in the block).
    Raises as `up`.
    """
    state = prepare(state)
    with raised():
        with locked(state):
            tenancy = Tenancy(state)
        try:
            with locked(state):
                services = _start_missing(state, mlflow_port, s3_port, keep=False)
            yield services
        finally:
            with deferred(), locked(state):
                if tenancy.leave() and not Record.load(state).kept:
                    _stop_all(state)


def _services(state: Path, mlflow_port: int, s3_port: int) -> Services:
    access_key, secret_key = weed.key(state)
    return Services(f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{s3_port}", access_key, secret_key)


def _probes(services: Services) -> dict[str, Callable[[], str | None]]:
    return {"s3": weed.probe(services), "mlflow": mlflow_server.probe(services)}


def _start_missing(state: Path, mlflow_port: int, s3_port: int, keep: bool) -> Services:
    record = Record.load(state)
    ended = {name: server for name, server in record.servers.items() if not server.alive}
    stop(list(ended.values()))  # for the files that they left
    alive = {name: server for name, server in record.servers.items() if name not in ended}
    mlflow_port = alive["mlflow"].port if "mlflow" in alive else mlflow_port
    s3_port = alive["s3"].port if "s3" in alive else s3_port
    services = _services(state, mlflow_port, s3_port)

    if mlflow_port == s3_port:
        raise InputError(f"MLflow and S3 cannot share port {s3_port}: choose another with MLFLOW_PORT or S3_PORT")
    launches: dict[str, Launch] = {}
    if "s3" not in alive:
        require_free(s3_port, "the S3 server", "S3_PORT")
        launches["s3"] = weed.launch(state, s3_port, avoid=(mlflow_port, s3_port))
    if "mlflow" not in alive:
        require_free(mlflow_port, "the MLflow server", "MLFLOW_PORT")
        launches["mlflow"] = mlflow_server.launch(state, mlflow_port, services)

    # After a restart of the machine, say, nobody asks any more for those that `up` started.
    before = Record(kept=record.kept and bool(alive), servers=alive)
    record = Record(kept=before.kept or keep, servers=dict(alive))
    try:
        for name, launch in launches.items():
            with deferred():
                record.servers[name] = start(launch)
                record.save(state)
        for name, probe in _probes(services).items():
            _await_answer(record.servers[name], probe)
            record.servers[name] = record.servers[name].seen()
            record.save(state)
    except BaseException:
        with deferred():
            stop([record.servers[name] for name in launches if name in record.servers])
            before.save(state)
        raise
    return services


def _await_answer(server: Server, probe: Callable[[], str | None]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with deferred():  # what a signal raises amid an import, and a probe may import much, can get lost there
            problem = probe()
        if problem is None:
            return
        if not server.alive:
            raise ServiceError(f"the {server.name} server ended while it started; {last_words(server)}")
        if time.monotonic() > deadline:
            waited = f"does not answer after {START_SECONDS:.0f} s ({problem})"
            raise ServiceError(f"the {server.name} server {waited}; try `moeprune down` first; {last_words(server)}")
        time.sleep(POLL_SECONDS)


def _stop_all(state: Path) -> None:
    stop(list(Record.load(state).servers.values()))
    Record.remove(state)
