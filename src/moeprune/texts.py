"""Text data as blocks of token ids: what calibration, distillation and evaluation read.

An address names one source, or several separated by commas, each of which then gives an equal share of the blocks:

    notes.jsonl, corpus.parquet, book.txt      local files (JSONL and Parquet: one text field; plain text: one document)
    s3://bucket/key.jsonl                      the same on S3
    builtin://code, builtin://prose/held-out   the embedded example's texts
    owner/name                                 a data set on the Hugging Face hub, its train split
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from moeprune.builtin import corpus
from moeprune.errors import InputError, ServiceError
from moeprune.places import is_remote, local_file
from moeprune.statistics.stats import block_hash, data_fingerprint

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_PLAIN = {".txt", ".md", ".text"}


@dataclass(frozen=True)
class Blocks:
    """Token ids packed into blocks of one length, no padding.

    Attributes:
        name: a short name of the data, for tables.
        address: where it came from.
        ids_BS: int64 token ids, `[blocks, tokens per block]`.
        fingerprint: of the blocks' contents, independent of their order.
    """

    name: str
    address: str
    ids_BS: torch.Tensor
    fingerprint: str

    @property
    def tokens(self) -> int:
        return self.ids_BS.numel()


def read_blocks(
    address: str, tokenizer: PreTrainedTokenizerBase, *, block_tokens: int, max_blocks: int, text_field: str = "text"
) -> Blocks:
    """Read documents, join them with the end-of-text token, and cut the stream into blocks; what is over is left.

    Args:
        address: see the module.
        block_tokens: length of a block.
        max_blocks: reading stops there.
        text_field: the field of JSONL or Parquet that holds the text.

    Raises:
        InputError: nothing there, unreadable, without the field, or too short for a block.
        ServiceError: S3 or the hub cannot be reached.
    """
    if block_tokens < 2 or max_blocks < 1:
        raise InputError(
            f"blocks of {block_tokens} tokens, at most {max_blocks}: both must be positive, a block at least 2 tokens"
        )
    sources = [source.strip() for source in address.split(",") if source.strip()]
    if not sources:
        raise InputError("no data was named")
    if len(sources) > max_blocks:
        raise InputError(f"{len(sources)} sources cannot share {max_blocks} blocks")
    shares = [max_blocks // len(sources) + (place < max_blocks % len(sources)) for place in range(len(sources))]
    ids_BS = torch.cat(
        [
            _pack(source, tokenizer, block_tokens, share, text_field)
            for source, share in zip(sources, shares, strict=True)
        ]
    )
    fingerprint = data_fingerprint([block_hash(block) for block in ids_BS])
    return Blocks("+".join(short_name(source) for source in sources), address, ids_BS, fingerprint)


def short_name(address: str) -> str:
    """What a table calls a source: the built-in domain, the file's bare name, or the last part of the hub id."""
    if address.startswith("builtin://"):
        return address.removeprefix("builtin://").split("/")[0]
    return PurePosixPath(address).name.split(".")[0]


def _pack(
    source: str, tokenizer: PreTrainedTokenizerBase, block_tokens: int, max_blocks: int, text_field: str
) -> torch.Tensor:
    end = tokenizer.eos_token_id
    ids: list[int] = []
    documents = _documents(source, text_field)
    while some := list(islice(documents, 16)):
        for encoding in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += encoding
            if end is not None:
                ids.append(end)
        if len(ids) >= max_blocks * block_tokens:
            break
    blocks = min(len(ids) // block_tokens, max_blocks)
    if blocks == 0:
        raise InputError(
            f"{source} holds {len(ids)} tokens, less than one block of {block_tokens}; give more text or shorter blocks"
        )
    return torch.tensor(ids[: blocks * block_tokens], dtype=torch.int64).view(blocks, block_tokens)


def _documents(source: str, text_field: str) -> Iterator[str]:
    if source.startswith("builtin://"):
        domain, _, split = source.removeprefix("builtin://").partition("/")
        yield from corpus.documents(domain, split or "train")
    elif is_remote(source) or Path(source).exists() or PurePosixPath(source).suffix in {*_FORMATS, *_PLAIN}:
        with local_file(source) as path:
            yield from _file_documents(path, text_field)
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        yield from _hub_documents(source, text_field)
    else:
        raise InputError(f"there is no data at {source}")


def _file_documents(path: Path, text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    if path.suffix in _PLAIN:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not readable as UTF-8 text: {error}") from error
        return
    if path.suffix not in _FORMATS:
        raise InputError(f"{path} is of an unknown kind; known: {', '.join(sorted([*_FORMATS, *_PLAIN]))}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        rows = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        yield from _field(rows, text_field, str(path))
    except InputError:
        raise
    except Exception as error:  # each reader behind `datasets` has exceptions of its own
        raise InputError(f"{path} cannot be read as {path.suffix[1:]}: {_reason(error.__cause__ or error)}") from error


def _hub_documents(repository: str, text_field: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            # A hub that is not there is told at once, and not after the many tries of the next line.
            HfApi().dataset_info(repository, timeout=10)
        rows = load_dataset(repository, split="train", streaming=True)
        first = list(islice(rows, 1))
    except (DatasetNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"there is no file {repository} here and no such data set on the hub") from error
    except Exception as error:  # what the hub's client raises depends on what it is built on
        raise ServiceError(
            f"{repository} is no local file, and the hub's data set of that name cannot be read: {_reason(error)}"
        ) from error
    if first:
        yield from _field(rows, text_field, repository)


def _field(rows: Iterator[dict], text_field: str, source: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise InputError(
                f"{source} has no text in the field {text_field!r} of row {number}; its fields: "
                + ", ".join(map(repr, row))
            )
        yield text


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
