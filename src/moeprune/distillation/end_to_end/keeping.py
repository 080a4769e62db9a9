"""What a training keeps on disk: the states it can go on from, at most two at a time, and the best weights so far.

Only what learns is kept; the rest lies in the pruned checkpoint. A state counts once it carries a mark, which is
written last, when every process has written its share: from one that was interrupted nothing goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from moeprune.atomic import write_beside

LEARNT_NAME = "learnt.safetensors"
_BEST_NAME = "best.safetensors"
_WHOLE_NAME = "whole"
_STATES = "checkpoint-*"  # as transformers calls them


class Keeping:
    """The directory of a training's states."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def last(self) -> Path | None:
        """The latest state that is whole."""
        whole = [path for path in self.directory.glob(_STATES) if (path / _WHOLE_NAME).is_file()]
        return max(whole, key=_step, default=None)

    def make_whole(self, state: Path) -> None:
        """Mark a state, and remove those before it."""
        (state / _WHOLE_NAME).touch()
        self.remove_but(state)

    def remove_but(self, state: Path | None) -> None:
        """Remove all states but one."""
        for path in self.directory.glob(_STATES):
            if path != state:
                shutil.rmtree(path)

    def keep_best(self, learnt: dict[str, torch.Tensor]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with write_beside(self.directory / _BEST_NAME) as beside:
            save_file(learnt, beside)

    def best(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / _BEST_NAME)


def _step(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def whole(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """What learns, whole and on the CPU; every process must ask, since each has a shard."""
    gathered = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            gathered[name] = value.to("cpu", copy=True).contiguous()
    return gathered


@torch.no_grad()
def put_back(parameters: Iterable[tuple[str, torch.nn.Parameter]], learnt: dict[str, torch.Tensor]) -> None:
    """The other way round."""
    for name, parameter in parameters:
        if parameter.requires_grad:
            value = learnt[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
