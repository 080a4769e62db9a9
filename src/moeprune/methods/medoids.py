"""k-medoids by its loss: removal one by one, then exchanges while they help (PAM, Kaufman and Rousseeuw 1990).

Axes: N points, all of which may be medoids.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np


def choose(loss_NN: np.ndarray[Any, Any], count: int) -> list[int]:
    """Medoids, ascending.

    Args:
        loss_NN: `loss[i, j]`, what is lost where j stands for i; need not be symmetric. Nothing on the diagonal.
        count: how many, at least one.
    """
    stay = next(islice(_removed_one_by_one(loss_NN), len(loss_NN) - count, None))
    while better := _best_exchange(loss_NN, stay):
        stay = better
    return sorted(stay)


def lost_by_count(loss_NN: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What is lost with so many medoids, `[N + 1]`, by removal alone; infinite without any. It never rises with their
    number.
    """
    lost = [_total(loss_NN, stay) for stay in _removed_one_by_one(loss_NN)]
    return np.array([np.inf, *reversed(lost)])


def _removed_one_by_one(loss_NN: np.ndarray[Any, Any]) -> Iterator[list[int]]:
    """All points, then always one fewer: without that which is missed least."""
    stay = list(range(len(loss_NN)))
    while stay:
        yield list(stay)
        stay.remove(min(stay, key=lambda gone: _total(loss_NN, [one for one in stay if one != gone])))


def nearest(loss_NN: np.ndarray[Any, Any], medoids: list[int]) -> np.ndarray[Any, Any]:
    """Which medoid stands for each point, `[N]`; a medoid stands for itself."""
    answers_N = np.asarray(medoids)[loss_NN[:, medoids].argmin(1)]
    answers_N[medoids] = medoids
    return answers_N


def _total(loss_NN: np.ndarray[Any, Any], medoids: list[int]) -> float:
    if not medoids:
        return np.inf
    return float(loss_NN[:, medoids].min(1).sum())


def _best_exchange(loss_NN: np.ndarray[Any, Any], stay: list[int]) -> list[int] | None:
    """The set in which one medoid is another, where that is better than every other such set and than this one."""
    outside = [point for point in range(len(loss_NN)) if point not in stay]
    if not outside:
        return None
    sets = [[one for one in stay if one != gone] for gone in stay]
    # For each medoid that goes: what is lost with each point outside in its place.
    totals = np.array(
        [np.minimum(loss_NN[:, rest].min(1, initial=np.inf)[:, None], loss_NN[:, outside]).sum(0) for rest in sets]
    )
    gone, come = np.unravel_index(totals.argmin(), totals.shape)
    if not totals[gone, come] < _total(loss_NN, stay) * (1 - 1e-9):
        return None
    return [*sets[gone], outside[come]]
