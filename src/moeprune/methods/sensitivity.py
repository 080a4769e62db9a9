"""How much each layer matters to what the model says.

Axes: T tokens, K experts per token, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import kl_div

from moeprune.errors import InputError
from moeprune.methods.base import Trial
from moeprune.progress import progress
from moeprune.statistics.observer import ExpertsCall, intercept


def moved_by(trial: Trial, answers: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """By how much the model's next-token probabilities move when, in one layer alone, experts answer for others.

    Args:
        answers: experts module -> for each of its experts the one that answers for it.

    Returns:
        experts module -> the Kullback-Leibler divergence from what the model says, nats per token, mean over the trial.

    Raises:
        InputError: what the model says is no number.
    """
    moved = dict.fromkeys(answers, 0.0)
    with progress("layers by need") as on_layer:
        for number, ids_S in enumerate(trial.ids_BS):
            whole_TV = _says(trial, ids_S)
            for place, (layer, answers_E) in enumerate(answers.items()):
                now_TV = _says(trial, ids_S, layer, answers_E)
                by = kl_div(now_TV, whole_TV, log_target=True, reduction="batchmean")
                moved[layer] += float(by) / len(trial.ids_BS)
                on_layer(number * len(answers) + place + 1, len(trial.ids_BS) * len(answers))
    if wrong := [layer for layer, by in moved.items() if not math.isfinite(by)]:
        raise InputError(f"what the model says when experts of {wrong[0]} answer for others is no number")
    return moved


@torch.inference_mode()
def _says(trial: Trial, ids_S: torch.Tensor, layer: str = "", answers_E: Sequence[int] = ()) -> torch.Tensor:
    """Log probabilities, `[T, V]`."""

    def run(call: ExpertsCall) -> torch.Tensor:
        index_TK = _answered(call.index_TK, answers_E) if call.layer == layer else call.index_TK
        return call.forward(call.module, call.x_TH, index_TK, call.weight_TK)

    with intercept(trial.model, run):
        logits_TV = trial.model(input_ids=ids_S[None].to(trial.model.device), use_cache=False).logits[0]
    return logits_TV.float().log_softmax(-1)


def _answered(index_TK: torch.Tensor, answers_E: Sequence[int]) -> torch.Tensor:
    """Who runs instead; what is past the experts, as some routers have it, stays as it is."""
    answers = torch.tensor(answers_E, dtype=index_TK.dtype, device=index_TK.device)
    return torch.where(index_TK < len(answers), answers[index_TK.clamp(max=len(answers) - 1)], index_TK)
