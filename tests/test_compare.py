"""Reports side by side, their Pareto front, and what a sweep chooses from."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.cli.checks import check_sweep
from moeprune.errors import InputError
from moeprune.evaluation.compared import side_by_side, table
from moeprune.evaluation.report import Candidate, DataSet, Quality, Report
from moeprune.steps.combine import combine
from moeprune.steps.compare import TABLE, compare

DATA = [DataSet(name="law", address="law.txt", blocks=1, tokens=9, fingerprint="f")]
SIZES_AND_LOSSES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9).map(float) | st.just(math.inf)), min_size=1, max_size=8
)


def candidate(name: str, size: int, loss: float) -> Candidate:
    quality = {"law": Quality(loss_nats=loss, perplexity=1.0, accuracy=0.5, tokens=9)}
    experts = {"layer": 4}
    return Candidate(
        name=name,
        address=name,
        weights=name,
        experts_per_layer=experts,
        parameters=size,
        bytes_on_disk=size,
        tokens_per_second=1.0,
        quality=quality,
    )


def report(size: int, loss: float, **other: Any) -> Report:
    candidates = [candidate("original", 10, 1.0), candidate("pruned", size, 9.0), candidate("distilled", size, loss)]
    return Report(**{"domain": "law", "data": DATA, "candidates": candidates} | other)


@given(SIZES_AND_LOSSES)
def test_the_front_is_what_no_other_is_smaller_and_better_than(points: list[tuple[int, float]]) -> None:
    candidates = [candidate(str(place), size, loss) for place, (size, loss) in enumerate(points)]
    whole = Report(domain="law", data=DATA, candidates=candidates)
    front = {(it.bytes_on_disk, it.quality["law"].loss_nats) for it in whole.front}
    for size, loss in points:
        beaten = any(other != (size, loss) and other[0] <= size and other[1] <= loss for other in points)
        assert ((size, loss) in front) == (math.isfinite(loss) and not beaten)
    assert [it.bytes_on_disk for it in whole.front] == sorted({size for size, _ in front})


def test_each_report_brings_what_it_is_about() -> None:
    whole = side_by_side({"reap 0.5": report(5, 2.0), "fuse 0.5": report(5, 1.5), "fuse 0.25": report(8, 1.2)})
    assert [it.name for it in whole.candidates] == ["original", "reap 0.5", "fuse 0.5", "fuse 0.25"]
    assert [it.quality["law"].loss_nats for it in whole.candidates] == [1.0, 2.0, 1.5, 1.2]
    assert [it.name for it in whole.front] == ["fuse 0.5", "fuse 0.25", "original"]
    rows = {row["name"]: row for row in table(whole)}
    assert [row["name"] for row in rows.values()] == ["fuse 0.5", "reap 0.5", "fuse 0.25", "original"]
    assert rows["reap 0.5"]["loss_increase_nats"] == 1.0
    assert rows["reap 0.5"]["size_on_disk_share"] == 0.5
    assert (rows["reap 0.5"]["on_the_front"], rows["original"]["on_the_front"]) == (False, True)


OTHER_ORIGINAL = [candidate("original", 11, 1.0), candidate("distilled", 5, 2.0)]
OTHER_TEXT = [DATA[0].model_copy(update={"fingerprint": "g"})]


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ({}, "no report"),
        ({"a": report(5, 2.0), "b": report(5, 2.0, candidates=OTHER_ORIGINAL)}, "a and b .* different originals"),
        ({"a": report(5, 2.0), "b": report(5, 2.0, data=OTHER_TEXT)}, "different texts"),
        ({"a": report(5, 2.0, candidates=OTHER_ORIGINAL[:1])}, "nothing but the original"),
        ({"original": report(5, 2.0)}, "another name"),
    ],
)
def test_what_cannot_be_compared(reports: dict[str, Report], said: str) -> None:
    with pytest.raises(InputError, match=said):
        side_by_side(reports)


def test_the_step_and_its_command(
    connected: object, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the report and its page; MLflow has the figure and the table."""
    from mlflow import MlflowClient

    from moeprune import tracking

    addresses = {}
    for name, made in {"reap": report(5, 2.0), "fuse": report(6, 1.5)}.items():
        (tmp_path / name).mkdir()
        made.save(tmp_path / name / "report.json")
        addresses[name] = str(tmp_path / name / "report.json")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "compared")
    with tracking.pipeline_run("sweep", {}) as run:
        compare(addresses, str(tmp_path / "all.json"), page_out=str(tmp_path / "all.html"))
    client = MlflowClient()
    assert client.get_run(run.run_id).data.tags["moeprune.front"] == "reap, fuse, original"
    text = Path(client.download_artifacts(run.run_id, TABLE, str(tmp_path))).read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["name"] for row in rows] == ["reap", "fuse", "original"]
    figures = {item.path for item in client.list_artifacts(run.run_id, "figures")}
    assert "figures/quality_against_size.png" in figures
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code, out, _ = run_cli("compare", *addresses.values(), "--out", tmp_path / "again.json")
    assert code == 0
    assert "on the front: reap, fuse, original" in out
    assert Report.load(tmp_path / "again.json") == Report.load(tmp_path / "all.json")
    assert "reap" in (tmp_path / "all.html").read_text()
    assert "name them apart" in run_cli("compare", "a=x", "a=y", "--out", tmp_path / "no.json")[2]


@pytest.mark.parametrize(
    ("methods", "ratios", "options", "said"),
    [
        ([], [0.5], {}, "at least one method"),
        (["reap"], [], {}, "at least one ratio"),
        (["reap", "reap"], [0.5], {}, "twice: reap"),
        (["reap"], [0.5, 0.5], {}, "twice"),
        (["reap"], [1.0], {}, "below 1, not 1"),
        (["magic"], [0.5], {}, "magic"),
        (["reap"], [0.5], {"fuse": {}}, "options for fuse"),
        (["random"], [0.5], {"random": {"sead": 1}}, "sead"),
    ],
)
def test_sweeps_that_make_no_sense(
    methods: list[str], ratios: list[float], options: dict[str, dict[str, Any]], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        combine(methods, ratios, options)


def test_the_defaults_of_the_sweep_make_sense() -> None:
    from moeprune.pipelines.compile import compiled
    from moeprune.pipelines.submission.package import Package

    check_sweep(Package.parse(compiled("sweep")).with_defaults({}))
    with pytest.raises(InputError, match="have the same name"):
        check_sweep(Package.parse(compiled("sweep")).with_defaults({"evaluation_data": ["a/x.txt", "b/x.txt"]}))
