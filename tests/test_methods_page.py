"""docs/methods.md says of every method what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from methods_page import DOCUMENT, with_tables

from moeprune.methods import METHODS


def test_the_tables_are_those_of_the_code(pytestconfig: pytest.Config) -> None:
    page = DOCUMENT.read_text()
    if pytestconfig.getoption("--write-methods"):
        DOCUMENT.write_text(with_tables(page))
    assert with_tables(page) == DOCUMENT.read_text(), "write them again with `make methods`"


def test_every_method_is_described() -> None:
    described = set(re.findall(r"\*\*([\w-]+)\*\*", DOCUMENT.read_text()))
    assert described == METHODS.own.keys()


def test_the_terminal_says_the_same(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    said = " ".join(run_cli("methods")[1].split())
    for method in METHODS.own.values():
        assert f"{method.name} {method.summary}" in said
        assert ", ".join(sorted(method.statistics)) in said
        for name, field in method.options.model_fields.items():
            assert f"{name}={field.default} {field.description}" in said
