"""Checkpoints are cut from and to a real S3 server, without the room for a model on this machine."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from moeprune import places, s3_checkpoints
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply, cut
from moeprune.errors import InputError, ServiceError
from moeprune.plan import Plan
from moeprune.s3_checkpoints import S3Directory
from moeprune.services import BUCKET, Services

SHARD_BYTES = 40_000
KEEP = [1, 4]


@pytest.fixture
def there(request: pytest.FixtureRequest) -> str:
    """A key of this test's own."""
    return "checkpoints/" + re.sub(r"\W+", "-", request.node.name)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("s3") / "model", tiny.FAMILIES["qwen2_moe"](), shard="100KB")


@pytest.fixture
def remote(client: Any, there: str, local: Path) -> str:
    """The same on S3."""
    with places.output(f"s3://{BUCKET}/{there}/model") as path:
        path.symlink_to(local)
    return f"s3://{BUCKET}/{there}/model"


@pytest.fixture
def expected(local: Path, tmp_path: Path) -> dict[str, bytes]:
    """What comes of it on this machine."""
    source = Checkpoint(local)
    return contents(apply(source, plan_for(source), tmp_path / "expected", shard_bytes=SHARD_BYTES).directory)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything temporary goes."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def plan_for(source: Checkpoint) -> Plan:
    return tiny.plan_for(list(source.layout.layers), [KEEP] * 3, source.fingerprint)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def objects(client: Any, address: str) -> dict[str, bytes]:
    """Everything below an address, by name."""
    prefix = address.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def jobs(client: Any, address: str) -> set[str]:
    """Which jobs put there what lies below an address."""
    key = address.removeprefix(f"s3://{BUCKET}/")
    heads = [client.head_object(Bucket=BUCKET, Key=f"{key}/{name}") for name in objects(client, address)]
    return {head["Metadata"]["moeprune-job"] for head in heads}


def run(
    model: str, out: str, on_tensor: Callable[[int, int], None] = lambda done, total: None, keep: list[int] = KEEP
) -> list[str]:
    """Cut a model; what was said."""
    said: list[str] = []
    with places.streamed_model(model) as (directory, weights):
        source = Checkpoint(directory, weights=weights)
        plan = tiny.plan_for(list(source.layout.layers), [keep] * 3, source.fingerprint)
        target = places.checkpoint_target(out)
        try:
            cut(source, plan, target, shard_bytes=SHARD_BYTES, on_tensor=on_tensor, say=said.append)
        except KeyboardInterrupt:
            said.append("interrupted")
    return said


def interrupt_after(share: float) -> Callable[[int, int], None]:
    def interrupt(done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    return interrupt


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that are put there, in their order."""
    names: list[str] = []
    real = s3_checkpoints._OpenPrefix._send

    def noting(self: Any, path: Path) -> Any:
        names.append(path.name)
        return real(self, path)

    monkeypatch.setattr(s3_checkpoints._OpenPrefix, "_send", noting)
    return names


def test_from_there_to_there_with_two_shards_on_this_machine(
    client: Any, remote: str, local: Path, expected: dict[str, bytes], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, int]] = []
    real = S3Directory._get

    def noting(self: S3Directory, name: str, start: int, stop: int) -> Any:
        fetched.append((name, stop - start))
        return real(self, name, start, stop)

    monkeypatch.setattr(S3Directory, "_get", noting)
    most = 0

    def on_tensor(done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in scratch.rglob("*.safetensors")))

    assert run(remote, f"{remote}-pruned", on_tensor) == []
    assert objects(client, f"{remote}-pruned") == expected
    shards = {name: len(raw) for name, raw in expected.items() if name.endswith(".safetensors")}
    assert len(shards) > 4
    assert max(shards.values()) < most <= sum(sorted(shards.values())[-2:])
    assert not list(scratch.iterdir())
    # Nor are bytes fetched that are not needed: each kept one once, the headers, and the routers for the fingerprint.
    kept = sum(size for name, size in fetched if name.endswith(".safetensors"))
    stored = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    assert sum(shards.values()) < kept < sum(shards.values()) + 0.2 * stored


def test_from_there_to_here_and_from_here_to_there(
    client: Any, remote: str, local: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    run(remote, str(tmp_path / "here"))
    assert contents(tmp_path / "here") == expected
    run(str(local), f"{remote}-pruned")
    assert objects(client, f"{remote}-pruned") == expected


def test_what_makes_it_a_model_comes_last(remote: str, sent: list[str]) -> None:
    run(remote, f"{remote}-pruned")
    assert sent[-2:] == ["model.safetensors.index.json", "config.json"]
    assert all(name.endswith(".safetensors") for name in sent[:4])


def test_interrupted_it_goes_on(client: Any, remote: str, expected: dict[str, bytes], sent: list[str]) -> None:
    out = f"{remote}-pruned"
    stopped, interrupted = run(remote, out, interrupt_after(0.6))
    total = sum(name.endswith(".safetensors") for name in expected)
    kept = objects(client, out)
    told = re.fullmatch(r"stopped: (\d+) of (\d+) shards are kept, .*", stopped)
    assert interrupted == "interrupted"
    assert told
    assert 1 < int(told[1]) <= len(kept) < total == int(told[2])
    assert "config.json" not in kept
    sent.clear()
    assert run(remote, out) == [f"continuing: {len(kept)} of {total} shards are there"]
    assert objects(client, out) == expected
    assert not kept.keys() & set(sent)
    with pytest.raises(InputError, match="exists already"):
        run(remote, out)


def test_another_job_leaves_nothing_of_the_first(client: Any, remote: str) -> None:
    out = f"{remote}-pruned"
    run(remote, out, interrupt_after(0.6))
    first, job = objects(client, out), jobs(client, out)
    assert run(remote, out, interrupt_after(0.3), keep=[0, 1])[-1] == "interrupted"
    second = objects(client, out)
    assert second.keys() < first.keys()
    assert len(job) == len(jobs(client, out)) == 1
    assert job != jobs(client, out)


@pytest.mark.parametrize("name", ["model-00001-of-00009.safetensors", "config.json", "deeper/notes.txt"])
def test_what_others_put_there_is_not_touched(client: Any, remote: str, name: str) -> None:
    out = f"{remote}-pruned"
    key = out.removeprefix(f"s3://{BUCKET}/")
    client.put_object(Bucket=BUCKET, Key=f"{key}/{name}", Body=b"mine")
    with pytest.raises(InputError, match="exists already"):
        run(remote, out, lambda done, total: pytest.fail("work was begun"))
    assert objects(client, out) == {name: b"mine"}


def test_a_bucket_that_is_not_there_is_told_before_any_work(local: Path, connected: Services) -> None:
    with pytest.raises(InputError, match="there is nothing at s3://no-such-bucket"):
        run(str(local), "s3://no-such-bucket/out", lambda done, total: pytest.fail("work was begun"))


def test_no_room_for_two_shards(
    client: Any, local: Path, there: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(sorted(len(raw) for name, raw in expected.items() if name.endswith(".safetensors"))[-2:])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match="of free space"):
        run(str(local), f"s3://{BUCKET}/{there}", lambda done, total: pytest.fail("work was begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert run(str(local), f"s3://{BUCKET}/{there}", interrupt_after(0))[-1] == "interrupted"


class BrokenBody:
    """An answer whose connection is lost after its first bytes."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def iter_chunks(self, size: int) -> Iterator[bytes]:
        from botocore.exceptions import ResponseStreamingError

        yield from [self.body.read(7)]
        raise ResponseStreamingError(error="connection lost")


@pytest.mark.parametrize("lost", [2, 1000])
def test_a_lost_connection(
    remote: str, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    real, count = S3Directory._get, 0

    def breaking(self: S3Directory, name: str, start: int, stop: int) -> Any:
        nonlocal count
        count += 1
        return BrokenBody(real(self, name, start, stop)) if count <= lost else real(self, name, start, stop)

    monkeypatch.setattr(S3Directory, "_get", breaking)
    if lost == 2:
        run(remote, str(tmp_path / "here"))
        assert contents(tmp_path / "here") == expected
    else:
        with pytest.raises(ServiceError, match="connection lost"):
            run(remote, str(tmp_path / "here"))
        assert not (tmp_path / "here").exists()


def test_a_source_that_is_replaced_meanwhile(client: Any, remote: str, tmp_path: Path) -> None:
    def replace(done: int, total: int) -> None:
        for name, raw in objects(client, remote).items():
            if name.endswith(".safetensors"):
                key = f"{remote.removeprefix(f's3://{BUCKET}/')}/{name}"
                client.put_object(Bucket=BUCKET, Key=key, Body=raw[:-4] + b"else")

    with pytest.raises(ServiceError, match=r"model-0000\d-of"):
        run(remote, str(tmp_path / "here"), replace)
    assert not (tmp_path / "here").exists()


def test_a_damaged_shard_is_named(client: Any, remote: str, tmp_path: Path) -> None:
    name = next(name for name in objects(client, remote) if name.startswith("model-00002"))
    key = f"{remote.removeprefix(f's3://{BUCKET}/')}/{name}"
    raw = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=raw[:-1])
    with pytest.raises(InputError, match=f"{remote}/{name} is missing or damaged"):
        run(remote, str(tmp_path / "here"))
    assert not (tmp_path / "here").exists()


def test_bytes_are_those_of_the_object(remote: str, local: Path) -> None:
    source = S3Directory(remote)
    name = next(path.name for path in local.glob("*.safetensors"))
    whole = (local / name).read_bytes()
    assert source.sizes() == {path.name: path.stat().st_size for path in local.iterdir()}
    for start, stop in ((0, 0), (0, 8), (5, len(whole)), (len(whole), len(whole))):
        buffer = bytearray(stop - start)
        source.read_into(name, start, memoryview(buffer))
        assert buffer == whole[start:stop]
    with pytest.raises(EOFError):
        source.read_into(name, 1, memoryview(bytearray(len(whole))))
