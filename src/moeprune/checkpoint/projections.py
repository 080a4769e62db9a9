"""Which stored tensors are the weights of the experts' projections, and along which axis of them their inputs lie.

Of the model's own parameters, the contract of transformers' `ExpertsInterface` says so. How a checkpoint stores them is
found by experiment: marks in their place, each the number of its place, go through transformers' weight conversion, run
backwards, and tell where they came from. So gate and up may be stored apart, one after the other or row by row, and
input axis first; biases are no projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PretrainedConfig

from moeprune.checkpoint import unsupported
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import LayerLayout, Layout, build_without_weights, experts_modules
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.sparsity import Feature

_SIDE = 8  # of the marks in place of one expert's weights: a small number that conversions can halve
_MARKED_EXPERTS = 2  # the others' tensors are stored as theirs
_FUSED_AXES = 3


@dataclass(frozen=True)
class Projection:
    """A stored tensor of weights.

    Attributes:
        layer: name of the experts module.
        expert: whose weights they are; None for all experts', along the first axis.
        feature: what goes in.
        input_axis: -2 or -1, along which it goes in; the other is that of the outputs.
    """

    layer: str
    expert: int | None
    feature: Feature
    input_axis: int


def find_projections(config: PretrainedConfig, layout: Layout, files: CheckpointFiles) -> dict[str, Projection]:
    """All projections of the routed experts, by the names of their stored tensors.

    Raises:
        InputError: the checkpoint stores them in a way that is not known.
    """
    model = build_without_weights(config)
    found: dict[str, Projection] = {}
    for layer, module in experts_modules(model).items():
        own = _Parameters(layer, module, layout.layers[layer])
        ways = [way for way in stored_ways(model, own.marks()) if way.keys() <= files.entries.keys()]
        read = [{name: own.read(name, mark, files.entries[name].shape) for name, mark in way.items()} for way in ways]
        known = next((way for way in read if all(way.values())), None)
        if known is None:
            unknown = next((name for way in read for name, projections in way.items() if not projections), layer)
            raise unsupported.refusal(config, unsupported.UNKNOWN_PROJECTION.format(tensor=unknown))
        for projections in known.values():
            found |= projections
    return found


class _Parameters:
    """The two parameters in which an experts module holds all projections."""

    def __init__(self, layer: str, module: torch.nn.Module, layout: LayerLayout) -> None:
        self._layer = layer
        self._layout = layout
        self._transposed = bool(module.is_transposed)
        self._features: list[Feature] = ["input", "hidden"]
        self._names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
        weights = [cast(torch.Tensor, getattr(module, name)) for name in self._names]
        self._widths = [weight.shape[1 if self._transposed else 2] for weight in weights]

    def marks(self) -> dict[str, torch.Tensor]:
        """Numbers in place of the weights, no two of them the same."""
        marks = torch.arange(math.prod(self._places)).view(self._places)
        return {f"{self._layer}.{name}": part for name, part in zip(self._names, marks, strict=True)}

    @property
    def _places(self) -> tuple[int, ...]:
        return (len(self._names), _MARKED_EXPERTS, _SIDE, _SIDE)

    def read(self, name: str, mark: torch.Tensor, shape: tuple[int, ...]) -> dict[str, Projection]:
        """What a stored tensor and those like it of other experts are, by the marks that would lie in its place.

        Nothing where the marks do not tell.
        """
        parameter, expert, *sides = torch.unravel_index(mark, self._places)
        source = sides[0] if self._transposed else sides[1]
        place, first = int(parameter.flatten()[0]), int(expert.flatten()[0])
        if mark.dim() != len(shape) or bool((parameter != place).any()):
            return {}
        along = [axis for axis in (-2, -1) if _counts_along(source, axis, _SIDE) and shape[axis] == self._widths[place]]
        whose: dict[str, int | None] = {}
        if mark.dim() == _FUSED_AXES and _counts_along(expert, 0, _MARKED_EXPERTS) and shape[0] == self._layout.experts:
            whose = {name: None}
        elif mark.dim() == _FUSED_AXES - 1 and bool((expert == first).all()):
            alike = next((names for names in self._layout.separate if names[first] == name), [])
            whose = {sibling: number for number, sibling in enumerate(alike)}
        feature = self._features[place]
        return {
            stored: Projection(self._layer, number, feature, axis) for stored, number in whose.items() for axis in along
        }


def _counts_along(number: torch.Tensor, axis: int, count: int) -> bool:
    """Whether the numbers go from 0 to before `count` along an axis, and do not change along any other."""
    return number.shape[axis] == count and bool((number.movedim(axis, -1) == torch.arange(count)).all())
