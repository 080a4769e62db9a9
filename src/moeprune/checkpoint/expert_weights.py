"""One expert's weights, read from wherever a checkpoint stores them.

Where that is, is found by experiment: marks in the weights' place go through transformers' weight conversion, run
backwards, and what comes out is looked through for each projection's marks.

Axes: O outputs of a projection, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint import unsupported
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import expert_count
from moeprune.checkpoint.stored_names import stored_ways

Role = Literal["gate", "up", "down"]

_SIDE = 8  # of the marks in place of one expert's weights: a small number that conversions can halve
_ROWS = {
    "all": slice(None),
    "first half": slice(0, _SIDE // 2),
    "second half": slice(_SIDE // 2, None),
    "even": slice(0, None, 2),
    "odd": slice(1, None, 2),
}


@dataclass(frozen=True)
class _Place:
    """Where a stored tensor holds an expert's projection."""

    name: str
    is_fused: bool
    is_transposed: bool
    rows: str


class ExpertWeights:
    """Reads the gated experts of one layer, one at a time.

    Args:
        model: without weights.
        layer: name of the experts module.

    Raises:
        InputError: the checkpoint stores them in a way that is not known.
    """

    def __init__(self, files: CheckpointFiles, model: PreTrainedModel, layer: str) -> None:
        self._files = files
        self._model = model
        self._layer = layer
        self._module = model.get_submodule(layer)
        self._marks = {name: self._marks_of(name) for name in ("gate_up_proj", "down_proj")}
        self._stored = {name: self._stored_marks(name) for name in self._marks}

    @property
    def width(self) -> int:
        """Of one expert."""
        down = cast(torch.Tensor, self._module.down_proj)
        return down.shape[-2] if self._module.is_transposed else down.shape[-1]

    def dtype(self, role: Role, expert: int) -> str:
        """As safetensors writes it."""
        return self._files.entries[self._place(role, expert).name].dtype

    def read(self, role: Role, expert: int) -> torch.Tensor:
        """One projection, `[O, I]`."""
        place = self._place(role, expert)
        if place.is_fused:
            weight = self._files.read_slice(place.name, 0, expert, expert + 1)[0]
        else:
            weight = self._files.read([place.name])[place.name]
        weight = weight.T if place.is_transposed else weight
        half = len(weight) // 2
        return {
            "all": weight,
            "first half": weight[:half],
            "second half": weight[half:],
            "even": weight[::2],
            "odd": weight[1::2],
        }[place.rows]

    def _place(self, role: Role, expert: int) -> _Place:
        parameter = "down_proj" if role == "down" else "gate_up_proj"
        mark_OI = self._marks[parameter][expert]
        mark_OI = mark_OI.T if self._module.is_transposed else mark_OI
        if role != "down":
            gate, up = ("first half", "second half") if self._module.is_concatenated else ("even", "odd")
            mark_OI = mark_OI[_ROWS[gate if role == "gate" else up]]
        for name, marks in self._stored[parameter].items():
            is_fused = marks.dim() > mark_OI.dim()
            if is_fused and len(marks) != len(self._marks[parameter]):
                continue
            part = marks[expert] if is_fused else marks
            for is_transposed in (False, True):
                turned = part.T if is_transposed else part
                for rows, which in _ROWS.items():
                    if torch.equal(turned[which], mark_OI):
                        return _Place(name, is_fused, is_transposed, rows)
        raise unsupported.refusal(
            self._model.config, unsupported.UNKNOWN_PROJECTION.format(tensor=f"{self._layer}.{parameter}")
        )

    def _marks_of(self, parameter: str) -> torch.Tensor:
        experts = expert_count(self._module)
        return torch.arange(experts * _SIDE**2).view(experts, _SIDE, _SIDE)

    def _stored_marks(self, parameter: str) -> dict[str, torch.Tensor]:
        """What becomes of the marks in the way in which this checkpoint stores the parameter, by the tensors' names."""
        name = f"{self._layer}.{parameter}"
        entries, weight = self._files.entries, cast(torch.Tensor, getattr(self._module, parameter))
        wholes, marks = (stored_ways(self._model, {name: one}) for one in (weight, self._marks[parameter]))
        for whole, marked in zip(wholes, marks, strict=True):
            if all(stored in entries and entries[stored].shape == whole[stored].shape for stored in whole):
                return marked
        raise unsupported.refusal(self._model.config, unsupported.UNKNOWN_PROJECTION.format(tensor=name))
