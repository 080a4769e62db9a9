"""Questions with several answers, made of text that nobody has seen: which piece goes on where the text stops?

The wrong answers are pieces of the same document, as long as the right one, so neither the subject nor the style gives
it away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT_WORDS = 24
ANSWER_WORDS = 8
ANSWERS = 4


@dataclass(frozen=True)
class Question:
    """A context, answers that each begin with the whitespace that parts them from it, and which of them is right."""

    context: str
    answers: list[str]
    right: int


def questions(documents: Sequence[str], count: int, seed: int = 0) -> list[Question]:
    """As many as there are, and at most `count`, drawn evenly from all places of the documents that hold one.

    No two share a word of context or right answer. The same for the same documents and seed.
    """
    chance = random.Random(seed)
    # A word carries the whitespace before it: joined again they are the text, indented or not.
    split = [re.findall(r"\s*\S+", document) for document in documents]
    size = CONTEXT_WORDS + ANSWER_WORDS
    places = [(words, start) for words in split for start in range(0, len(words) - size + 1, size)]
    chance.shuffle(places)
    made: list[Question] = []
    for words, start in places:
        if len(made) == count:
            break
        if question := _question(words, start, chance):
            made.append(question)
    return made


def _question(words: list[str], start: int, chance: random.Random) -> Question | None:
    """On what stands at a place; None where the rest of its document has not enough other answers."""
    stops = start + CONTEXT_WORDS
    right = "".join(words[stops : stops + ANSWER_WORDS])
    before = range(start - ANSWER_WORDS + 1)
    after = range(stops + ANSWER_WORDS, len(words) - ANSWER_WORDS + 1)
    elsewhere = {"".join(words[place : place + ANSWER_WORDS]) for place in (*before, *after)} - {right}
    if len(elsewhere) < ANSWERS - 1:
        return None
    answers = [right, *chance.sample(sorted(elsewhere), ANSWERS - 1)]
    chance.shuffle(answers)
    return Question("".join(words[start:stops]), answers, answers.index(right))
