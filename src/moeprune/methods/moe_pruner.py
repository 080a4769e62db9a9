"""moe-pruner: zero the weights inside experts that move the gated output least. All experts stay.

MoE-Pruner (arXiv 2410.12013, section 3), one-shot and without its distillation. In each output row `o` of each
projection of expert `i`, those weights go whose

    |W[o, j]| * sqrt(sum over the tokens t routed to i of (g_i(t) * x_j(t))^2)

is lowest; `x` is what goes into the projection, `g` the gate weight. Attention, router and shared experts stay dense.
"""

from __future__ import annotations

from moeprune.methods.sparse import sparse_method

METHOD = sparse_method(
    "moe-pruner",
    "zero the weights inside experts of the smallest magnitude times norm of their inputs, weighted by the gate "
    "(MoE-Pruner, arXiv 2410.12013)",
)
