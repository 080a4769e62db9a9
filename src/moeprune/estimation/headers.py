"""A model's config and the headers of its weights, wherever it lies. No weight is read.

Here and on S3, headers are ranges of bytes that `checkpoint.files` reads in any case. On the hub they are so, too, but
moeprune otherwise brings a hub model here as a whole. A directory with a config and no weights is taken for what
transformers would save of that config: enough to plan with, for a model that is still to be made or to be downloaded.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from moeprune import places
from moeprune.checkpoint import safetensors_header
from moeprune.checkpoint.files import SINGLE_NAME
from moeprune.checkpoint.layout import build_without_weights
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.other_files import CARD_NAME, is_weights
from moeprune.checkpoint.safetensors_header import HeaderEntry
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.checkpoint.unsupported import quantisation
from moeprune.errors import InputError, ServiceError, in_one_line

CONFIG_NAME = "config.json"
_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SECONDS = 60


@dataclass(frozen=True)
class Described:
    """A model of which the headers are known.

    Attributes:
        checkpoint: to ask for its config, layout and the entries of its files, not for a tensor.
        elsewhere: bytes of the small files that lie beside its weights and were not brought here.
        is_stored: whether there are weights at all.
    """

    checkpoint: Checkpoint
    elsewhere: int = 0
    is_stored: bool = True


@contextmanager
def describe(address: str, trust_remote_code: bool = False) -> Iterator[Described]:
    """Find the headers of a model.

    Raises:
        InputError: there is no such model, or a config alone that does not say how the weights are stored.
        ServiceError: S3 or the hub refuses, or cannot be reached.
    """
    if places.is_on_hub(address):
        hub = HubHeaders(address)
        with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
            elsewhere = hub.bring_config(Path(scratch), code=trust_remote_code)
            yield Described(Checkpoint(Path(scratch), trust_remote_code, hub), elsewhere)
        return
    with places.streamed_model(address) as (directory, weights):
        checkpoint = Checkpoint(directory, trust_remote_code, weights)
        if _has_weights(checkpoint):
            yield Described(checkpoint)
        else:
            of_config = ConfigHeaders(checkpoint.config, str(directory))
            yield Described(Checkpoint(directory, trust_remote_code, of_config), is_stored=False)


def _has_weights(checkpoint: Checkpoint) -> bool:
    return any(is_weights(name) for name in checkpoint.files.source.sizes())


class _HeadersOnly:
    """What both sources below cannot do."""

    def version(self, name: str) -> str:
        raise io.UnsupportedOperation("only headers are known")

    def copy_into(self, name: str, start: int, count: int, target: int, offset: int) -> None:
        raise io.UnsupportedOperation("only headers are known")


class HubHeaders(_HeadersOnly):
    """The files of a model on the Hugging Face hub, by ranges of bytes.

    Raises:
        InputError: from any method: there is no such model.
        ServiceError: the hub refuses, or cannot be reached.
    """

    parallel_reads = 8

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.address = repository
        self._hub = HfApi()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        try:
            found = self._hub.model_info(self.address, files_metadata=True, timeout=_SECONDS).siblings or []
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise InputError(f"there is no directory {self.address} here and no such model on the hub") from error
        except Exception as error:  # what the hub's client raises depends on what it is built on
            raise self._refused(error) from error
        return {file.rfilename: file.size or 0 for file in found if "/" not in file.rfilename}

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self._get(name, start, len(buffer))

    def bring_config(self, directory: Path, *, code: bool) -> int:
        """Write the config, and modelling code if that may run, into a directory; how many bytes the other small files
        have that `surgery` would carry over.
        """
        sizes = {name: size for name, size in self._sizes.items() if not is_weights(name) and name != CARD_NAME}
        if CONFIG_NAME not in sizes:
            raise InputError(f"{self.address} on the hub is no model of transformers: it has no {CONFIG_NAME}")
        wanted = [name for name in sizes if name == CONFIG_NAME or (code and name.endswith(".py"))]
        for name in wanted:
            (directory / name).write_bytes(self._get(name, 0, sizes[name]))
        return sum(size for name, size in sizes.items() if name not in wanted)

    def _get(self, name: str, start: int, count: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}"}
        try:
            answer = get_session().get(hf_hub_url(self.address, name), headers=headers, timeout=_SECONDS)
            hf_raise_for_status(answer)
        except Exception as error:
            raise self._refused(error) from error
        if len(answer.content) != count:
            raise EOFError(f"the hub gave {len(answer.content)} bytes of {name} for {count}")
        return answer.content

    def _refused(self, error: Exception) -> ServiceError:
        return ServiceError(
            f"{self.address} is no local directory, and the Hugging Face hub cannot be reached for its headers: "
            f"{in_one_line(error)[:300]}"
        )


class ConfigHeaders(_HeadersOnly):
    """The headers that transformers would write for a config.

    Raises:
        InputError: the weights would be quantised; how they are stored is then known from their headers alone.
    """

    parallel_reads = 1

    def __init__(self, config: PretrainedConfig, address: str) -> None:
        self.address = address
        if method := quantisation(config):
            raise InputError(
                f"{address} has a config and no weights, and the config says that they are quantised as {method}: only "
                "their headers tell how many bytes that is; give the address of the weights (a hub id will do)"
            )
        dtype = config.dtype if config.dtype in _STORED_AS else torch.float32
        model = build_without_weights(config, dtype=dtype)
        tied = getattr(model, "all_tied_weights_keys", {})
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        entries, end = {}, 0
        for name, tensor in stored_ways(model, own)[0].items():
            entries[name] = HeaderEntry(_stored_as(tensor.dtype), tuple(tensor.shape), end, end + tensor.nbytes)
            end += tensor.nbytes
        self._header = safetensors_header.build(entries)
        self._size = len(self._header) + end

    def sizes(self) -> dict[str, int]:
        return {SINGLE_NAME: self._size}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self._header[start : start + len(buffer)]


def _stored_as(dtype: torch.dtype) -> str:
    return _STORED_AS.get(dtype) or {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}[dtype]
