"""`benchmarks/tasks.py`: what is asked, and how answers are counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeprune.checkpoint.loading import Checkpoint

if TYPE_CHECKING:
    from continuations import Question

WORD = st.tuples(st.sampled_from([" ", "\n", "\n    "]), st.sampled_from("abcdefghijklmn"))
WORDS = st.integers(0, 80).flatmap(lambda count: st.lists(WORD, min_size=count, max_size=count))
DOCUMENTS = st.lists(WORDS.map(lambda words: "".join(space + word for space, word in words)), max_size=3)


pytestmark = pytest.mark.usefixtures("_benchmarks_can_be_imported")


@given(DOCUMENTS, st.integers(0, 6), st.integers(0, 3))
def test_a_question_is_a_piece_of_a_document_and_what_goes_on_there(
    documents: list[str], count: int, seed: int
) -> None:
    from continuations import ANSWER_WORDS, ANSWERS, CONTEXT_WORDS, questions

    made = questions(documents, count, seed)
    assert made == questions(documents, count, seed)
    assert len(made) <= count
    for question in made:
        right = question.answers[question.right]
        assert any(question.context + right in document for document in documents)
        assert all(any(answer in document for document in documents) for answer in question.answers)
        assert len(set(question.answers)) == ANSWERS
        assert len(question.context.split()) == CONTEXT_WORDS
        assert {len(answer.split()) for answer in question.answers} == {ANSWER_WORDS}


def test_the_right_answer_is_anywhere_and_no_text_is_asked_about_twice() -> None:
    from continuations import questions

    document = " ".join(map(str, range(2000)))
    made = questions([document], 1000)
    assert len(made) == 2000 // 32  # of a context and an answer each
    assert {question.right for question in made} == {0, 1, 2, 3}
    seen = [word for question in made for word in (question.context + question.answers[question.right]).split()]
    assert len(seen) == len(set(seen))
    wrong = [answer for question in made for answer in set(question.answers) - {question.answers[question.right]}]
    assert len(set(wrong)) > len(made)


def test_models_are_asked_and_compared(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import measuring
    import tasks
    from continuations import questions

    text = " ".join(tiny.sentences(1, 60))
    held = tiny.write_jsonl(tmp_path / "held.jsonl", [text])
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    models = [f"--model={name}={qwen}" for name in ("original", "the same")]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *models, f"--domain=law={held},{held}", "--questions=20"])
    tasks.main()
    found: dict[str, Any] = json.loads((tmp_path / "tasks-reference.json").read_text())["raw"]
    assert found["original"] == found["the same"] == {"law": answered_by_hand(qwen, questions([text], 20))}
    assert len(set(found["original"]["law"])) == 2
    assert "| 100.0% ± 0.0% |" in (tmp_path / "tasks-reference.md").read_text()


@pytest.mark.parametrize(
    ("option", "told"),
    [("--model=nameless", "--model takes NAME=CHECKPOINT"), ("--questions=1", "of law makes less than 2 questions")],
)
def test_what_cannot_be_asked(
    option: str,
    told: str,
    qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tasks

    held = tiny.write_jsonl(tmp_path / "held.jsonl", [" ".join(tiny.sentences(1, 60))])
    monkeypatch.setattr(sys, "argv", ["tasks.py", f"--model=original={qwen}", f"--domain=law={held},{held}", option])
    with pytest.raises(SystemExit):
        tasks.main()
    assert told in capsys.readouterr().err


@torch.no_grad()
def answered_by_hand(directory: Path, asked: list[Question]) -> list[bool]:
    """Whether the answer that is likeliest for each of its characters is the right one."""
    checkpoint = Checkpoint(directory)
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer()

    def likelihood(context: str, answer: str) -> float:
        ids_S = torch.tensor(tokenizer(context + answer)["input_ids"])
        given_tokens = len(tokenizer(context)["input_ids"])
        share_SV = model(ids_S[None]).logits[0].log_softmax(-1)
        return float(share_SV[:-1].gather(1, ids_S[1:, None])[given_tokens - 1 :].sum()) / len(answer)

    return [
        max(range(4), key=lambda one: likelihood(question.context, question.answers[one])) == question.right
        for question in asked
    ]


def test_a_mean_of_domains_and_its_error() -> None:
    import tasks

    original = {"law": [True, True, True, True], "tax": [True, True, False, False]}
    found = {"law": [True, True, True, False], "tax": [True, True, False, False]}
    row = tasks._row("cut", found, original)
    # 0.75 and 0.5 where the original has 1 and 0.5; of the four differences on law one is 1: error 1/4
    assert row == {
        "model": "cut",
        "law": "75.0%",
        "tax": "50.0%",
        "mean": "62.5%",
        "of the original's": "83.3% ± 16.7%",
    }
