"""Checkpoints on S3: read by ranges of bytes, written shard by shard, with no more than two shards on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune import s3
from moeprune.atomic import refuse_without_room
from moeprune.checkpoint.byte_sources import write_all
from moeprune.checkpoint.files import INDEX_NAME
from moeprune.checkpoint.other_files import is_weights
from moeprune.checkpoint.shards import PlannedShard
from moeprune.checkpoint.targets import OpenTarget
from moeprune.errors import InputError, ServiceError

_JOB_KEY = "moeprune-job"  # in the metadata of every object that is put there
_CONFIG_NAME = "config.json"
_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 5


class S3Directory:
    """The objects right below an address. Its methods raise InputError and ServiceError as `s3` does."""

    parallel_reads = 8

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._bucket, self._key = s3.bucket_and_key(address)
        self._client = s3.client()

    @cached_property
    def _objects(self) -> dict[str, dict[str, Any]]:
        found = {item["Key"].removeprefix(f"{self._key}/"): item for item in s3.objects(self.address)}
        return {name: item for name, item in found.items() if "/" not in name}

    def sizes(self) -> dict[str, int]:
        return {name: item["Size"] for name, item in self._objects.items()}

    def version(self, name: str) -> str:
        return f"{self._objects[name]['Size']} {self._objects[name]['ETag']}"

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        place = 0
        for block in self._blocks(name, start, len(buffer)):
            buffer[place : place + len(block)] = block
            place += len(block)

    def copy_into(self, name: str, start: int, count: int, target: int, offset: int) -> None:
        for block in self._blocks(name, start, count):
            write_all(target, block, offset)
            offset += len(block)

    def download_other_files(self, directory: Path) -> None:
        """Bring everything here that is not weights."""
        with s3.speaking_plainly(self.address):
            for name in self._objects:
                if not is_weights(name):
                    self._client.download_file(self._bucket, f"{self._key}/{name}", str(directory / name))

    def _blocks(self, name: str, start: int, count: int) -> Iterator[bytes]:
        """A range of an object's bytes. Where the connection is lost on the way, it goes on from there."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        if start + count > self._objects[name]["Size"]:
            raise EOFError(f"{name} ends too early")
        stop, failures = start + count, 0
        with s3.speaking_plainly(f"{self.address}/{name}"):
            while start < stop:
                try:
                    for block in self._get(name, start, stop).iter_chunks(_BLOCK_BYTES):
                        yield block
                        start += len(block)
                # botocore itself repeats what fails before the answer begins.
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    failures += 1
                    if failures == _ATTEMPTS:
                        raise

    def _get(self, name: str, start: int, stop: int) -> Any:
        found = self._client.get_object(
            Bucket=self._bucket,
            Key=f"{self._key}/{name}",
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=self._objects[name]["ETag"],  # refused where the object was replaced meanwhile
        )
        return found["Body"]


class S3Target:
    """A checkpoint below an address. Its objects carry the name of the job, so that it can be continued; the config,
    by which a directory is known as a model, comes last.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._bucket, self._key = s3.bucket_and_key(address)

    def refuse_if_unusable(self) -> None:
        self._jobs_by_key(s3.client())

    @contextmanager
    def open(self, job: str) -> Iterator[OpenTarget]:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        client = s3.client()
        jobs = self._jobs_by_key(client)
        with s3.speaking_plainly(self.address):
            for key in [key for key, other in jobs.items() if other != job]:  # left by one that was given up
                client.delete_object(Bucket=self._bucket, Key=key)
        with (
            tempfile.TemporaryDirectory(prefix="moeprune-") as scratch,
            create_transfer_manager(client, TransferConfig()) as manager,
        ):
            opened = _OpenPrefix(Path(scratch), self.address, client, manager, job)
            yield opened
            opened.complete()

    def _jobs_by_key(self, client: Any) -> dict[str, str]:
        """Each object there -> the job that put it there. Raises InputError unless all are of unfinished jobs."""
        jobs: dict[str, str] = {}
        with s3.speaking_plainly(self.address):
            client.head_bucket(Bucket=self._bucket)
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._key}/")
            keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
            for key in [key for key in keys if not key.endswith("/")]:
                job = client.head_object(Bucket=self._bucket, Key=key)["Metadata"].get(_JOB_KEY)
                if job is None or key == f"{self._key}/{_CONFIG_NAME}":
                    raise InputError(
                        f"{self.address} exists already and is not empty; choose another place or remove it first"
                    )
                jobs[key] = job
        return jobs


class _OpenPrefix:
    """While one shard is on its way, the next is written."""

    def __init__(self, scratch: Path, address: str, client: Any, manager: Any, job: str) -> None:
        self.folder = scratch / "others"
        self.folder.mkdir()
        self.placed = 0
        self._scratch, self._address, self._client, self._manager = scratch, address, client, manager
        self._bucket, self._key = s3.bucket_and_key(address)
        self._job = job
        self._on_its_way: tuple[Path, Any] | None = None

    def has(self, shard: PlannedShard) -> bool:
        from botocore.exceptions import ClientError

        with s3.speaking_plainly(self._address):
            try:
                found = self._client.head_object(Bucket=self._bucket, Key=f"{self._key}/{shard.name}")
            except ClientError as error:
                if error.response["Error"]["Code"] in {"404", "NoSuchKey"}:
                    return False
                raise
        return bool(found["ContentLength"] == shard.file_bytes and found["Metadata"].get(_JOB_KEY) == self._job)

    def refuse_without_room(self, shards: list[PlannedShard]) -> None:
        refuse_without_room(self._scratch, sum(sorted(shard.file_bytes for shard in shards)[-2:]))

    @contextmanager
    def place_for(self, shard: PlannedShard) -> Iterator[Path]:
        path = self._scratch / shard.name
        yield path
        self._wait()
        self._on_its_way = path, self._send(path)

    def complete(self) -> None:
        """Wait for the shards, then put the small files there, the config last."""
        self._wait()
        for path in sorted(
            self.folder.iterdir(), key=lambda path: (path.name == _CONFIG_NAME, path.name == INDEX_NAME)
        ):
            with s3.speaking_plainly(self._address):
                self._send(path).result()

    def _send(self, path: Path) -> Any:
        return self._manager.upload(
            str(path), self._bucket, f"{self._key}/{path.name}", extra_args={"Metadata": {_JOB_KEY: self._job}}
        )

    def _wait(self) -> None:
        if not self._on_its_way:
            return
        path, sending = self._on_its_way
        self._on_its_way = None
        with s3.speaking_plainly(self._address):
            sending.result()
            found = self._client.head_object(Bucket=self._bucket, Key=f"{self._key}/{path.name}")
        if found["ContentLength"] != path.stat().st_size:
            raise ServiceError(f"{self._address}/{path.name} is not of the size that was sent; S3 cannot be relied on")
        path.unlink()
        self.placed += 1
