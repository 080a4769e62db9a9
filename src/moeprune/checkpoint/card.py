"""The model card of a pruned checkpoint: what was done to it, for whoever finds the directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from moeprune.plan import Plan, Sparsity

ZEROS_TAKE_ROOM = (
    "Zeros take as much room as any other number: this checkpoint is as large as it would be without them, and as fast "
    "where it is served by dense kernels. The compressed-tensors library could store sparse weights in less, but no "
    "release after 0.14.0 can, and transformers wants 0.15 or later."
)

RECOVERY = """

The plan asks for what stays to be fitted after the cut (`moeprune recover`), to stand in for what goes: without that
this model is worse than it need be. Weights that were fitted differ from the original's."""


def card(plan: Plan, left_out: Mapping[str, str], *, condensed_by_code: bool = False) -> str:
    """The text of `README.md`.

    Args:
        left_out: tensors of the original that are not carried over, and why.
        condensed_by_code: whether it takes the modelling file to condense layers.
    """
    counts = sorted(set(plan.experts_per_layer.values())) or [0]
    kept = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of = max(layer.experts for layer in plan.layers.values())
    how = "It loads like any checkpoint of its architecture."
    if plan.needs_code or condensed_by_code:
        why = " and ".join(
            [
                *(["layers keep different numbers of experts"] if not plan.is_uniform else []),
                *(["constants stand in for experts"] if any(layer.constant for layer in plan.layers.values()) else []),
                *(["layers are dense that its architecture does not know so"] if condensed_by_code else []),
            ]
        )
        how = f"{why.capitalize()}, so it brings a small modelling file: load it with `trust_remote_code=True`."
    condensed = _condensed(plan) if plan.condensed else ""
    fitted = RECOVERY if plan.recovery else ""
    sparse = _sparse(plan.sparsity) if plan.sparsity else ""
    options = "".join(f"\n- {name}: {value}" for name, value in sorted(plan.options.items()))
    without = "".join(
        f"\n- left out: {count} tensors of the original ({reason})"
        for reason, count in sorted(Counter(left_out.values()).items())
    )
    return f"""---
library_name: transformers
tags: [mixture-of-experts, pruned, moeprune]
---
# A pruned Mixture-of-Experts

moeprune removed {plan.removed:.1%} of the routed experts with the method `{plan.method}`: each layer keeps {kept} of
{of}. {how}{condensed}{sparse}{fitted}

- original: fingerprint `{plan.model}`
- calibration data: fingerprint `{plan.data}`{options}{without}

`pruning_plan.json` holds the whole decision.
"""


def _condensed(plan: Plan) -> str:
    return f"""

That is said of layers that have a router. {len(plan.condensed)} of {len(plan.layers)} have none any more: what is left
of their experts, and their shared ones, run for every token as one dense MLP."""


def _sparse(sparsity: Sparsity) -> str:
    by = {
        "moe-pruner": "magnitude times the norm of their inputs weighted by the gate (MoE-Pruner)",
        "wanda": "magnitude times the norm of their inputs (Wanda)",
        "magnitude": "magnitude",
    }[sparsity.score]
    zeros, colon, of = sparsity.pattern.partition(":")
    share = f"{zeros} of every {of} weights" if colon else f"{float(zeros):.1%} of the weights"
    return f"""

In each output row of the experts' projections, {share} are zero: those of the least {by}; by magnitude alone in experts
that received no tokens in calibration. Attention, routers and shared experts are as they were. {ZEROS_TAKE_ROOM}"""
