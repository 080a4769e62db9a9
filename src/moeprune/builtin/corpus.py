"""The texts of the embedded example: what every Python installation carries, and sums with exact answers.

Three domains, each a list of documents split into training and held-out ones *by name*, so that no text is on both
sides on any Python version:

    code        the standard library's modules, their docstrings taken out
    prose       the language's documentation topics and the docstrings of the same modules
    arithmetic  generated additions, subtractions and products

Nothing is downloaded and nothing is stored in the repository.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from moeprune.errors import InputError

DOMAINS = ("code", "prose", "arithmetic")
SPLITS = ("train", "held-out")

HELD_OUT_MODULES = frozenset(
    [
        "argparse",
        "ast",
        "base64",
        "bisect",
        "calendar",
        "cmd",
        "codecs",
        "contextlib",
        "csv",
        "dataclasses",
        "difflib",
        "fractions",
        "gzip",
        "heapq",
        "imaplib",
        "json",
        "locale",
        "mailbox",
        "optparse",
        "pickle",
        "pprint",
        "queue",
        "random",
        "sched",
        "selectors",
        "shlex",
        "statistics",
        "string",
        "tarfile",
        "textwrap",
        "threading",
        "tokenize",
        "types",
        "uuid",
        "wave",
        "zipapp",
    ]
)
HELD_OUT_TOPICS = frozenset(
    [
        "assert",
        "binary",
        "bltin-type-objects",
        "break",
        "class",
        "compound",
        "context-managers",
        "debugger",
        "else",
        "exceptions",
        "formatstrings",
        "global",
        "if",
        "naming",
        "operator-summary",
        "pass",
        "raise",
        "shifting",
        "strings",
        "try",
        "typesmapping",
        "unary",
        "with",
    ]
)
_NOT_LIBRARY_CODE = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
        "chunk",  # of which `wave`, held out, has a copy
        "encodings",
        "ensurepip",
        "__pycache__",
        "idle_test",
        "__phello__",
        "lib-dynload",
    ]
)
_SHORTEST_DOCSTRING = 100
_SUMS_PER_DOCUMENT = 24
_ARITHMETIC_DOCUMENTS = {"train": 12_000, "held-out": 400}


def documents(domain: str, split: str = "train") -> Iterator[str]:
    """Yield the documents of one domain and split, in an order that is the same on every machine with this Python.

    Raises:
        InputError: unknown domain or split.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of the built-in texts; known: {', '.join(SPLITS)}")
    match domain:
        case "code":
            return (code for code, _ in _library(split) if code)
        case "prose":
            return _prose(split)
        case "arithmetic":
            return _arithmetic(split)
        case _:
            raise InputError(f"unknown built-in text {domain!r}; known: {', '.join(DOMAINS)}")


def _library(split: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each module's code without docstrings, and those docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_LIBRARY_CODE.intersection(parts):
            continue
        if (parts[0] in HELD_OUT_MODULES) != (split == "held-out"):
            continue
        try:
            yield _take_docstrings_out(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a distribution's template or fixture, not a module


def _take_docstrings_out(source: str) -> tuple[str, list[str]]:
    docstrings: list[str] = []
    gone: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        expression = node.body[0]
        docstrings.append(inspect.cleandoc(text))
        gone.update(range(expression.lineno, (expression.end_lineno or expression.lineno) + 1))
    kept = [line for number, line in enumerate(source.splitlines(), start=1) if number not in gone]
    return "\n".join(kept).strip(), docstrings


def _prose(split: str) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if (name in HELD_OUT_TOPICS) == (split == "held-out"):
            yield textwrap.dedent(topics[name]).strip()
    for _, docstrings in _library(split):
        yield from (text for text in docstrings if len(text) >= _SHORTEST_DOCSTRING)


def _arithmetic(split: str) -> Iterator[str]:
    rng = random.Random(f"moeprune arithmetic {split}")
    for _ in range(_ARITHMETIC_DOCUMENTS[split]):
        yield "\n".join(_a_sum(rng, split) for _ in range(_SUMS_PER_DOCUMENT))


def _a_sum(rng: random.Random, split: str) -> str:
    """One line such as `37 + 85 = 122`. A tenth of all questions, chosen by their hash, are only ever held out."""
    while True:
        match rng.choice("+-*"):
            case "+":
                a, b = rng.randrange(1000), rng.randrange(1000)
                line = f"{a} + {b} = {a + b}"
            case "-":
                a, b = rng.randrange(1000), rng.randrange(1000)
                line = f"{a} - {b} = {a - b}"
            case _:
                a, b = rng.randrange(100), rng.randrange(10)
                line = f"{a} * {b} = {a * b}"
        is_held_out = hashlib.blake2b(line.encode(), digest_size=1).digest()[0] % 10 == 0
        if is_held_out == (split == "held-out"):
            return line
