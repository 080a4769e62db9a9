"""wanda: zero the weights inside experts that move the output least, whatever the gate. What MoE-Pruner must beat.

Wanda (arXiv 2306.11695, section 3), for each expert over the tokens that it receives: in each output row `o` of each
projection those weights go whose

    |W[o, j]| * sqrt(sum over the tokens t routed to i of x_j(t)^2)

is lowest. Attention, router and shared experts stay dense.
"""

from __future__ import annotations

from moeprune.methods.sparse import sparse_method

METHOD = sparse_method(
    "wanda",
    "zero the weights inside experts of the smallest magnitude times norm of their inputs (Wanda, arXiv 2306.11695)",
)
