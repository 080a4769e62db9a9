"""contribution: drop the experts whose weighted outputs add up to least.

With gate weights `g_i(t)` and outputs `f_i(x_t)`, expert `i` is worth

    sum over the tokens t routed to i of g_i(t) * ||f_i(x_t)||

which is REAP's score (`reap`) times how often the expert is chosen.
"""

from __future__ import annotations

from moeprune.methods.base import Decision, Evidence, Method, Options, keep_best


def decide(evidence: Evidence, ratio: float, options: Options) -> Decision:
    layers = evidence.stats.layers.items()
    return Decision(
        {name: keep_best(layer.sum("gated_norm").tolist(), ratio, layer) for name, layer in layers},
        score="sum of the norms of its weighted outputs",
    )


METHOD = Method(
    "contribution",
    "drop the experts whose weighted outputs add up to least, layer by layer",
    decide,
    statistics=frozenset({"gated_norm"}),
)
