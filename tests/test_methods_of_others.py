"""Methods that other packages bring: packages really installed in a directory, that of CONTRIBUTING.md among them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tiny

from moeprune.errors import InputError
from moeprune.methods import BASELINES, METHODS
from moeprune.methods.base import Evidence, Method
from moeprune.methods.registry import GROUP, Registry
from moeprune.plan import Plan

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"
Install = Callable[..., None]

_SEVERAL = """
import sys
from moeprune.cli import main
for arguments in {commands!r}:
    sys.argv = ["moeprune", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code or 0)
"""


def example() -> str:
    """The method that CONTRIBUTING.md shows."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def written(root: Path, package: str, version: str, points: dict[str, str], **modules: str) -> None:
    """A package as an installer leaves it."""
    for module, code in modules.items():
        (root / f"{module}.py").write_text(code)
    info = root / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    listed = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{listed}")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package for this test, in this process."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *arguments, **modules: written(tmp_path, *arguments, **modules)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def registry() -> Registry:
    return Registry(METHODS.own.values())


def test_the_example_of_the_guide_is_a_method(install: Install) -> None:
    install("gates", "1.2", {"gate": "gate_method:METHOD"}, gate_method=example())
    found = registry()
    assert not found.unusable
    assert found.keys() == METHODS.own.keys() | {"gate"}
    method = found.find("gate")
    stats = tiny.make_stats([[10, 1, 1, 10, 1, 10, 1, 10]])
    layer = next(iter(stats.layers.values()))
    layer.sums["gate"].add_(layer.count("routed_tokens").flip(0).double())  # now the sum and the mean differ
    for per_token, score_E in ((False, layer.sum("gate")), (True, layer.sum("gate") / layer.count("routed_tokens"))):
        decided = method.decide(Evidence(stats), 0.5, method.options.model_validate({"per_token": per_token}))
        (made,) = decided.layers.values()
        assert made.scores == score_E.tolist()
        assert made.keep == sorted(sorted(range(8), key=score_E.tolist().__getitem__)[4:])


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    written(installed, "gates", "1.2", {"gate": "gate_method:METHOD"}, gate_method=example())
    written(installed, "broken", "0.1", {"lost": "broken_method:METHOD"}, broken_method="import nothing_of_the_kind\n")
    tiny.make_stats([[1, 2, 3, 4, 5, 6, 7, 8]] * 2).save(tmp_path / "stats")
    given = ["--ratio", "0.5", "--stats", str(tmp_path / "stats"), "--out", str(tmp_path / "plan.json")]
    commands = [
        ["methods"],
        ["plan", "make", "--method", "gate", "--set", "per_token=false", *given],
        ["plan", "make", "--method", "lost", *given],
    ]
    ended = subprocess.run(
        [sys.executable, "-c", _SEVERAL.format(commands=commands)],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.findall(r"exit code (\d)", ended.stdout) == ["0", "0", "1"], ended.stderr
    wrong = "the method lost of the package broken 0.1 cannot be used: ModuleNotFoundError: No module named"
    listed = " ".join(ended.stdout.split())
    assert wrong in listed
    assert all(
        name in listed
        for name in ("drop the experts of the least gate weight", "per_token=False", "gate, routed_tokens")
    )
    assert Plan.load(tmp_path / "plan.json").keep == {
        f"model.layers.{layer}.mlp.experts": [4, 5, 6, 7] for layer in range(2)
    }
    assert wrong in ended.stderr
    assert ended.stderr.count("\n") == 1, "one sentence"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("import nothing_of_the_kind", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("METHOD = (", "SyntaxError: "),
        ("OTHER = 1", "AttributeError: "),
        ("METHOD = 1", "other_method:METHOD is not a moeprune.methods.base.Method"),
        (example(), "other_method:METHOD calls itself gate"),
        (
            example().replace('"gate",\n', '"other",\n').replace('frozenset({"gate"', 'frozenset({"mood"'),
            "it needs the statistics mood, which nothing collects",
        ),
    ],
    ids=["raises", "lacks a module", "syntax", "lacks the object", "no method", "other name", "unknown statistic"],
)
def test_a_broken_one_is_a_sentence_and_breaks_no_other(code: str, said: str, install: Install) -> None:
    install("others", "3.0", {"other": "other_method:METHOD"}, other_method=code)
    install("gates", "1.2", {"gate": "gate_method:METHOD"}, gate_method=example())
    found = registry()
    assert found.keys() == METHODS.own.keys() | {"gate"}
    with pytest.raises(InputError) as refusal:
        found.find("other")
    assert str(refusal.value).startswith(f"the method other of the package others 3.0 cannot be used: {said}")
    assert "\n" not in str(refusal.value)
    assert list(found.unusable.values()) == [str(refusal.value)]


def test_names_that_are_taken(install: Install) -> None:
    taken = BASELINES[0]
    install("mine", "1", {taken: "mine_method:METHOD"}, mine_method=example().replace('"gate",\n', f'"{taken}",\n'))
    for package in ("one", "two"):
        install(package, "1", {"gate": f"{package}_method:METHOD"}, **{f"{package}_method": example()})
    found = registry()
    assert found.keys() == METHODS.own.keys()
    assert found.find(taken) is METHODS.own[taken]
    assert found.unusable[taken].endswith("package mine 1 cannot be used: moeprune has a method of this name, too")
    with pytest.raises(InputError, match=r"(one|two) 1 has a method of this name, too"):
        found.find("gate")


def test_nothing_is_loaded_before_it_is_asked_for(install: Install) -> None:
    install("gates", "1.2", {"gate": "gate_method:METHOD"}, gate_method=example())
    found = registry()
    assert [point.name for point in entry_points(group=GROUP)] == ["gate"]
    assert "gate_method" not in sys.modules
    assert isinstance(found["gate"], Method)
    assert "gate_method" in sys.modules


def test_the_guide_shows_the_entry_point_as_it_is_read() -> None:
    shown = re.search(r"```toml\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert shown
    assert f'[project.entry-points."{GROUP}"]' in shown[1]
    assert json.dumps("my_package.gate:METHOD") in shown[1]
