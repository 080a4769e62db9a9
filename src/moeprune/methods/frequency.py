"""frequency: drop the experts that receive the fewest tokens, the same number in each layer."""

from __future__ import annotations

from moeprune.methods.base import Decision, Evidence, Method, Options, keep_best


def decide(evidence: Evidence, ratio: float, options: Options) -> Decision:
    layers = evidence.stats.layers.items()
    return Decision(
        {name: keep_best(layer.count("routed_tokens").tolist(), ratio, layer) for name, layer in layers},
        score="calibration tokens that chose it",
    )


METHOD = Method(
    "frequency",
    "drop the experts that receive the fewest calibration tokens, layer by layer",
    decide,
    statistics=frozenset({"routed_tokens"}),
)
