"""random: drop experts by lot, the same number in each layer. What any method must beat."""

from __future__ import annotations

from random import Random

from pydantic import Field

from moeprune.methods.base import Evidence, Keep, Method, Options, keep_last


class RandomOptions(Options):
    seed: int = Field(0, description="of the lot")


def decide(evidence: Evidence, ratio: float, options: RandomOptions) -> Keep:
    lot = Random(options.seed)
    return {
        name: keep_last(lot.sample(range(layer.experts), layer.experts), ratio, layer)
        for name, layer in evidence.stats.layers.items()
    }


METHOD = Method("random", "drop experts by lot, layer by layer", decide, RandomOptions)
