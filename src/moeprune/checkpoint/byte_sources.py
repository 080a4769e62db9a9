"""Where a checkpoint's bytes come from: a directory here, or anything else that can hand out ranges of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

_NOT_WITH_THESE_FILES = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_BUFFER_BYTES = 1 << 20


class ByteSource(Protocol):
    """Files that lie side by side and are read by ranges of bytes. Every method may be called from several threads.

    Attributes:
        address: where they lie, for messages.
        parallel_reads: how many ranges are best read at once.
    """

    @property
    def address(self) -> str: ...

    @property
    def parallel_reads(self) -> int: ...

    def sizes(self) -> dict[str, int]:
        """Name of each file -> its size in bytes."""

    def version(self, name: str) -> str:
        """A text that changes when the file does, made without reading it."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of a file from `start` on.

        Raises:
            EOFError: the file ends before.
        """

    def copy_into(self, name: str, start: int, count: int, target: int, offset: int) -> None:
        """Copy `count` bytes from `start` on into the file of the descriptor `target`, at `offset`.

        Raises:
            EOFError: the file ends before.
        """


class LocalDirectory:
    """The files of a directory on this machine."""

    parallel_reads = 1

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def address(self) -> str:
        return str(self._directory)

    def sizes(self) -> dict[str, int]:
        if not self._directory.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in self._directory.iterdir() if path.is_file()}

    def version(self, name: str) -> str:
        found = (self._directory / name).stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        with (self._directory / name).open("rb", buffering=0) as file:
            file.seek(start)
            while buffer:
                got = file.readinto(buffer)
                if not got:
                    raise EOFError(f"{name} ends too early")
                buffer = buffer[got:]

    def copy_into(self, name: str, start: int, count: int, target: int, offset: int) -> None:
        with (self._directory / name).open("rb", buffering=0) as file:
            done = _copy_in_kernel(file.fileno(), target, count, start, offset)
            while done < count:
                block = os.pread(file.fileno(), min(_BUFFER_BYTES, count - done), start + done)
                if not block:
                    raise EOFError(f"{name} ends too early")
                write_all(target, block, offset + done)
                done += len(block)


def _copy_in_kernel(source: int, target: int, count: int, start: int, offset: int) -> int:
    """Copy without bringing the bytes into this process, as far as system and file systems can; how far that was."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(source, target, count - done, start + done, offset + done)
            if not copied:  # the end of the file, or a file system that only says so
                break
            done += copied
    except OSError as error:
        if error.errno not in _NOT_WITH_THESE_FILES:
            raise
    return done


def write_all(target: int, block: bytes | memoryview, offset: int) -> None:
    """Write a block at an offset of the file of a descriptor, in as many calls as the system takes."""
    left = memoryview(block)
    while left:
        written = os.pwrite(target, left, offset)
        left, offset = left[written:], offset + written
