"""mone: replace the experts that say the least by constants, their mean outputs.

MoNE (arXiv 2507.00390, section 3). An expert that is seldom chosen, or whose output hardly changes, is well stood in
for by its mean output. With the outputs `f_i` over the `n_i` tokens routed to it, expert `i` is worth

    n_i * (mean ||f_i||^2 - ||mean f_i||^2)

The router keeps its rows, and a token that chooses one that went gets its gate weight times the constant. A router that
chooses among groups of experts first finds them as they were; the experts that stay are the same number of each group
nevertheless, as with every method.

Axes: E experts of the layer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeprune.methods.base import Decision, Evidence, Method, Options, keep_any, keep_best
from moeprune.plan import LayerPlan
from moeprune.statistics import LayerStats


def decide(evidence: Evidence, ratio: float, options: Options) -> Decision:
    layers = {}
    for name, layer in evidence.stats.layers.items():
        layers[name] = keep_best((layer.count("routed_tokens") * variance(layer)).tolist(), ratio, layer)
    return Decision(_with_constants(layers), score="tokens that chose it, times the variance of its output")


def foresee(layers: Mapping[str, LayerStats], ratio: float, options: Options) -> Decision:
    return Decision(_with_constants(keep_any(layers, ratio)))


def _with_constants(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """In the place of all that go."""
    return {name: layer.model_copy(update={"constant": layer.drop}) for name, layer in layers.items()}


def variance(layer: LayerStats) -> torch.Tensor:
    """Of each expert's output over its tokens, summed over the hidden size: `[E]`. 0 where none chose it."""
    tokens_E = layer.count("routed_tokens").clamp(min=1)
    mean_EH = layer.sum("output") / tokens_E[:, None]
    return (layer.sum("output_square") / tokens_E - mean_EH.square().sum(-1)).clamp(min=0)


METHOD = Method(
    "mone",
    "replace the experts that are seldom chosen or vary little by their mean outputs (MoNE, arXiv 2507.00390)",
    decide,
    statistics=frozenset({"output", "output_square", "routed_tokens"}),
    foresee=foresee,
)
