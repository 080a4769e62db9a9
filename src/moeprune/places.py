"""Where things live, behind one small door: a local path, `s3://bucket/key`, `builtin://name`, or a Hugging Face hub
id.

A step asks for a local path of whatever address the user gave, and hands a finished local thing over to be put at an
address.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from moeprune import s3
from moeprune.atomic import continue_beside, refuse_unwritable
from moeprune.checkpoint.byte_sources import ByteSource
from moeprune.checkpoint.targets import LocalTarget, Target
from moeprune.errors import InputError, ServiceError, in_one_line
from moeprune.s3_checkpoints import S3Directory, S3Target

REFERENCE_MODEL = "builtin://reference"
_BUILTIN_MODEL = Path(__file__).parent / "builtin" / "model"
_ORIGIN = ".moeprune-brought-from"  # a file beside a model that was brought, with the address


def is_remote(address: str) -> bool:
    return address.startswith("s3://")


def is_on_hub(address: str) -> bool:
    """Whether a model's address is a hub id: of its form, and nothing here is called so."""
    if "://" in address or Path(address).exists():
        return False
    return not address.startswith((".", "/", "~")) and address.count("/") == 1


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
            yield s3.download(address, Path(scratch) / PurePosixPath(address).name)
    elif Path(address).is_dir():
        yield Path(address)
    elif is_on_hub(address):
        yield Path(_hub_snapshot(address))
    else:
        raise InputError(
            f"the model {address} is not a directory, an s3:// address, {REFERENCE_MODEL} or a hub id (owner/name)"
        )


@contextmanager
def streamed_model(address: str) -> Iterator[tuple[Path, ByteSource | None]]:
    """A local directory with all files of a model but its weights, and where those are, None for there as well.

    Weights on S3 stay there, to be read by ranges. Raises as `local_model` does.
    """
    if is_remote(address):
        with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
            weights = S3Directory(address)
            weights.download_other_files(Path(scratch))
            yield Path(scratch), weights
    else:
        with local_model(address) as directory:
            yield directory, None


@contextmanager
def local_file(address: str) -> Iterator[Path]:
    """One file, brought here if it lies on S3. Raises as `local_model` does."""
    if is_remote(address):
        with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
            yield s3.download(address, Path(scratch) / PurePosixPath(address).name)
    elif Path(address).is_file():
        yield Path(address)
    else:
        raise InputError(f"there is no file {address}")


def brought(address: str, workspace: Path) -> str:
    """Bring a model from S3 or the hub to below a directory, if this version of it is not there yet.

    Whoever is killed at it leaves nothing that the next one takes for the model, and no room taken. Whatever an id of
    the hub stands for is one version.

    Returns:
        The directory that it is in now; the address itself, of a model that needs no bringing.

    Raises:
        InputError: as `local_model`; or another process is at it.
        ServiceError: as `local_model`.
    """
    if not (is_remote(address) or is_on_hub(address)):
        with local_model(address):
            return address
    job = hashlib.sha256(version(address).encode()).hexdigest()[:16]
    now = workspace / "models" / job
    model = now / PurePosixPath(address).name
    if not now.exists():
        with continue_beside(now, job) as beside:
            shutil.rmtree(beside / model.name, ignore_errors=True)
            (beside / _ORIGIN).write_text(address, encoding="utf-8")
            if is_remote(address):
                s3.download(address, beside / model.name)
            else:
                _hub_snapshot(address, beside / model.name)
    return str(model)


def origin(address: str) -> str:
    """The address of a model, of one that was `brought` that which it was brought from."""
    said = Path(address).parent / _ORIGIN
    return said.read_text(encoding="utf-8") if said.is_file() else address


def version(address: str) -> str:
    """A text that changes when what lies at the address of a model or text does. It is made without reading that; for
    the hub it is the address itself.

    Raises:
        InputError: nothing is there on S3.
        ServiceError: S3 refuses, or cannot be reached.
    """
    if is_remote(address):
        return f"{address} {[(item['Key'], item['ETag']) for item in s3.objects(address)]}"
    path = _BUILTIN_MODEL if address == REFERENCE_MODEL else Path(address)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    sizes = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{address} {sizes}"


def checkpoint_target(address: str) -> Target:
    """A place for a checkpoint that is written shard by shard, and can be continued after an interruption."""
    return S3Target(address) if is_remote(address) else LocalTarget(Path(address))


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
    s3.refuse_if_taken(address)
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        path = Path(scratch) / PurePosixPath(address).name
        yield path
        s3.upload(path, address)


def _hub_snapshot(repository: str, to: Path | None = None) -> str:
    """Raises InputError or ServiceError, as `local_model`. Without `to`, the hub's client keeps it where it does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        # Weights in other formats would double the download.
        ignored = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "original/*"]
        return str(snapshot_download(repository, ignore_patterns=ignored, local_dir=to))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"there is no directory {repository} here and no such model on the hub") from error
    except Exception as error:  # what the hub's client raises depends on what it is built on
        raise ServiceError(
            f"{repository} is no local directory, and the Hugging Face hub cannot be reached for it: "
            f"{in_one_line(error)[:300]}"
        ) from error
