"""Lower floors know nothing of higher ones (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src/moeprune"
ABOVE = ("moeprune.components", "moeprune.pipelines", "moeprune.train_job", "moeprune.cli")
OF_A_CLUSTER = ("kfp", "kubernetes", "kubeflow")
FILES = [path for path in sorted(LIBRARY.rglob("*.py")) if LIBRARY / "cli" not in path.parents]


def imported(path: Path) -> Iterator[str]:
    """The modules that a file names in its imports, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def below(name: str, packages: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{package}." for package in packages)) or name in packages


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_the_library_knows_nothing_of_what_is_above_it(path: Path) -> None:
    assert not [name for name in imported(path) if below(name, (*ABOVE, *OF_A_CLUSTER))]
    text = path.read_text(encoding="utf-8").lower()
    assert not [word for word in ("kfp", "kubeflow", "kubernetes") if word in text]


@pytest.mark.parametrize("path", sorted((ROOT / "components").rglob("*.py")), ids=lambda path: path.parent.name)
def test_components_know_nothing_of_pipelines_and_the_command_line(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if below(name, ("moeprune.pipelines", "moeprune.cli"))]


def test_all_of_it_is_installed() -> None:
    """Where the house stands as it is, in a clone, nothing would miss what an installation lacks."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    places = {"moeprune": LIBRARY} | {
        name: ROOT / place for name, place in told["package-dir"].items() if name and "." in name
    }
    there = {
        ".".join([name, *found.parent.relative_to(place).parts])
        for name, place in places.items()
        for found in place.rglob("__init__.py")
    }
    assert there == set(told["packages"])
