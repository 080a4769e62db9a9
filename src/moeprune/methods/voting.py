"""C-Prune's selection rule, as the authors' published selections follow it (arXiv 2504.07807).

For every group of calibration data, experts stand in clusters; in each cluster those nearest to the centre are voted
for, as its representatives. Votes add up over the groups, and the experts with the fewest go.

Axes: G groups, N experts of the list that is pruned: one layer's, or those of all layers, layer after layer.
"""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np


def representatives(members: int, rate: float, experts_per_layer: int) -> int:
    """How many of a cluster's `members` are voted for. Can be negative, which means all but so many.

    With `p = n / E`: `int(c (1 - rate) n)`, `c = 0.6 d + 0.5`, `d = exp(0.5 - p) - exp(p - 0.5) / (exp(p - 0.5) +
    exp(0.5 - p))`. `E` is the experts of one layer in the global stage too, where clusters can be larger; a negative
    number then acts, in the published selections, as the end of a slice.
    """
    if members < 3:
        return members
    share = members / experts_per_layer
    density = exp(0.5 - share) - exp(share - 0.5) / (exp(share - 0.5) + exp(0.5 - share))
    return int((0.6 * density + 0.5) * (1 - rate) * members)


def count_votes(
    label_GN: np.ndarray[Any, Any], distance_GN: np.ndarray[Any, Any], rate: float, experts_per_layer: int
) -> np.ndarray[Any, Any]:
    """Votes for each expert, `[N]` int64."""
    votes_N = np.zeros(label_GN.shape[1], dtype=np.int64)
    for label_N, distance_N in zip(label_GN, distance_GN, strict=True):
        for label in np.unique(label_N):
            members = np.flatnonzero(label_N == label)
            by_distance = members[np.argsort(distance_N[members], kind="stable")]
            votes_N[by_distance[: representatives(len(members), rate, experts_per_layer)]] += 1
    return votes_N


def ascending(votes_N: np.ndarray[Any, Any], use_N: np.ndarray[Any, Any] | None = None) -> list[int]:
    """Experts in the order in which they are pruned.

    Among equals, the least used goes first; without `use_N`, as in the published selections, the one with the lower
    index.
    """
    ties_N = np.zeros_like(votes_N) if use_N is None else use_N
    return np.lexsort((ties_N, votes_N)).tolist()  # stable: the index decides last


def fewest_votes_across_layers(
    votes_N: np.ndarray[Any, Any],
    layer_N: list[str],
    room: dict[str, int],
    count: int,
    use_N: np.ndarray[Any, Any] | None = None,
    lot: int = 1,
) -> list[int]:
    """Those to prune of all layers in one list, no layer losing more than it has room for.

    Args:
        votes_N: votes.
        layer_N: the layer of each expert.
        room: for each layer, how many more of its experts may go.
        count: how many go in all, as far as there is room.
        use_N: as in `ascending`.
        lot: a layer loses so many at once or none.
    """
    waiting: dict[str, list[int]] = {layer: [] for layer in room}
    lost = dict.fromkeys(room, 0)
    gone: list[int] = []
    for expert in ascending(votes_N, use_N):
        layer = layer_N[expert]
        if len(gone) + lot > count:
            break
        if lost[layer] + lot > room[layer]:
            continue
        waiting[layer].append(expert)
        if len(waiting[layer]) == lot:
            gone += waiting[layer]
            lost[layer] += lot
            waiting[layer] = []
    return gone
