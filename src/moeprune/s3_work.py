"""Finished work of a job that is not done yet, on S3: whoever begins the job anew, on whatever machine, goes on."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from moeprune import s3
from moeprune.errors import MoepruneError
from moeprune.progress import note


class S3Work:
    """What is kept of one job.

    Args:
        address: below which it lies, the job's own.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def fetch(self, directory: Path) -> None:
        """Bring what is there.

        Raises:
            InputError: there is not even a bucket.
            ServiceError: S3 refuses or cannot be reached.
        """
        if s3.objects_if_any(self._address):
            s3.download(self._address, directory)

    def keep(self, directory: Path) -> None:
        """Put the files there that are not there yet; a file with the name of one that is there is taken for that.

        Raises:
            ServiceError: S3 refuses or cannot be reached.
        """
        there = {PurePosixPath(item["Key"]).name for item in s3.objects_if_any(self._address)}
        for path in sorted(directory.iterdir()):
            if path.is_file() and path.name not in there:
                s3.upload(path, f"{self._address}/{path.name}")

    def forget(self) -> None:
        """Remove all of it. The job is done: where that cannot be, it is only said."""
        try:
            s3.remove(self._address)
        except MoepruneError as error:
            note(f"what was kept on the way is still there: {error}")
