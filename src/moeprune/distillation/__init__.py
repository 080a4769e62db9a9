"""How what pruning lost is won back."""

from moeprune.distillation.local import Distilled, distill

__all__ = ["Distilled", "distill"]
