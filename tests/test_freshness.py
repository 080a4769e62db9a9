"""Whether what an earlier local run made is still what a new one would make."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeprune import places
from moeprune.pipelines import freshness


class TestFreshness:
    """What an earlier run made is used again only while model, data and code are what they were."""

    def test_it_is_the_same_until_something_changes(self, tmp_path: Path) -> None:
        model, data = tmp_path / "model", tmp_path / "data.jsonl"
        model.mkdir()
        (model / "weights").write_text("1")
        data.write_text("2")

        def now() -> str:
            return freshness.state_of(str(model), f"builtin://code,{data}*3")

        first = now()
        assert now() == first
        data.write_text("22")
        second = now()
        assert second != first
        (model / "weights").write_text("11")
        assert now() not in {first, second}

    def test_other_code_is_another_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = freshness.state_of("builtin://reference", "builtin://code")
        (tmp_path / "more.py").write_text("x = 1\n")
        monkeypatch.setattr(freshness.moeprune, "__path__", [*freshness.moeprune.__path__, str(tmp_path)])
        assert freshness.state_of("builtin://reference", "builtin://code") != first

    def test_a_place_that_takes_no_look_is_its_address(self) -> None:
        assert places.version("owner/name") == places.version("owner/name") != places.version("owner/other")
