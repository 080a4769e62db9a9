"""Which stored tensors are the weights of the experts' projections, and along which axis of them their inputs lie.

Of the model's own parameters, the contract of transformers' `ExpertsInterface` says so. How a checkpoint stores them is
found by experiment: marks in their place, each the number of its place, go through transformers' weight conversion, run
backwards, and tell where they came from. So gate and up may be stored apart, one after the other or row by row, and
input axis first; biases are no projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moeprune.checkpoint import unsupported
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import build_without_weights, expert_count, experts_modules
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.sparsity import Feature

_SIDE = 8  # of the marks in place of one expert's weights: a small number that conversions can halve
_FUSED_AXES = 3


@dataclass(frozen=True)
class Projection:
    """A stored tensor of weights.

    Attributes:
        layer: name of the experts module.
        expert: whose weights they are; None for all experts', along the first axis.
        feature: what goes in.
        input_axis: of one expert's part, along which it goes in; the other is that of the outputs.
    """

    layer: str
    expert: int | None
    feature: Feature
    input_axis: int


def find_projections(config: PretrainedConfig, files: CheckpointFiles) -> dict[str, Projection]:
    """All projections of the routed experts, by the names of their stored tensors.

    Raises:
        InputError: the checkpoint stores them in a way that is not known.
    """
    model = build_without_weights(config)
    found = {}
    for layer, module in experts_modules(model).items():
        first = "gate_up_proj" if module.has_gate else "up_proj"
        features: dict[str, Feature] = {first: "input", "down_proj": "hidden"}
        for parameter, feature in features.items():
            for name, mark in _stored_marks(config, model, layer, parameter, files).items():
                read = _read(mark, expert_count(module), bool(module.is_transposed))
                if read is None:
                    raise unsupported.refusal(config, unsupported.UNKNOWN_PROJECTION.format(tensor=name))
                found[name] = Projection(layer, read[0], feature, read[1])
    return found


def _stored_marks(
    config: PretrainedConfig, model: PreTrainedModel, layer: str, parameter: str, files: CheckpointFiles
) -> dict[str, torch.Tensor]:
    """What becomes of a parameter's marks in the way in which this checkpoint stores it, by the tensors' names."""
    weight = cast(torch.Tensor, getattr(model.get_submodule(layer), parameter))
    marks = torch.arange(len(weight) * _SIDE**2).view(len(weight), _SIDE, _SIDE)
    name = f"{layer}.{parameter}"
    for whole, marked in zip(stored_ways(model, {name: weight}), stored_ways(model, {name: marks}), strict=True):
        if all(stored in files.entries and files.entries[stored].shape == whole[stored].shape for stored in whole):
            return marked
    raise unsupported.refusal(config, unsupported.UNKNOWN_PROJECTION.format(tensor=name))


def _read(mark: torch.Tensor, experts: int, transposed: bool) -> tuple[int | None, int] | None:
    """From a stored tensor of marks, whose weights it holds, and the input axis; None where the marks do not tell."""
    expert, *sides = torch.unravel_index(mark, (experts, _SIDE, _SIDE))
    source = sides[0] if transposed else sides[1]
    first = int(expert.flatten()[0])
    if mark.dim() == _FUSED_AXES and _counts_along(expert, 0, experts):
        axes, whose = (1, 2), None
    elif mark.dim() < _FUSED_AXES and bool((expert == first).all()):
        axes, whose = (0, 1), first
    else:
        return None
    along = [place for place, axis in enumerate(axes) if _counts_along(source, axis, _SIDE)]
    return (whose, along[0]) if len(along) == 1 else None


def _counts_along(number: torch.Tensor, axis: int, count: int) -> bool:
    """Whether the numbers go from 0 to before `count` along an axis, and do not change along any other."""
    return number.shape[axis] == count and bool((number.movedim(axis, -1) == torch.arange(count)).all())
