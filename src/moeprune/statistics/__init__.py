"""What the experts did on the calibration data: collected on the forward pass, kept as sums that add up."""

from moeprune.statistics.exact import ExactSum
from moeprune.statistics.stats import LayerStats, Stats, merge

__all__ = ["ExactSum", "LayerStats", "Stats", "merge"]
