"""Where things live, behind one small door: a local path, `s3://bucket/key`, `builtin://name`, or a Hugging Face hub
id.

A step asks for a local path of whatever address the user gave, and hands a finished local thing over to be put at an
address.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from moeprune.atomic import refuse_unwritable
from moeprune.errors import InputError, ServiceError

REFERENCE_MODEL = "builtin://reference"
_BUILTIN_MODEL = Path(__file__).parent / "builtin" / "model"


def is_remote(address: str) -> bool:
    return address.startswith("s3://")


@contextmanager
def local_model(address: str) -> Iterator[Path]:
    """The directory of a model, brought here if it lies elsewhere.

    Raises:
        InputError: nothing is there.
        ServiceError: S3 or the hub refuses, or cannot be reached.
    """
    if address.startswith("builtin://"):
        if address != REFERENCE_MODEL:
            raise InputError(f"there is no built-in model {address}; the only one is {REFERENCE_MODEL}")
        yield _BUILTIN_MODEL
    elif is_remote(address):
        with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
            yield _download(address, Path(scratch) / PurePosixPath(address).name)
    elif Path(address).is_dir():
        yield Path(address)
    elif Path(address).exists() or address.startswith((".", "/", "~")) or address.count("/") != 1:
        raise InputError(
            f"the model {address} is not a directory, an s3:// address, {REFERENCE_MODEL} or a hub id (owner/name)"
        )
    else:
        yield _hub_snapshot(address)


@contextmanager
def local_file(address: str) -> Iterator[Path]:
    """One file, brought here if it lies on S3. Raises as `local_model` does."""
    if is_remote(address):
        with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
            yield _download(address, Path(scratch) / PurePosixPath(address).name)
    elif Path(address).is_file():
        yield Path(address)
    else:
        raise InputError(f"there is no file {address}")


def version(address: str) -> str:
    """A text that changes when what lies at the address of a model or text does. It is made without reading that; for
    the hub it is the address itself.

    Raises:
        InputError: nothing is there on S3.
        ServiceError: S3 refuses, or cannot be reached.
    """
    if is_remote(address):
        return f"{address} {[(item['Key'], item['ETag']) for item in _objects(address)]}"
    path = _BUILTIN_MODEL if address == REFERENCE_MODEL else Path(address)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    sizes = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{address} {sizes}"


@contextmanager
def output(address: str) -> Iterator[Path]:
    """Yield a local path to write a file or directory at; it is at `address` after the block, unless the block raised.

    Raises:
        InputError: nothing can be written there: the local directory does not let us, the bucket does not exist, or
            there are objects below the address. All checks come before the block spends any time.
        ServiceError: S3 refuses or cannot be reached; likewise.
    """
    if not is_remote(address):
        refuse_unwritable(Path(address))
        yield Path(address)
        return
    _check_output(address)
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        path = Path(scratch) / PurePosixPath(address).name
        yield path
        _upload(path, address)


def _s3() -> Any:
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
        raise ServiceError(f"S3 cannot be used: {_in_one_line(error)}; {how}") from error


@contextmanager
def _speaking_plainly(address: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in {"404", "NoSuchKey", "NoSuchBucket"}:
            raise InputError(f"there is nothing at {address} ({code})") from error
        raise ServiceError(f"S3 refuses {address}: {_in_one_line(error)}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise ServiceError(f"S3 cannot be used for {address}: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _bucket_and_key(address: str) -> tuple[str, str]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    key = key.strip("/")
    if not bucket or not key:
        raise InputError(f"{address} is not of the form s3://bucket/key")
    return bucket, key


def _check_output(address: str) -> None:
    bucket, key = _bucket_and_key(address)
    client = _s3()
    with _speaking_plainly(address):
        client.head_bucket(Bucket=bucket)
        # Shards of another model that stayed between the new ones would be read with them.
        below = client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=2).get("Contents", [])
        if any(not item["Key"].endswith("/") for item in below):
            raise InputError(f"{address} exists already and is not empty; choose another place or remove it first")


def _download(address: str, target: Path) -> Path:
    """Bring one object, or everything below a prefix, to `target`."""
    bucket, key = _bucket_and_key(address)
    client = _s3()
    found = [item["Key"] for item in _objects(address)]
    with _speaking_plainly(address):
        for name in found:
            relative = name.removeprefix(key).lstrip("/")
            path = target / relative if relative else target
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, name, str(path))
    return target


def _objects(address: str) -> list[dict[str, Any]]:
    """The object at an address, or those below it. Raises InputError where there is none."""
    bucket, key = _bucket_and_key(address)
    with _speaking_plainly(address):
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        present = [item for page in pages for item in page.get("Contents", [])]
        files = [item for item in present if not item["Key"].endswith("/")]  # consoles mark folders by such objects
        wanted = [item for item in files if item["Key"] == key or item["Key"].startswith(key + "/")]
        if not wanted:
            raise InputError(f"there is nothing at {address}")
        return wanted


def _upload(path: Path, address: str) -> None:
    bucket, key = _bucket_and_key(address)
    client = _s3()
    with _speaking_plainly(address):
        if path.is_file():
            client.upload_file(str(path), bucket, key)
            return
        files = sorted(file for file in path.rglob("*") if file.is_file())
        # The config goes last: what looks for it never finds a checkpoint whose weights are still on their way.
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            client.upload_file(str(file), bucket, f"{key}/{file.relative_to(path).as_posix()}")


def _hub_snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        # Weights in other formats would double the download.
        ignored = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "original/*"]
        return Path(snapshot_download(repository, ignore_patterns=ignored))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"there is no directory {repository} here and no such model on the hub") from error
    except Exception as error:  # what the hub's client raises depends on what it is built on
        raise ServiceError(
            f"{repository} is no local directory, and the Hugging Face hub cannot be reached for it: "
            f"{_in_one_line(error)[:300]}"
        ) from error
