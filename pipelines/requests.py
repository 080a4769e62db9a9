"""What a run asks for and what its pods need, as parameters of the pipeline: the file that `moeprune submit` takes."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

from moeprune import places
from moeprune.atomic import write_beside
from moeprune.estimation.estimate import Estimate, Step
from moeprune.estimation.work import END_TO_END, Work

MARGIN = 1.25  # over the estimate, part of which is assumed: who takes more memory than it asked for is ended
_GIB = 1 << 30
_NOT_THE_PIPELINES = {
    "budget", "options", "how", "evaluation_texts", "distillation_processes", "gradient_checkpointing",
}  # fmt: skip
GROUPS = {  # of steps, by how the pipeline's parameters call them
    "calibration": ("calibrate",),
    "pruning": ("global-prune",),
    "distillation": ("distill",),
    "evaluation": ("evaluate",),
    "merging": ("merge-stats", "cluster", "merge-distilled"),
}


def write(estimate: Estimate, work: Work, address: str) -> None:
    with places.output(address) as path, write_beside(path) as beside:
        beside.write_text(json.dumps(parameters(estimate, work), indent=2) + "\n")


def parameters(estimate: Estimate, work: Work) -> dict[str, Any]:
    """Parameter -> value: the run as it was estimated, and for each group of steps what a pod of it asks for."""
    found: dict[str, Any] = {"model": estimate.model, "method_options": dict(work.options)}
    budget = work.budget
    found |= {
        name: value
        for name, value in (("ratio", budget.ratio), ("parameters_ratio", budget.parameters_ratio))
        if value is not None
    }
    if budget.size is not None:
        found["size"] = f"{budget.size}B"
    for field in fields(Work):
        value = getattr(work, field.name)
        if field.name in _NOT_THE_PIPELINES or value is None:
            continue
        if field.name.endswith("_limit"):
            value = f"{value}B"
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found | _requests(estimate, work)


def _requests(estimate: Estimate, work: Work) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group, names in GROUPS.items():
        steps = [step for step in estimate.steps if step.name in names]
        if group == "distillation" and work.how == END_TO_END:
            found |= _nodes(steps[0], work)
            continue
        found[f"{group}_memory"] = quantity(max(step.memory.value for step in steps))
        if group != "merging":
            found[f"{group}_gpus"] = str(max(step.gpus for step in steps))  # a text, as the pipeline has it
    return found


def _nodes(step: Step, work: Work) -> dict[str, Any]:
    """One node of a TrainJob that has all of the GPUs."""
    training = {"epochs": work.distillation_epochs, "gradient_checkpointing": work.gradient_checkpointing}
    return {
        "distillation_nodes": 1,
        "distillation_gpus_per_node": step.gpus,
        "distillation_node_options": {"memory": quantity(step.memory.value)},
        "distillation_training": training,
    }


def quantity(size: float) -> str:
    """Whole GiB as Kubernetes writes them, with the margin."""
    return f"{max(1, math.ceil(size * MARGIN / _GIB))}Gi"
