"""What a domain's experts are, from Stats whose use is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from moeprune.domain_experts import compare
from moeprune.errors import InputError

LAYER = "model.layers.0.mlp.experts"
CODE, PROSE = [40, 30, 20, 10, 0, 0, 0, 0], [0, 10, 20, 10, 30, 30, 0, 0]


def test_two_domains_by_hand() -> None:
    found = compare({"code": tiny.make_stats([CODE]), "prose": tiny.make_stats([PROSE])})
    code, prose = (found.domains[name].layers[LAYER] for name in ("code", "prose"))
    assert [(own.expert, own.share, own.times) for own in code.own] == [(0, 0.4, None), (1, 0.3, pytest.approx(3))]
    assert [(own.expert, own.times) for own in prose.own] == [(4, None), (5, None)]
    assert code.top_half == pytest.approx(1)
    assert prose.top_half == pytest.approx(0.9)
    (overlap,) = found.overlaps
    assert (overlap.domains, overlap.mean) == (("code", "prose"), pytest.approx(0.1 + 0.2 + 0.1))


def test_an_expert_is_its_domains_own_from_a_factor_on() -> None:
    stats = {"code": tiny.make_stats([CODE]), "prose": tiny.make_stats([PROSE])}
    own = {
        times: [own.expert for own in compare(stats, times).domains["code"].layers[LAYER].own] for times in (1, 3, 4)
    }
    assert own == {1: [0, 1, 2], 3: [0, 1], 4: [0]}  # 3 is used less than an even share


def test_the_others_count_alike_however_much_there_is_of_them() -> None:
    stats = {"code": tiny.make_stats([[8, 2]], top_k=1), "prose": tiny.make_stats([[2, 8]], top_k=1)}
    larger = stats | {"prose": tiny.make_stats([[200, 800]], top_k=1)}
    assert compare(stats).domains == compare(larger).domains


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_concentration_is_between_even_and_one_expert(routed: list[int]) -> None:
    (use,) = compare({"code": tiny.make_stats([routed], top_k=1)}).domains["code"].layers.values()
    assert 0.5 - 1e-9 <= use.top_half <= 1 + 1e-9
    assert 1 - 1e-9 <= use.effective_experts <= np.count_nonzero(routed) + 1e-9
    assert use.own == []
    assert sum(use.share) == pytest.approx(1)


def test_concentration_by_hand() -> None:
    even, one, odd = (
        compare({"code": tiny.make_stats([routed], top_k=1)}).domains["code"].layers[LAYER]
        for routed in ([5] * 6, [0, 7, 0], [1, 2, 1])
    )
    assert (even.top_half, even.effective_experts) == (pytest.approx(0.5), pytest.approx(6))
    assert (one.top_half, one.effective_experts) == (1, 1)
    assert odd.top_half == pytest.approx(0.5 + 0.25 / 2)
    assert odd.effective_experts == pytest.approx(2 * math.sqrt(2))


def test_stats_of_another_model() -> None:
    with pytest.raises(InputError, match="Stats of prose are of another model"):
        compare({"code": tiny.make_stats([CODE]), "prose": tiny.make_stats([PROSE], model="a" * 64)})


class TestTheCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[str, ...]:
        for name, use in (("code", CODE), ("prose", PROSE)):
            tiny.make_stats([use, use]).save(tmp_path / f"{name}.safetensors")
        return tuple(f"{tmp_path}/{name}.safetensors" for name in ("code", "prose"))

    def test_table_json_and_figure(
        self, files: tuple[str, ...], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
    ) -> None:
        out, figure = tmp_path / "experts.json", tmp_path / "experts.svg"
        given = [part for file in files for part in ("--stats", file)]
        code, said, error = run_cli("experts", *given, "--out", out, "--figure", figure)
        assert code == 0, error
        assert "0 (only here), 1 (3.0x)" in said
        assert "its own are 4 of 16 experts" in said
        assert "code and prose" in said
        assert "40%" in said
        told = json.loads(out.read_text())
        own = told["domains"]["code"]["layers"][LAYER]["own"]
        assert own[0] == {"expert": 0, "share": 0.4, "times": None}
        assert own[1]["times"] == pytest.approx(3)
        assert "<svg" in figure.read_text()

    def test_one_domain_alone(self, files: tuple[str, ...], run_cli: Callable[..., tuple[int, str, str]]) -> None:
        code, said, _ = run_cli("experts", "--stats", f"law={files[0]}")
        assert code == 0
        assert "law: " in said
        assert "Give the Stats of other data, too" in said

    def test_what_is_refused(self, files: tuple[str, ...], run_cli: Callable[..., tuple[int, str, str]]) -> None:
        for arguments, expected in (
            (("--stats", files[0], "--stats", files[0]), "two Stats are of code; name them apart"),
            (("--stats", files[0], "--figure", "use.bmp"), "written as .png, .svg or .pdf"),
            (("--stats", "nowhere"), "there is no file nowhere"),
        ):
            code, _, error = run_cli("experts", *arguments)
            assert code == 1
            assert expected in error
