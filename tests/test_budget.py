"""A budget of parameters or bytes is kept, by as little as the method's steps allow, and refused where it cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.budget import Budget, plan_for
from moeprune.checkpoint import surgery
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import foresee
from moeprune.errors import InputError
from moeprune.methods import make_plan
from moeprune.plan import Plan
from moeprune.statistics import Stats

STEPS = {"c-prune": 1, "frequency": 3}  # experts by which a method's whole removal changes, of 3 layers


@pytest.fixture(scope="module")
def source(checkpoint_of: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(checkpoint_of("qwen2_moe"))


@pytest.fixture(scope="module")
def stats(source: Checkpoint) -> Stats:
    routed = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21]]
    return tiny.make_stats(routed, model=source.fingerprint)


def made(budget: Budget, method: str, stats: Stats, source: Checkpoint) -> Plan:
    return plan_for(budget, lambda ratio: make_plan(method, ratio, stats), method, stats, source)


def ends(stats: Stats, source: Checkpoint) -> tuple[int, int]:
    """Bytes with as few experts as there can be, and with all."""
    smallest, whole = (foresee(source, make_plan("frequency", ratio, stats)).bytes for ratio in (0.75, 0))
    return smallest, whole


@pytest.mark.parametrize("method", STEPS)
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.05, 1.1))
def test_a_size_is_kept_by_as_little_as_can_be(method: str, share: float, stats: Stats, source: Checkpoint) -> None:
    smallest, whole = ends(stats, source)
    budget = Budget(size=round(smallest + share * (whole - smallest)))
    plan = made(budget, method, stats, source)
    assert budget.size
    assert foresee(source, plan).bytes <= budget.size
    gone = round(plan.removed * 24)
    if gone:
        less = make_plan(method, (gone - STEPS[method]) / 24, stats).model_copy(update={"budget": plan.budget})
        assert foresee(source, less).bytes > budget.size


@pytest.mark.parametrize("method", STEPS)
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.001, 0.99))
def test_a_share_of_parameters_goes(method: str, share: float, stats: Stats, source: Checkpoint) -> None:
    try:
        plan = made(Budget(parameters_ratio=share), method, stats, source)
    except InputError as error:
        found = re.search(r"--parameters-ratio (0\.\d+)", str(error))
        assert found
        assert float(found[1]) < share
        assert made(Budget(parameters_ratio=float(found[1])), method, stats, source).removed == 0.75
        return
    left = (1 - share) * source.files.parameters
    assert foresee(source, plan).parameters <= left
    less = make_plan(method, (round(plan.removed * 24) - STEPS[method]) / 24, stats)
    assert foresee(source, less).parameters > left


@pytest.mark.parametrize("method", STEPS)
def test_what_is_foreseen_is_what_is_written(method: str, stats: Stats, source: Checkpoint, tmp_path: Path) -> None:
    smallest, whole = ends(stats, source)
    size = (smallest + whole) // 2
    plan = made(Budget.of(None, None, f"{size}B"), method, stats, source)
    assert plan.budget == f"at most {size:,} bytes"
    written = surgery.apply(source, plan, tmp_path / "pruned")
    on_disk = sum(path.stat().st_size for path in written.directory.rglob("*") if path.is_file())
    assert foresee(source, plan) == surgery.Foreseen(written.files.parameters, on_disk)
    assert on_disk <= size


def test_several_shards_are_foreseen_with_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(tiny.write(tmp_path / "model", tiny.FAMILIES["mixtral"](), shard="100KB"))
    plan = tiny.plan_for(list(source.layout.layers), [[0, 1, 2], [4, 5, 6]], source.fingerprint)
    monkeypatch.setattr(surgery, "SHARD_BYTES", 100_000)
    written = surgery.apply(source, plan, tmp_path / "pruned", shard_bytes=100_000)
    assert len(written.files.shards) > 1
    on_disk = sum(path.stat().st_size for path in written.directory.rglob("*") if path.is_file())
    assert foresee(source, plan).bytes == on_disk


@pytest.mark.parametrize("method", STEPS)
def test_a_size_that_no_allocation_reaches(method: str, stats: Stats, source: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"no allocation makes .* at most 1,000 bytes") as refused:
        made(Budget(size=1000), method, stats, source)
    nearest = re.search(r"--size (\S+)", str(refused.value))
    assert nearest
    plan = made(Budget.of(None, None, nearest[1]), method, stats, source)
    assert plan.removed == 0.75


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ((None, None, None), "none of them given"),
            ((0.5, None, "1GB"), "--ratio and --size of them given"),
            ((None, 0.2, "1GB"), "--parameters-ratio and --size of them given"),
            ((1.0, None, None), "below 1"),
            ((None, 1.0, None), "below 1"),
            ((None, None, "small"), "'small' is not a size"),
        ],
    )
    def test_what_is_no_budget(self, given: tuple[float | None, float | None, str | None], said: str) -> None:
        with pytest.raises(InputError, match=said):
            Budget.of(*given)

    def test_no_model(self, stats: Stats) -> None:
        with pytest.raises(InputError, match="--model"):
            plan_for(Budget(size=1000), lambda ratio: make_plan("frequency", ratio, stats), "frequency", stats, None)

    def test_another_model(self, source: Checkpoint) -> None:
        other = tiny.make_stats([[1] * 8] * 3)
        with pytest.raises(InputError, match="not made from"):
            made(Budget(size=1000), "frequency", other, source)
