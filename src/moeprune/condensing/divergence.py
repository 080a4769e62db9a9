"""How far apart two hidden states are: the Jensen-Shannon divergence of their softmax over the hidden size.

CD-MoE (arXiv 2412.00069, section 3.2). Axes: T tokens, H hidden size.
"""

from __future__ import annotations

import math

import torch


def divergence(one_TH: torch.Tensor, other_TH: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence of each token's states, in nats: `[T]`, float32, from 0 to log 2."""
    one_TH, other_TH = one_TH.float().log_softmax(-1), other_TH.float().log_softmax(-1)
    mean_TH = torch.logaddexp(one_TH, other_TH) - math.log(2)
    return ((_towards(one_TH, mean_TH) + _towards(other_TH, mean_TH)) / 2).clamp_min(0)  # but for rounding it is none


def _towards(log_p_TH: torch.Tensor, log_q_TH: torch.Tensor) -> torch.Tensor:
    return (log_p_TH.exp() * (log_p_TH - log_q_TH)).sum(-1)
