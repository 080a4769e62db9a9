"""Text data in every form becomes blocks of the right tokens; what is no text is told in a sentence."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moeprune import texts
from moeprune.builtin import corpus
from moeprune.errors import InputError
from moeprune.sources import Source, format_sources, parse_sources, shares, short_name
from moeprune.texts import Blocks, read_blocks

DOCUMENTS = tiny.sentences(2, 40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[int]:
    """All tokens in a row, an end-of-text after each document."""
    return [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def write(path: Path, documents: list[str], field: str = "text") -> Path:
    match path.suffix:
        case ".jsonl":
            tiny.write_jsonl(path, documents, field)
        case ".json":
            path.write_text(json.dumps([{field: text} for text in documents]))
        case ".parquet":
            pq.write_table(pa.table({"id": list(range(len(documents))), field: documents}), path)
        case _:
            path.write_text("\n".join(documents), encoding="utf-8")
    return path


def read(
    path: Path | str, tokenizer: PreTrainedTokenizerFast, block: int = 16, limit: int = 1000, **options: Any
) -> Blocks:
    return read_blocks(str(path), tokenizer, block_tokens=block, max_blocks=limit, **options)


@pytest.mark.parametrize("name", ["some.jsonl", "some.json", "some.parquet"])
def test_every_document_is_read_in_order(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    blocks = read(write(tmp_path / name, DOCUMENTS), tokenizer)
    expected = stream(tokenizer, DOCUMENTS)
    assert blocks.ids_BS.dtype == torch.int64
    assert blocks.ids_BS.shape == (len(expected) // 16, 16)
    assert blocks.ids_BS.flatten().tolist() == expected[: blocks.tokens]
    assert (blocks.name, blocks.address) == ("some", str(tmp_path / name))


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
def test_plain_text_is_one_document(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = [*DOCUMENTS, "schön, 你好"]
    blocks = read(write(tmp_path / name, documents), tokenizer)
    assert blocks.ids_BS.flatten().tolist() == stream(tokenizer, ["\n".join(documents)])[: blocks.tokens]


@pytest.mark.parametrize("name", ["some.jsonl", "some.parquet"])
def test_another_field_can_be_chosen(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / name, DOCUMENTS, field="body")
    blocks = read(path, tokenizer, text_field="body")
    assert blocks.ids_BS.flatten().tolist() == stream(tokenizer, DOCUMENTS)[: blocks.tokens]
    with pytest.raises(InputError, match=r"no text in the field 'text' of row 1; its fields: 'id', 'body'"):
        read(path, tokenizer)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30), max_size=8),
    block=st.integers(2, 12),
    limit=st.integers(1, 6),
)
def test_blocks_are_the_beginning_of_the_stream(
    documents: list[str],
    block: int,
    limit: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "any.jsonl", ["start", *documents])
    expected = stream(tokenizer, ["start", *documents])
    if len(expected) < block:
        with pytest.raises(InputError, match=f"holds {len(expected)} tokens, less than one block of {block}"):
            read(path, tokenizer, block, limit)
        return
    blocks = read(path, tokenizer, block, limit)
    count = min(limit, len(expected) // block)
    assert blocks.ids_BS.tolist() == [expected[n * block : (n + 1) * block] for n in range(count)]


class TestMixtures:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        return [
            write(tmp_path / f"{name}.jsonl", tiny.sentences(seed, 60)) for seed, name in enumerate(["a", "b", "c"])
        ]

    def test_each_source_gives_an_equal_share(self, paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> None:
        mixed = read(", ".join(map(str, paths)), tokenizer, limit=11)
        assert mixed.name == "a+b+c"
        alone = [read(path, tokenizer, limit=share) for path, share in zip(paths, [4, 4, 3], strict=True)]
        assert torch.equal(mixed.ids_BS, torch.cat([blocks.ids_BS for blocks in alone]))

    def test_the_fingerprint_is_of_the_contents_and_not_their_order(
        self, paths: list[Path], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        one, other = (
            read(f"{paths[0]},{paths[1]}", tokenizer, limit=6),
            read(f"{paths[1]},{paths[0]}", tokenizer, limit=6),
        )
        assert one.fingerprint == other.fingerprint
        assert one.fingerprint != read(f"{paths[0]},{paths[2]}", tokenizer, limit=6).fingerprint
        assert one.fingerprint != read(f"{paths[0]},{paths[1]}", tokenizer, limit=8).fingerprint

    def test_more_sources_than_blocks(self, paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(
            InputError, match=r"3 sources cannot share 2 blocks by their weights: none would be of .*c\.jsonl"
        ):
            read(",".join(map(str, paths)), tokenizer, limit=2)

    def test_one_bad_source_spoils_it(self, paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match=r"nothing\.jsonl"):
            read(f"{paths[0]},{paths[0].parent / 'nothing.jsonl'}", tokenizer)


class TestWeights:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        return [write(tmp_path / f"{name}.jsonl", tiny.sentences(seed, 60)) for seed, name in enumerate("abc")]

    def test_shares_are_in_proportion(self, paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> None:
        mixed = read(f"{paths[0]}*3, {paths[1]} ,{paths[2]}*0.5", tokenizer, limit=12)
        alone = [read(path, tokenizer, limit=share) for path, share in zip(paths, [8, 3, 1], strict=True)]
        assert torch.equal(mixed.ids_BS, torch.cat([blocks.ids_BS for blocks in alone]))
        assert mixed.name == "a+b+c"

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(0.1, 50), min_size=1, max_size=6), st.integers(1, 500))
    def test_every_share_is_within_one_of_exact(self, weights: list[float], blocks: int) -> None:
        sources = [Source(str(place), weight) for place, weight in enumerate(weights)]
        exact = [blocks * weight / sum(weights) for weight in weights]
        try:
            found = shares(sources, blocks)
        except InputError:
            assert min(exact) < 1
            return
        assert sum(found) == blocks
        assert all(share > 0 for share in found)
        assert all(abs(share - wanted) < 1 + 1e-9 for share, wanted in zip(found, exact, strict=True))

    def test_a_source_that_runs_short_is_told(
        self, paths: list[Path], tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
    ) -> None:
        short = write(paths[0].parent / "short.jsonl", tiny.sentences(9, 3))
        blocks = read(f"{paths[0]},{short}*2", tokenizer, limit=30)
        has = len(read(short, tokenizer).ids_BS)
        assert len(blocks.ids_BS) == 10 + has
        said = capsys.readouterr().err
        assert f"note: {short} holds {has} of the 20 blocks that are its share" in said
        assert f"is {20 - has} smaller" in said

    @pytest.mark.parametrize("weight", ["0", "-1", "x", "", "nan", "inf"])
    def test_a_weight_that_is_none(self, weight: str, paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match=r"must be a positive number, as in mine.jsonl\*3"):
            read(f"{paths[0]}*{weight}", tokenizer)

    def test_a_name_with_a_comma_and_a_star(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a,b*2 50%2C.jsonl", DOCUMENTS)
        mixture = format_sources([Source(str(path), 2)])
        assert "a%2Cb%2A2 50%252C.jsonl*2" in mixture
        assert read(mixture, tokenizer).tokens == read(write(tmp_path / "plain.jsonl", DOCUMENTS), tokenizer).tokens

    @given(
        st.lists(st.tuples(st.text("a/.%,*25CA", min_size=1, max_size=9), st.integers(1, 9)), min_size=1, max_size=4)
    )
    def test_what_is_formatted_is_what_is_parsed(self, given_sources: list[tuple[str, int]]) -> None:
        sources = [Source(address, weight) for address, weight in given_sources]
        assert parse_sources(format_sources(sources)) == sources


class TestDocumentsAsSequences:
    def rows(self, blocks: Blocks) -> list[list[int]]:
        mask_BS = torch.ones_like(blocks.ids_BS, dtype=torch.bool) if blocks.mask_BS is None else blocks.mask_BS
        return [ids_S[mask_S].tolist() for ids_S, mask_S in zip(blocks.ids_BS, mask_BS, strict=True)]

    def test_each_begins_a_block_and_a_long_one_goes_on(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        documents = ["", "one", " ".join(DOCUMENTS), DOCUMENTS[0]]
        blocks = read(write(tmp_path / "some.jsonl", documents), tokenizer, 16, sequences="documents")
        ids = [tokenizer(text)["input_ids"] for text in documents]
        expected = [each[start : start + 16] for each in ids for start in range(0, len(each), 16)]
        assert self.rows(blocks) == expected
        assert blocks.tokens == sum(map(len, ids))
        assert blocks.mask_BS is not None
        assert not (blocks.mask_BS[:, 1:] & ~blocks.mask_BS[:, :-1]).any()  # padding is to the right

    def test_a_start_of_text_is_put_before_each_document(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        with_start = tiny.tokenizer()
        with_start.bos_token = "<|endoftext|>"
        start = with_start.bos_token_id
        with_start.backend_tokenizer.post_processor = TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
        )
        path = write(tmp_path / "some.jsonl", DOCUMENTS)
        found = self.rows(read(path, with_start, 1000, sequences="documents"))
        assert found == [[start, *row] for row in self.rows(read(path, tokenizer, 1000, sequences="documents"))]

    def test_without_any_text(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds no text"):
            read(write(tmp_path / "some.jsonl", ["", ""]), tokenizer, sequences="documents")
        with pytest.raises(InputError, match="unknown kind of sequences 'rows'; known: packed, documents"):
            read(write(tmp_path / "some.jsonl", DOCUMENTS), tokenizer, sequences="rows")


class TestLongTexts:
    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 50)

    @pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
    def test_pieces_give_the_tokens_of_the_whole(
        self, name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = write(tmp_path / name, [" ".join(DOCUMENTS)])
        blocks = read(path, tokenizer)
        assert blocks.ids_BS.flatten().tolist() == stream(tokenizer, [" ".join(DOCUMENTS)])[: blocks.tokens]

    @pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
    def test_documents_are_whole(self, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, long := [" ".join(DOCUMENTS)] if name.endswith("txt") else DOCUMENTS)
        assert list(texts.read_documents(f"{path},{path}")) == long * 2

    def test_a_text_without_spaces_is_cut_anywhere(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = tmp_path / "long.txt"
        path.write_text("ab" * 500)
        assert tokenizer.decode(read(path, tokenizer, 4).ids_BS.flatten()).startswith("ab" * 400)

    def test_reading_stops_where_the_blocks_are_full(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = tmp_path / "long.txt"
        path.write_bytes(" ".join(DOCUMENTS * 200).encode() + b"\xff\xfe")  # its end cannot be read
        assert len(read(path, tokenizer, limit=3).ids_BS) == 3
        with pytest.raises(InputError, match="not readable as UTF-8"):
            read(path, tokenizer, limit=100_000)


class TestWhatIsNoText:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("some.jsonl", b"", "is empty"),
            ("some.parquet", b"", "is empty"),
            ("some.txt", b"", "less than one block"),
            ("some.jsonl", b"\n", "less than one block"),
            ("some.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read as jsonl"),
            ("some.jsonl", b'["a", "b"]\n["c"]\n', "cannot be read as jsonl"),
            ("some.jsonl", b'"just a string"\n', "cannot be read as jsonl"),
            ("some.jsonl", b'{"text": null}\n', "no text in the field 'text' of row 1"),
            ("some.jsonl", b'{"text": 3}\n', "no text in the field 'text' of row 1"),
            ("some.jsonl", b'{"text": "a"}\n{"other": "b"}\n', "no text in the field 'text' of row 2"),
            ("some.jsonl", b"\xff\xfe\x00", "cannot be read as jsonl"),
            ("some.txt", b"\xff\xfe\x00", "not readable as UTF-8"),
            ("some.parquet", b"PAR1 not really", "cannot be read as parquet"),
            ("some.docx", b"PK", "unknown kind; known: .json, .jsonl, .md, .parquet, .text, .txt"),
        ],
    )
    def test_a_file_that_is_none(
        self, name: str, content: bytes, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(said)) as raised:
            read(path, tokenizer)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("address", ["nothing.jsonl", "/tmp", "here", "./a/b", "", " , ", "builtin://", "~/x"])
    def test_nothing_is_there(self, address: str, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError):
            read(address, tokenizer)

    def test_unknown_built_in_texts_name_the_known(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match="unknown built-in text 'poetry'; known: code, prose, arithmetic"):
            read("builtin://poetry", tokenizer)
        with pytest.raises(InputError, match=r"unknown split 'test' .*known: train, held-out"):
            read("builtin://code/test", tokenizer)

    @pytest.mark.parametrize(("block", "limit"), [(1, 5), (0, 5), (-3, 5), (8, 0)])
    def test_impossible_sizes(self, block: int, limit: int, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match="must be positive"):
            read("builtin://arithmetic", tokenizer, block, limit)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("builtin://code", "code"),
        ("builtin://code/held-out", "code"),
        ("/data/medical.v2.jsonl", "medical"),
        ("s3://bucket/some/notes.parquet", "notes"),
        ("owner/corpus", "corpus"),
    ],
)
def test_a_table_s_name_for_a_source(address: str, name: str) -> None:
    assert short_name(address) == name


@pytest.fixture(scope="module")
def library() -> dict[str, list[tuple[str, list[str]]]]:
    """The standard library taken apart, once for code and prose."""
    return {split: list(corpus._library(split)) for split in corpus.SPLITS}


@pytest.fixture(params=corpus.DOMAINS)
def domain(
    request: pytest.FixtureRequest, library: dict[str, list[tuple[str, list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setattr(corpus, "_library", lambda split: iter(library[split]))
    return str(request.param)


def test_built_in_training_and_held_out_texts_share_no_document(domain: str) -> None:
    train, held_out = (list(corpus.documents(domain, split)) for split in corpus.SPLITS)
    assert len(train) > 5 * len(held_out) > 100
    assert not set(train) & set(held_out)
    assert sum(map(len, held_out)) > 100_000
    assert all(train)
    assert all(held_out)
    if domain == "arithmetic":  # nor a question
        questions = [{line for text in texts for line in text.splitlines()} for texts in (train, held_out)]
        assert not questions[0] & questions[1]


def test_built_in_texts_are_the_same_each_time(domain: str) -> None:
    one, other = (list(islice(corpus.documents(domain), 50)) for _ in range(2))
    assert one == other


def test_built_in_texts_are_what_they_are_called(domain: str) -> None:
    for split in corpus.SPLITS:
        text = "\n".join(corpus.documents(domain, split))
        assert (text.count("\ndef ") + text.count("    def ") > 500) == (domain == "code")
        assert (len(re.findall(r" = -?\d+$", text, re.MULTILINE)) > 5000) == (domain == "arithmetic")


def test_arithmetic_is_exact() -> None:
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    seen = set()
    for split in corpus.SPLITS:
        for text in islice(corpus.documents("arithmetic", split), 400):
            for line in text.splitlines():
                parsed = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", line)
                assert parsed, line
                one, sign, other, answer = parsed.groups()
                assert compute[sign](int(one), int(other)) == int(answer)
                seen.add(sign)
    assert seen == set(compute)


def test_code_comes_without_its_docstrings() -> None:
    source = '''"""Module."""
import os


class A:
    """Of several
    lines."""

    def f(self):
        "One line."
        return 1  # stays


async def g():
    """Gone."""
    return """stays"""
'''
    code, docstrings = corpus._take_docstrings_out(source)
    assert docstrings == ["Module.", "Of several\nlines.", "Gone.", "One line."]
    assert "stays" in code
    assert '"""stays"""' in code
    assert not any(gone in code for gone in ("Module", "Of several", "One line", "Gone"))
