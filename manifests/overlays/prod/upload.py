"""Puts the dumps in a directory into the bucket of backups, under the time of today, and checks that they arrived."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import boto3


def upload(directory: Path, address: str, now: datetime) -> list[str]:
    """The keys under which `directory/*.dump` now lie below `address`, s3://bucket or s3://bucket/prefix.

    Exits with a sentence where there is nothing to put there, or what arrived is not as long as what was sent.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    folder = "/".join(part for part in (prefix.strip("/"), f"{now:%Y-%m-%dT%H%M%SZ}") if part)
    dumps = sorted(directory.glob("*.dump"))
    if not dumps or any(dump.stat().st_size == 0 for dump in dumps):
        sys.exit(f"there is no dump in {directory}, or an empty one: nothing is put into {address}")
    s3, keys = boto3.client("s3"), []
    for dump in dumps:
        key = f"{folder}/{dump.name}"
        s3.upload_file(str(dump), bucket, key)
        arrived = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
        if arrived != dump.stat().st_size:
            sys.exit(f"s3://{bucket}/{key} has {arrived} bytes, not {dump.stat().st_size}: this is no backup")
        keys.append(key)
    return keys


if __name__ == "__main__":
    for key in upload(Path(sys.argv[1]), os.environ["BACKUPS"], datetime.now(UTC)):
        sys.stdout.write(f"backed up: {key}\n")
