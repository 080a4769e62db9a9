"""The model card of a pruned checkpoint: what was done to it, for whoever finds the directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from moeprune.plan import Plan


def card(plan: Plan, left_out: Mapping[str, str]) -> str:
    """The text of `README.md`.

    Args:
        left_out: tensors of the original that are not carried over, and why.
    """
    counts = sorted(set(plan.experts_per_layer.values()))
    kept = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of = max(layer.experts for layer in plan.layers.values())
    how = "It loads like any checkpoint of its architecture."
    if plan.needs_code:
        why = " and ".join(
            [
                *(["layers keep different numbers of experts"] if not plan.is_uniform else []),
                *(["constants stand in for experts"] if any(layer.constant for layer in plan.layers.values()) else []),
            ]
        )
        how = f"{why.capitalize()}, so it brings a small modelling file: load it with `trust_remote_code=True`."
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
{of}. {how}

- original: fingerprint `{plan.model}`
- calibration data: fingerprint `{plan.data}`{options}{without}

`pruning_plan.json` holds the whole decision.
"""
