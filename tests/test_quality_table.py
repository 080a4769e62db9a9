"""`make bench-quality`: what it measures, keeps, and writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Command = Callable[..., int]


pytestmark = pytest.mark.usefixtures("_benchmarks_can_be_imported")


@pytest.fixture
def arguments(qwen: Path, tmp_path: Path) -> list[str]:
    made = [f"--model={qwen}", f"--state={tmp_path / 'state'}", f"--out={tmp_path / 'out'}", "--name=tiny"]
    for seed, name in enumerate(("law", "tax")):
        train = tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.sentences(2 * seed, 40))
        held = tiny.write_jsonl(tmp_path / f"{name}-held.jsonl", tiny.sentences(2 * seed + 1, 12))
        made.append(f"--domain={name}={train},{held}")
    sizes = ["--block-tokens=24", "--blocks=6", "--held-blocks=4", "--draws=1"]
    return [*made, *sizes, "--method=random", "--ratio", "0", "0.5", "0.9"]


@pytest.fixture
def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*more: str) -> int:
        from quality_table.command import main

        monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            main("")
        return int(end.value.code or 0)

    return run


def cells(tmp_path: Path) -> dict[str, int]:
    """The files of the cells, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state" / "cells").iterdir()}


def published(out: Path) -> tuple[dict[str, Any], str]:
    """The numbers and the text."""
    return json.loads((out / "quality-tiny.json").read_text()), (out / "quality-tiny.md").read_text()


def increase(cell: dict[str, Any], original: dict[str, Any]) -> float:
    """Of the loss, mean over the domains."""
    return (
        sum(quality["loss_nats"] - original["quality"][name]["loss_nats"] for name, quality in cell["quality"].items())
        / 2
    )


def test_the_table_is_measured_once_and_grows(
    command: Command, arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    record, text = published(tmp_path / "out")
    assert (tmp_path / "out" / "quality-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text + json.dumps(record)  # where things lie on this machine is nobody's business
    assert "--domain=law=law.jsonl,law-held.jsonl" in record["command"]
    original, (whole, half) = record["original"], record["cells"]
    assert whole["parameters"] == original["parameters"]  # nothing removed: the model itself
    assert whole["quality"] == original["quality"]
    assert half["removed"] == 0.5
    assert half["parameters"] < original["parameters"]
    assert f"| random | **+0.000** | **{increase(half, original):+.3f}** |" in text
    assert [(each["row"], each["amount"]) for each in record["refused"]] == [("random", "90 % of the experts")]
    assert "the largest ratio for this model is 0.75" in text

    before = cells(tmp_path)
    stats = tmp_path / "state" / "stats"
    shutil.rmtree(stats)  # what has to be measured again shows in them
    assert command("--measured-only") == 0
    assert not stats.exists()
    assert cells(tmp_path) == before

    capfd.readouterr()
    assert command("--draws=2", "--ratio", "0.5") == 0
    after = cells(tmp_path)
    assert after.items() > before.items()
    assert len(after) == len(before) + 1
    assert "2/2" in capfd.readouterr().err  # a calibration and a cell
    record, text = published(tmp_path / "out")
    first, second = (increase(cell, original) for cell in record["cells"])
    least, most = sorted([first, second])
    assert f"| random | **{(first + second) / 2:+.3f}** ({least:+.3f} to {most:+.3f}) |" in text

    program = [sys.executable, str(BENCHMARKS / "quality.py"), *arguments, "--ratio", "0.5", "--out", str(tmp_path)]
    subprocess.run(program, check=True, capture_output=True, cwd=tmp_path)
    assert cells(tmp_path) == after
    assert published(tmp_path)[0]["cells"] == [half]


def test_each_domain_alone_is_judged_on_itself(command: Command, tmp_path: Path) -> None:
    assert command("--alone", "--ratio", "0.5") == 0
    record, text = published(tmp_path / "out")
    judged = {cell["calibrated_on"]: list(cell["quality"]) for cell in record["cells"]}
    assert judged == {"mixture": ["law", "tax"], "law": ["law"], "tax": ["tax"]}
    assert "## Each domain alone" in text


def test_what_fails_is_told_and_the_rest_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from quality_table import work

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(work, "make_plan", fail)
    assert command("--method=frequency", "--ratio", "0.5") == 1
    record, _ = published(tmp_path / "out")
    assert [each["row"] for each in record["refused"]] == ["random", "frequency"]
    assert record["refused"][0]["why"] == "failed: ZeroDivisionError: by nothing"
    assert "Traceback" in capfd.readouterr().err


def test_draws_are_equal_parts_and_differ(qwen: Path, tmp_path: Path) -> None:
    from quality_table.texts import MIXTURE, Domain, Texts

    domains = []
    for seed, name in enumerate(("law", "tax")):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.sentences(seed, 40))
        domains.append(Domain(name, str(path), str(path)))
    sizes = {"block_tokens": 24, "held_blocks": 4, "text_field": "text"}
    texts = Texts(domains, Checkpoint(qwen).tokenizer(), blocks=6, **sizes)  # type: ignore[arg-type]
    both, law = texts.draw(MIXTURE, 0), texts.draw("law", 0)
    assert both.ids_BS.shape == law.ids_BS.shape == (6, 24)
    assert [row.tolist() for row in law.ids_BS[:3]] == [row.tolist() for row in both.ids_BS[:3]]
    assert texts.draw(MIXTURE, 0).fingerprint == both.fingerprint
    assert texts.draw(MIXTURE, 1).fingerprint != both.fingerprint
    taken = both.some(2).tolist()
    assert taken == [both.ids_BS[0].tolist(), both.ids_BS[-1].tolist()]  # one of each domain
    few = Texts(domains, Checkpoint(qwen).tokenizer(), blocks=10_000, **sizes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give more text"):
        few.draw(MIXTURE, 0)


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("random", "random"),
        ("random:seed=3", "random (seed=3)"),
        (
            "c-prune:representative=nearest,layerwise_share=1+recovery",
            "c-prune (representative=nearest, layerwise_share=1) + recovery",
        ),
    ],
)
def test_rows_are_named_by_what_is_said(written: str, label: str) -> None:
    from quality_table.rows import Row

    row = Row.parse(written)
    assert row.label == label
    assert row.options_for(7).items() >= row.options.items()


def test_lots_are_drawn_anew_with_each_draw() -> None:
    from quality_table.rows import Row

    assert Row.parse("random").options_for(7) == {"seed": 7}
    assert Row.parse("random:seed=3").options_for(7) == {"seed": 3}
    assert Row.parse("frequency").options_for(7) == {}


@pytest.mark.parametrize("written", ["nonsense", "random:sead=3", "random:seed", "frequency:seed=3"])
def test_a_row_that_cannot_be_is_refused(written: str) -> None:
    from quality_table.rows import Row

    with pytest.raises(InputError):
        Row.parse(written)


def test_a_pattern_has_a_ratio_of_its_own() -> None:
    from quality_table.rows import Amounts, Row

    amounts = Amounts(experts=[0.25], weights=[0.6], layers=[0.3])
    assert amounts.of(Row.parse("random")) == [0.25]
    assert amounts.of(Row.parse("wanda")) == [0.6]
    assert amounts.of(Row.parse("wanda:pattern=2:4")) == [0.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_names_stand_apart_in_the_order_of_their_lines(heights: list[float]) -> None:
    from quality_table.picture import _apart

    named = {str(place): height for place, height in enumerate(heights)}
    placed = _apart(named, 0.05)
    in_order = [placed[name] for name in sorted(named, key=named.__getitem__)]
    assert all(above - below >= 0.05 - 1e-9 for below, above in pairwise(in_order))
    assert max(in_order) <= 1 + 1e-9
    assert min(in_order) >= -1e-9
    if len(heights) == 1:
        assert placed["0"] == heights[0]


def test_the_time_left_is_by_what_the_like_took(capsys: pytest.CaptureFixture[str]) -> None:
    from quality_table.pace import Pace

    pace = Pace(["slow", "quick", "quick", "quick"])
    pace.done("slow", 100, "first")
    assert pace.seconds_left == 300  # nothing else is known yet
    pace.done("quick", 10, "second")
    assert pace.seconds_left == 20
    assert capsys.readouterr().err.splitlines() == ["1/4 first (2 min, 5 min left)", "2/4 second (10 s, 20 s left)"]
