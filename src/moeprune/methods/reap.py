"""reap: drop the experts whose weighted output is smallest, on average over the tokens that choose them.

REAP (arXiv 2510.13999, section 4). With gate weights `g_i(t)` and outputs `f_i(x_t)`, expert `i` is worth

    mean over the tokens t routed to i of g_i(t) * ||f_i(x_t)||

The mean does not ask how often an expert is chosen; `contribution` is the same without the division.
"""

from __future__ import annotations

from moeprune.methods.base import Decision, Evidence, Method, Options, keep_best


def decide(evidence: Evidence, ratio: float, options: Options) -> Decision:
    layers = {}
    for name, layer in evidence.stats.layers.items():
        tokens_E = layer.count("routed_tokens").clamp(min=1)  # who is never chosen is worth 0
        layers[name] = keep_best((layer.sum("gated_norm") / tokens_E).tolist(), ratio, layer)
    return Decision(layers, score="mean norm of its weighted output, over the tokens that chose it")


METHOD = Method(
    "reap",
    "drop the experts with the smallest mean weighted output (REAP, arXiv 2510.13999), layer by layer",
    decide,
    statistics=frozenset({"gated_norm", "routed_tokens"}),
)
