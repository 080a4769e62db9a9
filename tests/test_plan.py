"""A Plan is JSON to read, edit and replay; one that cannot be carried out is refused where it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan

NAMES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]

keeps = st.sets(st.integers(0, tiny.EXPERTS - 1), min_size=tiny.TOP_K).map(sorted)


@settings(max_examples=50, deadline=None)
@given(one=keeps, other=keeps)
def test_what_is_saved_is_what_is_loaded(
    one: list[int], other: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = tiny.plan_for(NAMES, [one, other], "f" * 64)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert plan.experts_per_layer == dict(zip(NAMES, [len(one), len(other)], strict=True))
    assert plan.is_uniform == (len(one) == len(other))
    assert plan.removed == pytest.approx(1 - (len(one) + len(other)) / (2 * tiny.EXPERTS))
    for layer in plan.layers.values():
        assert sorted(layer.keep + layer.drop) == list(range(tiny.EXPERTS))


def test_it_is_json_that_a_person_reads(tmp_path: Path) -> None:
    tiny.plan_for(NAMES, [[0, 1], [2, 7]], "f" * 64).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["moeprune_plan"] == 2
    assert content["layers"][NAMES[1]] == {"experts": 8, "top_k": 2, "keep": [2, 7]}
    assert {"method", "options", "ratio", "model", "data"} < content.keys()


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ([1, 0], "ascending"),
        ([1, 1, 2], "without repeats"),
        ([-1, 2], "between 0 and 7"),
        ([2, 8], "between 0 and 7"),
        ([3], "1 experts would stay, but 2 run"),
        ([], "0 experts would stay, but 2 run"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(keep: list[int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        LayerPlan(experts=8, top_k=2, keep=keep)
    content = json.loads(tiny.plan_for(NAMES, [[0, 1], [0, 1]], "f").model_dump_json())
    content["layers"][NAMES[0]]["keep"] = keep
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"not a valid plan: layers\.{NAMES[0]}: .*{said}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change", [{"moeprune_plan": 1}, {"surprise": 1}, {"layers": []}, {"ratio": "half"}, {"method": None}]
)
def test_another_version_or_shape_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads(tiny.plan_for(NAMES, [[0, 1], [0, 1]], "f").model_dump_json())
    (tmp_path / "plan.json").write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=f"not a valid plan: {next(iter(change))}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Plan.load(path)
