"""The model card of a pruned checkpoint: what was done to it, for whoever finds the directory."""

from __future__ import annotations

from pathlib import Path

from moeprune.plan import Plan


def write_card(directory: Path, plan: Plan) -> None:
    """Write `README.md` beside the weights."""
    counts = sorted(set(plan.experts_per_layer.values()))
    kept = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of = max(layer.experts for layer in plan.layers.values())
    how = (
        "It loads like any checkpoint of its architecture."
        if plan.is_uniform
        else "Layers keep different numbers of experts, so it brings a small modelling file: load it with "
        "`trust_remote_code=True`."
    )
    options = "".join(f"\n- {name}: {value}" for name, value in sorted(plan.options.items()))
    (directory / "README.md").write_text(
        f"""---
library_name: transformers
tags: [mixture-of-experts, pruned, moeprune]
---
# A pruned Mixture-of-Experts

moeprune removed {plan.removed:.1%} of the routed experts with the method `{plan.method}`: each layer keeps {kept} of
{of}. {how}

- original: fingerprint `{plan.model}`
- calibration data: fingerprint `{plan.data}`{options}

`pruning_plan.json` holds the whole decision.
"""
    )
