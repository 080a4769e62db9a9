"""random: drop experts by lot, the same number in each layer. What any method must beat."""

from __future__ import annotations

from random import Random

from pydantic import Field

from moeprune.methods.base import Decision, Evidence, Method, Options, keep_last


class RandomOptions(Options):
    seed: int = Field(0, description="of the lot")


def decide(evidence: Evidence, ratio: float, options: RandomOptions) -> Decision:
    lot = Random(options.seed)
    layers = evidence.stats.layers.items()
    return Decision(
        {name: keep_last(lot.sample(range(layer.experts), layer.experts), ratio, layer) for name, layer in layers}
    )


METHOD = Method("random", "drop experts by lot, layer by layer", decide, RandomOptions)
