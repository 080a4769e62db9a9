"""frequency: drop the experts that receive the fewest tokens, the same number in each layer."""

from __future__ import annotations

from moeprune.methods.base import Evidence, Keep, Method, Options, keep_last


def decide(evidence: Evidence, ratio: float, options: Options) -> Keep:
    return {
        name: keep_last(layer.count("routed_tokens").argsort(stable=True).tolist(), ratio, layer)
        for name, layer in evidence.stats.layers.items()
    }


METHOD = Method(
    "frequency",
    "drop the experts that receive the fewest calibration tokens, layer by layer",
    decide,
    statistics=frozenset({"routed_tokens"}),
)
