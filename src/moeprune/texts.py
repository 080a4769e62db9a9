"""Text data as blocks of token ids: what calibration, distillation and evaluation read.

An argument names one source, or several with their weights (`sources`):

    notes.jsonl, corpus.parquet, book.txt      local files (JSONL and Parquet: one text field; plain text: one document)
    s3://bucket/key.jsonl                      the same on S3
    builtin://code, builtin://prose/held-out   the embedded example's texts
    owner/name                                 a data set on the Hugging Face hub, its train split

Text goes through the tokenizer in pieces of bounded size, and no further than the blocks that are wanted reach.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TextIO

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from moeprune.builtin import corpus
from moeprune.errors import InputError, ServiceError
from moeprune.places import is_remote, local_file
from moeprune.progress import note
from moeprune.sources import mixture_name, parse_sources, shares
from moeprune.statistics.stats import block_hash, data_fingerprint

SEQUENCES = ("packed", "documents")

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_PLAIN = {".txt", ".md", ".text"}
_PIECE_CHARACTERS = 1 << 17
_PIECES_AT_ONCE = 16  # a tokenizer works on several at the same time
# Between two words, which practically every tokenizer keeps apart: the space belongs to the word after it.
_SEAM = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")

Piece = tuple[str, bool]  # and whether it is the last of its document


@dataclass(frozen=True)
class Blocks:
    """Token ids in blocks of one length.

    Attributes:
        name: a short name of the data, for tables.
        address: where it came from.
        ids_BS: int64 token ids, `[blocks, tokens per block]`.
        fingerprint: of the blocks' contents, independent of their order and of padding.
        mask_BS: bool; False is padding, to the right of a block's tokens. None: there is none.
    """

    name: str
    address: str
    ids_BS: torch.Tensor
    fingerprint: str
    mask_BS: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Padding left out."""
        return self.ids_BS.numel() if self.mask_BS is None else int(self.mask_BS.sum())


def read_blocks(
    address: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    max_blocks: int,
    text_field: str = "text",
    sequences: str = "packed",
) -> Blocks:
    """Read documents as blocks of tokens.

    Args:
        address: see the module.
        block_tokens: length of a block.
        max_blocks: reading stops there. Several sources share them by their weights; one that has less than its share
            is told in a warning.
        text_field: the field of JSONL or Parquet that holds the text.
        sequences: `packed` joins the documents with the end-of-text token and cuts the stream into full blocks; what is
            over is left. `documents` begins a block with each document and pads its last one.

    Raises:
        InputError: nothing there, unreadable, without the field, or too short for a block.
        ServiceError: S3 or the hub cannot be reached.
    """
    check_sequences(sequences)
    if block_tokens < 2 or max_blocks < 1:
        raise InputError(
            f"blocks of {block_tokens} tokens, at most {max_blocks}: both must be positive, a block at least 2 tokens"
        )
    sources = parse_sources(address)
    rows: list[torch.Tensor] = []
    for source, share in zip(sources, shares(sources, max_blocks), strict=True):
        cut = _packed if sequences == "packed" else _by_document
        found = list(map(torch.tensor, islice(cut(source.address, tokenizer, block_tokens, text_field), share)))
        if len(found) < share and len(sources) > 1:
            note(
                f"{source.address} holds {len(found)} of the {share} blocks that are its share of the mixture, which "
                f"is {share - len(found)} smaller and has other proportions than were asked for"
            )
        rows += found
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_BS = torch.full((len(rows), block_tokens), padding, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids_BS[place, : len(row)] = row
        mask_BS[place, : len(row)] = True
    return Blocks(
        mixture_name(address),
        address,
        ids_BS,
        data_fingerprint([block_hash(ids_S[mask_S]) for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)]),
        None if mask_BS.all() else mask_BS,
    )


def read_documents(address: str, text_field: str = "text") -> Iterator[str]:
    """The documents whole, source by source, whatever the sources' weights. Raises as `read_blocks` does."""
    for source in parse_sources(address):
        pieces: list[str] = []
        for text, is_last in _pieces(source.address, text_field):
            pieces.append(text)
            if is_last:
                yield "".join(pieces)
                pieces = []


def check_sequences(kind: str) -> None:
    """Raises InputError for an unknown kind."""
    if kind not in SEQUENCES:
        raise InputError(f"unknown kind of sequences {kind!r}; known: {', '.join(SEQUENCES)}")


def _packed(source: str, tokenizer: PreTrainedTokenizerBase, block_tokens: int, text_field: str) -> Iterator[list[int]]:
    """Full blocks. Raises InputError where there is not one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    blocks = 0
    for encoding, is_last in _encoded(source, tokenizer, text_field):
        ids += encoding + (end if is_last else [])
        full = len(ids) // block_tokens
        yield from (ids[place * block_tokens : (place + 1) * block_tokens] for place in range(full))
        blocks += full
        ids = ids[full * block_tokens :]
    if blocks == 0:
        raise InputError(
            f"{source} holds {len(ids)} tokens, less than one block of {block_tokens}; give more text or shorter blocks"
        )


def _by_document(
    source: str, tokenizer: PreTrainedTokenizerBase, block_tokens: int, text_field: str
) -> Iterator[list[int]]:
    """Blocks of one document each, the last of a document shorter. Raises InputError where there is none."""
    start = _start_of_text(tokenizer)
    ids = list(start)
    blocks = 0
    for encoding, is_last in _encoded(source, tokenizer, text_field):
        ids += encoding
        full = len(ids) // block_tokens
        for place in range(full):
            yield ids[place * block_tokens : (place + 1) * block_tokens]
        ids = ids[full * block_tokens :]
        blocks += full
        if is_last:
            if ids and ids != start:
                yield ids
                blocks += 1
            ids = list(start)
    if blocks == 0:
        raise InputError(f"{source} holds no text")


def _start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text for its model, where that is one token (some models are lost without)."""
    around = tokenizer("")["input_ids"]
    return around[:1] if around[:1] == [tokenizer.bos_token_id] else []


def _encoded(source: str, tokenizer: PreTrainedTokenizerBase, text_field: str) -> Iterator[tuple[list[int], bool]]:
    """Token ids piece by piece, and whether a piece is the last of its document."""
    pieces = _pieces(source, text_field)
    while some := list(islice(pieces, _PIECES_AT_ONCE)):
        encodings = tokenizer([text for text, _ in some], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(encodings, (is_last for _, is_last in some), strict=True)


def _pieces(source: str, text_field: str) -> Iterator[Piece]:
    """The documents in pieces."""
    if source.startswith("builtin://"):
        domain, _, split = source.removeprefix("builtin://").partition("/")
        yield from _of_texts(corpus.documents(domain, split or "train"))
    elif is_remote(source) or Path(source).exists() or PurePosixPath(source).suffix in {*_FORMATS, *_PLAIN}:
        with local_file(source) as path:
            yield from _of_file(path, text_field)
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        yield from _of_texts(_hub_documents(source, text_field))
    else:
        raise InputError(f"there is no data at {source}")


def _of_file(path: Path, text_field: str) -> Iterator[Piece]:
    from datasets import load_dataset

    if path.suffix in _PLAIN:
        try:
            with path.open(encoding="utf-8") as file:
                yield from _in_pieces(file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not readable as UTF-8 text: {error}") from error
        return
    if path.suffix not in _FORMATS:
        raise InputError(f"{path} is of an unknown kind; known: {', '.join(sorted([*_FORMATS, *_PLAIN]))}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        rows = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        yield from _of_texts(_field(rows, text_field, str(path)))
    except InputError:
        raise
    except Exception as error:  # each reader behind `datasets` has exceptions of its own
        raise InputError(f"{path} cannot be read as {path.suffix[1:]}: {_reason(error.__cause__ or error)}") from error


def _of_texts(texts: Iterable[str]) -> Iterator[Piece]:
    for text in texts:
        yield from _in_pieces(io.StringIO(text, newline=""))


def _in_pieces(document: TextIO) -> Iterator[Piece]:
    """Pieces that a tokenizer takes without much memory."""
    text = document.read(_PIECE_CHARACTERS)
    while more := document.read(_PIECE_CHARACTERS):
        seam = _last_seam(text)
        yield text[:seam], False
        text = text[seam:] + more
    yield text, True


def _last_seam(text: str) -> int:
    """Where to cut a text so that its tokens stay what they are; its end, where there is no such place nearby."""
    near_end = max(0, len(text) - 10_000)
    return max((found.start() for found in _SEAM.finditer(text, near_end)), default=len(text))


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
