"""ExactSum: sums that do not depend on the order of adding, whatever the numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.statistics.exact import ExactSum

UNIT = Fraction(1, 2**60)
LARGEST = 2.0**50

# Tiny, ordinary and huge; denormals and both zeros too.
numbers = st.one_of(
    st.floats(-1e-15, 1e-15),
    st.floats(-1000, 1000),
    st.floats(-1e13, 1e13),
    st.floats(-1000, 1000, width=32),
    st.sampled_from([0.0, -0.0, 5e-324, 2.0**-61, 3 * 2.0**-62, -(2.0**-13), 2.0**-13, 2.0**40, -(2.0**43)]),
)


def total_of(values: list[float]) -> ExactSum:
    total = ExactSum.zeros(1)
    for value in values:
        total.add_(torch.tensor([value], dtype=torch.float64))
    return total


def rounded(value: float) -> Fraction:
    """To a multiple of 2^-60, by exact arithmetic."""
    return round(Fraction(value) / UNIT) * UNIT


def exactly(total: ExactSum) -> Fraction:
    high, low = total.limbs[:, 0].tolist()
    return Fraction(high, 2**12) + low * UNIT


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, max_size=12))
def test_the_sum_is_exact(values: list[float]) -> None:
    expected = sum(map(rounded, values), Fraction(0))
    # Each value is rounded to the unit once; round-half-even in two steps can differ from one step by a unit.
    assert abs(exactly(total_of(values)) - expected) <= UNIT * len(values)
    exact = [value for value in values if rounded(value) == Fraction(value)]
    assert exactly(total_of(exact)) == sum(map(Fraction, exact), Fraction(0))


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=12), st.data())
def test_any_order_and_any_split_give_the_same_bits(values: list[float], data: st.DataObject) -> None:
    whole = total_of(values).limbs
    assert torch.equal(total_of(data.draw(st.permutations(values))).limbs, whole)
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    parts = [total_of([value for value, part in zip(values, owner, strict=True) if part == one]) for one in range(4)]
    merged = ExactSum.zeros(1)
    for part in data.draw(st.permutations(parts)):
        merged.merge_(part)
    assert torch.equal(merged.limbs, whole)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=10))
def test_the_value_is_the_sum_rounded_to_float64(values: list[float]) -> None:
    total = total_of(values)
    assert total.value().item() == float(exactly(total))
    assert total.value().item() == pytest.approx(sum(map(Fraction, values)), rel=1e-15, abs=len(values) * 2.0**-60)


def test_what_floating_point_loses_is_kept() -> None:
    assert total_of([1e15, 0.25, -1e15]).value().item() == 0.25
    assert total_of([2.0**40, 2.0**-60, -(2.0**40)]).value().item() == 2.0**-60


def test_shapes_and_precisions_of_tensors_are_kept() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        total = ExactSum.zeros(3, 4).add_(values.to(dtype))
        assert total.shape == (3, 4)
        assert torch.equal(total.value(), values.to(dtype).to(torch.float64))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 2.0**51, -(2.0**51), 2.0**52, -(2.0**60), 1e300]
)
def test_a_value_that_cannot_be_summed_is_refused(value: float) -> None:
    with pytest.raises(OverflowError):
        ExactSum.zeros(2).add_(torch.tensor([0.5, value], dtype=torch.float64))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_leaves_the_range_is_refused(sign: int) -> None:
    for share in (0.75, 1.0):
        value = torch.tensor([sign * LARGEST * share], dtype=torch.float64)
        with pytest.raises(OverflowError):
            ExactSum.zeros(1).add_(value).add_(value)
        with pytest.raises(OverflowError):
            ExactSum.zeros(1).add_(value).merge_(ExactSum.zeros(1).add_(value))
    assert total_of([sign * LARGEST, -sign * LARGEST]).value().item() == 0


def test_limbs_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        ExactSum(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[2"):
        ExactSum(torch.zeros(3, 2, dtype=torch.int64))
