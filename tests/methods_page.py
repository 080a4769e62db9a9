"""The tables of docs/methods.md, made from the methods themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from moeprune.methods import METHODS
from moeprune.methods.base import Method

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"


def with_tables(page: str) -> str:
    """The page with its tables as they must be."""
    methods = METHODS.own.values()
    for name, table in (("methods", _methods(methods)), ("options", _options(methods))):
        between = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", flags=re.DOTALL)
        assert between.search(page), f"the page has no place for its table of {name}"
        page = between.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", page)  # type: ignore[misc]
    return page


def _methods(methods: Iterable[Method]) -> str:
    rows = [
        f"| `{method.name}` | {method.removes} | {method.summary} | {', '.join(_needs(method)) or 'nothing'} |"
        for method in methods
    ]
    return "\n".join(["| method | ratio of | what it does | needs |", "| --- | --- | --- | --- |", *rows, ""])


def _needs(method: Method) -> list[str]:
    others = {"Clusters": method.uses_clusters, "the model and text": method.tries}
    return [f"`{name}`" for name in sorted(method.statistics)] + [name for name, wanted in others.items() if wanted]


def _options(methods: Iterable[Method]) -> str:
    rows = [
        f"| `{method.name}` | `{name}` | `{field.default}` | {field.description} |"
        for method in methods
        for name, field in method.options.model_fields.items()
    ]
    return "\n".join(["| method | `--set` | default | |", "| --- | --- | --- | --- |", *rows, ""])
