"""Pipelines that are built when they are first asked for, and not when their file is imported.

For each thing that is said of a task, kfp looks at the whole stack. Below an import that is slow (Python looks through
all modules for the source of the import machinery), and with all that is said of a pipeline's tasks takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from kfp import dsl


def built_once(name: str) -> Callable[[Callable[..., Any]], Callable[[], Any]]:
    """As `dsl.pipeline`, but what it makes of a function gives the pipeline when it is called, each time the same."""

    def decorate(wiring: Callable[..., Any]) -> Callable[[], Any]:
        @cache
        def build() -> Any:
            return dsl.pipeline(wiring, name=name)

        return build

    return decorate
