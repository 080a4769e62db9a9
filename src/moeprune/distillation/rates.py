"""Learning rates that suit weights of any size.

A step of Adam moves every weight by about the learning rate, whatever the gradient's size. What that does to a layer
depends on how large its weights are, and on how many of them add up in an output: moved in concert, n of them move it
as much as sqrt(n) moved at random. So each parameter's rate is a fraction of its weights' size, over the square root of
how many inputs they have (the spectral condition of arXiv 2310.17813, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

_WIDTH = 256  # at which a rate is the fraction of its weights' size
_LEAST_SHARE = 0.1  # of the mean size, for parameters that are zero or near it: biases, constants


def groups(parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
    """An optimizer's groups of parameters, each with its `lr`.

    Args:
        learning_rate: at most that fraction of its size a weight of a layer of common width changes in a step.
    """
    parameters = list(parameters)
    sizes = [_size(parameter) for parameter in parameters]
    least = _LEAST_SHARE * sum(sizes) / max(1, len(sizes))
    return [
        {"params": [parameter], "lr": learning_rate * max(size, least) * _narrowing(parameter)}
        for parameter, size in zip(parameters, sizes, strict=True)
    ]


def _size(parameter: torch.Tensor) -> float:
    """The root of the mean square of the weights that are not zero."""
    values = parameter.detach().float()
    return math.sqrt(float(values.square().sum()) / max(1, int((values != 0).sum())))


def _narrowing(parameter: torch.Tensor) -> float:
    """Of rates with the width, 1 for vectors."""
    return math.sqrt(_WIDTH / parameter.shape[-1]) if parameter.dim() > 1 else 1.0
