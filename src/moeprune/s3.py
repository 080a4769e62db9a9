"""S3 by boto3: objects are listed, brought here and put there, and what goes wrong is told in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeprune.errors import InputError, ServiceError, in_one_line


def client() -> Any:
    """boto3's client, with the credentials and the endpoint of the environment.

    Raises:
        InputError: boto3 is not installed.
        ServiceError: there are no credentials, or the endpoint is no address.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise InputError("s3:// addresses need boto3: pip install 'moeprune[s3]'") from error
    how = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a server of your own)"
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            raise ServiceError(f"no S3 credentials: {how}")
        # An unreachable endpoint is told in seconds, not after boto's default of minutes.
        return session.client(
            "s3",
            region_name=session.region_name or os.environ.get("AWS_REGION", "us-east-1"),
            config=Config(connect_timeout=5, retries={"total_max_attempts": 3, "mode": "standard"}),
        )
    except (BotoCoreError, ValueError) as error:
        raise ServiceError(f"S3 cannot be used: {in_one_line(error)}; {how}") from error


@contextmanager
def speaking_plainly(address: str) -> Iterator[None]:
    """Make an InputError or ServiceError of what boto3 raises in the block."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in {"404", "NoSuchKey", "NoSuchBucket"}:
            raise InputError(f"there is nothing at {address} ({code})") from error
        raise ServiceError(f"S3 refuses {address}: {in_one_line(error)}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise ServiceError(f"S3 cannot be used for {address}: {in_one_line(error)}") from error


def bucket_and_key(address: str) -> tuple[str, str]:
    """The parts of `s3://bucket/key`. Raises InputError where it is none."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    key = key.strip("/")
    if not bucket or not key:
        raise InputError(f"{address} is not of the form s3://bucket/key")
    return bucket, key


def refuse_if_taken(address: str) -> None:
    """Raise InputError where there are objects below an address, or not even a bucket."""
    bucket, key = bucket_and_key(address)
    s3 = client()
    with speaking_plainly(address):
        s3.head_bucket(Bucket=bucket)
        # Shards of another model that stayed between the new ones would be read with them.
        below = s3.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=2).get("Contents", [])
        if any(not item["Key"].endswith("/") for item in below):
            raise InputError(f"{address} exists already and is not empty; choose another place or remove it first")


def download(address: str, target: Path) -> Path:
    """Bring one object, or everything below a prefix, to `target`."""
    bucket, key = bucket_and_key(address)
    s3 = client()
    found = [item["Key"] for item in objects(address)]
    with speaking_plainly(address):
        for name in found:
            relative = name.removeprefix(key).lstrip("/")
            path = target / relative if relative else target
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, name, str(path))
    return target


def objects(address: str) -> list[dict[str, Any]]:
    """The object at an address, or those below it. Raises InputError where there is none."""
    wanted = objects_if_any(address)
    if not wanted:
        raise InputError(f"there is nothing at {address}")
    return wanted


def objects_if_any(address: str) -> list[dict[str, Any]]:
    """The object at an address, or those below it. Raises InputError where there is not even a bucket."""
    bucket, key = bucket_and_key(address)
    with speaking_plainly(address):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        present = [item for page in pages for item in page.get("Contents", [])]
    files = [item for item in present if not item["Key"].endswith("/")]  # consoles mark folders by such objects
    return [item for item in files if item["Key"] == key or item["Key"].startswith(key + "/")]


def remove(address: str) -> None:
    """Remove the object at an address, and those below it."""
    bucket, _ = bucket_and_key(address)
    found = objects_if_any(address)
    s3 = client()
    with speaking_plainly(address):
        for item in found:
            s3.delete_object(Bucket=bucket, Key=item["Key"])


def upload(path: Path, address: str) -> None:
    """Put a file at an address, or all files of a directory below it."""
    bucket, key = bucket_and_key(address)
    s3 = client()
    with speaking_plainly(address):
        if path.is_file():
            s3.upload_file(str(path), bucket, key)
            return
        files = sorted(file for file in path.rglob("*") if file.is_file())
        # The config goes last: what looks for it never finds a checkpoint whose weights are still on their way.
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            s3.upload_file(str(file), bucket, f"{key}/{file.relative_to(path).as_posix()}")
