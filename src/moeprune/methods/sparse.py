"""What the methods that zero weights inside experts share: every expert stays, and each loses the same share.

Which weights go is a matter of the score (`moeprune.sparsity`), and of the weights themselves, which are seen when the
Plan is carried out.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, field_validator

from moeprune.errors import InputError
from moeprune.methods.base import Decision, Evidence, Method, Options, keep
from moeprune.plan import Sparsity
from moeprune.sparsity import ENERGY, Score, compared, parse_pattern
from moeprune.statistics import LayerStats

UNSTRUCTURED = "unstructured"
_RATIO_TOLERANCE = 5e-4  # a third is not a decimal number


class SparseOptions(Options):
    pattern: str = Field(
        UNSTRUCTURED,
        description="where zeros may lie: anywhere in an output row (unstructured), or N:M for N zeros in every M "
        "weights along the input, such as 2:4 or 4:8; N/M must then be the ratio",
    )

    @field_validator("pattern")
    @classmethod
    def _check(cls, pattern: str) -> str:
        if pattern != UNSTRUCTURED and not isinstance(parse_pattern(pattern), tuple):
            raise ValueError(f"{pattern} is neither {UNSTRUCTURED} nor N:M; how much goes is said by the ratio")
        return pattern


def sparse_method(score: Score, summary: str) -> Method:
    """The method that zeroes the weights of the lowest score, and is named after it."""
    statistics = frozenset(ENERGY[score].values())
    return Method(score, summary, _decide(score), SparseOptions, removes="weights", statistics=statistics)


def _decide(score: Score) -> Callable[[Evidence, float, SparseOptions], Decision]:
    def decide(evidence: Evidence, ratio: float, options: SparseOptions) -> Decision:
        sparsity = Sparsity(pattern=_pattern(ratio, options), score=score)
        for name, layer in evidence.stats.layers.items():
            _check_widths(name, layer, sparsity)
        layers = evidence.stats.layers.items()
        return Decision(
            {name: keep(list(range(layer.experts)), layer) for name, layer in layers},
            sparsity=sparsity if ratio else None,
        )

    return decide


def _check_widths(name: str, layer: LayerStats, sparsity: Sparsity) -> None:
    """Raise InputError where a pattern N:M does not divide what goes into the experts, as far as statistics tell it."""
    for statistic in ENERGY[sparsity.score].values():
        try:
            compared(sparsity.pattern, layer.sums[statistic].limbs.shape[-1])
        except ValueError as error:
            raise InputError(f"the experts of {name} cannot be made sparse: {error}; choose another pattern") from error


def _pattern(ratio: float, options: SparseOptions) -> str:
    if options.pattern == UNSTRUCTURED:
        return str(ratio)
    zeros, of = map(int, options.pattern.split(":"))
    if abs(ratio - zeros / of) > _RATIO_TOLERANCE:
        raise InputError(
            f"the pattern {options.pattern} makes {zeros} of every {of} weights zero, which is a ratio of "
            f"{zeros / of:.4g}, not {ratio:g}; give `--ratio {zeros / of:.4g}`, or another pattern"
        )
    return options.pattern
