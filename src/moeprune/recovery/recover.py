"""Fit what stays of every layer, one layer after the other, on what the original's layers are given and put out.

At each layer the router's rows are fitted first, then experts that stand for several are made of them, and last what
the layer puts out is fitted to what the original puts out. Nothing is trained: each step is a least-squares solution.

Each layer is fed by the original, not by the fitted layers before it. Inputs that have drifted make least squares
cautious: what it cannot tell from them it leaves out, and every layer leaves out a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import LayerLayout, experts_modules
from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan
from moeprune.recovery import projections, routers
from moeprune.recovery.fusing import fuse
from moeprune.recovery.neurons import write
from moeprune.recovery.say import roots
from moeprune.recovery.stream import calls_of, streaming
from moeprune.statistics.passes import Batch
from moeprune.statistics.stats import block_hash

_HELD_OUT = 8  # one sequence of so many


@dataclass(frozen=True)
class Recovered:
    """What was fitted.

    Attributes:
        error_before, error_after: layer -> the share of what its experts put out, in squares and as tokens have a say
            (`say`), that the pruned ones miss, on sequences that no projection was fitted to: before the projections
            were fitted, and after.
        parameters: the new weights, by the pruned model's own names.
    """

    error_before: dict[str, float]
    error_after: dict[str, float]
    parameters: dict[str, torch.Tensor]


@torch.inference_mode()
def recover(
    original: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: Plan,
    layout: dict[str, LayerLayout],
    batches: Sequence[Batch],
    *,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Recovered:
    """Fit the pruned model's routers and experts, in place.

    Args:
        original, pruned: in memory, in evaluation mode, on one device; the pruned one in float32.
        plan: that made one of the other; its `recovery` says what to fit.
        layout: of the original.
        batches: text, no two sequences alike.

    Raises:
        InputError: the plan asks for no recovery, or too little text to hold a sequence out.
    """
    if plan.recovery is None:
        raise InputError("the plan asks for no recovery; make one with a method that does, or with `--recover`")
    before, after = {}, {}
    names = routers.names_of(layout) if plan.recovery.router else {}
    modules = experts_modules(pruned)
    counts = [batch.mask_BS.flatten().to(pruned.device) for batch in batches]
    held_out = [mask.to(pruned.device) for mask in _held_out(batches)]
    watching = routers.Routers(original, names)
    with streaming(original, batches) as teacher:
        for done, (name, module) in enumerate(modules.items(), start=1):
            groups = _groups(plan.layers[name])
            with watching:
                teacher.go_to(name)
            if watched := watching.seen.pop(name, None):
                _fit_router(pruned, layout[name], names[name], watched, counts, groups)
            wanted = [call.run() for call in teacher.calls]
            say = roots(wanted, counts)
            for place, members in enumerate(groups):
                if len(members) > 1 and (fused := fuse(teacher.calls, say, held_out, members)):
                    write(module, place, fused)
            calls = calls_of(pruned, name, teacher.given)
            before[name], after[name] = projections.fit(calls, wanted, say, held_out)
            on_layer(done, len(modules))
    return Recovered(before, after, _changed(pruned, layout))


def _groups(layer: LayerPlan) -> list[list[int]]:
    """For each expert that stays, in order, those it stands for, itself first."""
    return [[expert, *layer.stands_for.get(expert, [])] for expert in layer.keep]


def _fit_router(
    pruned: PreTrainedModel,
    layout: LayerLayout,
    weight_name: str,
    watched: routers.Watched,
    counts: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
) -> None:
    """Where there are rows past the experts', for the choice of none, these are left as they are."""
    bias_name = weight_name.removesuffix("weight") + "bias"
    change_KH, change_K = routers.change(watched, counts, groups, bias=bias_name in layout.parameters)
    pruned.get_parameter(weight_name)[: len(groups)] += change_KH.to(pruned.device)
    if change_K is not None:
        pruned.get_parameter(bias_name)[: len(groups)] += change_K.to(pruned.device)


def _held_out(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Bool `[T]` for each batch, the same sequences whatever their order."""
    chosen = [
        torch.tensor(
            [
                int.from_bytes(block_hash(ids_S[mask_S])[-2:], "big") % _HELD_OUT == 0
                for ids_S, mask_S in zip(batch.ids_BS, batch.mask_BS, strict=True)
            ]
        )
        for batch in batches
    ]
    share = torch.cat(chosen).float().mean()
    if not 0 < share < 1:
        raise InputError(
            f"recovery holds a sequence in {_HELD_OUT} out to decide on, and there are too few sequences for that; "
            "give more text"
        )
    return [(chosen_B[:, None] & batch.mask_BS).flatten() for chosen_B, batch in zip(chosen, batches, strict=True)]


def _changed(pruned: PreTrainedModel, layout: dict[str, LayerLayout]) -> dict[str, torch.Tensor]:
    names = [name for layer in layout.values() for name in layer.parameters]
    return {name: pruned.get_parameter(name) for name in names if name in dict(pruned.named_parameters())}
