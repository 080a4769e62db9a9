"""Ridge least squares from second moments.

Axes: n features, H targets.
"""

from __future__ import annotations

import torch

_LEAST = 1e-12  # of features that are always zero, so that there is a solution: nothing


def regularised(moment_nn: torch.Tensor, ridge: float) -> torch.Tensor:
    """Second moments with a fraction of their mean added to the diagonal."""
    strength = ridge * moment_nn.diagonal().mean() + _LEAST
    return moment_nn + strength * torch.eye(len(moment_nn), dtype=moment_nn.dtype, device=moment_nn.device)


def solve(moment_nn: torch.Tensor, target_nH: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights `[n, H]` that give the targets best and stay small.

    Args:
        moment_nn: `X' X` of the features.
        target_nH: `X' Y`, of the features with the targets.
        ridge: added to the diagonal of the first, as a fraction of its mean.
    """
    return torch.cholesky_solve(target_nH, torch.linalg.cholesky(regularised(moment_nn, ridge)))
