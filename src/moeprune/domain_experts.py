"""What a domain's experts are: whom it uses more than other data do, how concentrated its use is, how much it shares.

All is read from the Stats of several calibrations of one model: an expert's share is that of a layer's choices of
experts that fall on it.

Axes: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.statistics import Stats

TIMES = 2.0


class OwnExpert(BaseModel):
    """An expert that a domain uses more than the others do.

    Attributes:
        share: of the layer's choices on the domain.
        times: as large as on the other data, on average; None where they never choose it.
    """

    expert: int
    share: float
    times: float | None


class LayerUse(BaseModel):
    """One domain's use of a layer's experts.

    Attributes:
        share: of the choices, by expert; they add up to 1.
        top_half: the share of the more used half of the experts; 0.5 where all are used alike, at most 1.
        effective_experts: over how many experts choices spread: the exponential of their entropy, from 1 to all.
        own: the domain's own experts, those it uses most first.
    """

    share: list[float]
    top_half: float
    effective_experts: float
    own: list[OwnExpert]


class DomainUse(BaseModel):
    """One domain: the fingerprint and addresses of its data, and each layer's use."""

    data: str
    sources: list[str]
    tokens: int
    layers: dict[str, LayerUse]


class Overlap(BaseModel):
    """How much of their choices two domains share: 1 where they use the experts alike, 0 where they share none."""

    domains: tuple[str, str]
    mean: float
    layers: dict[str, float]


class DomainExperts(BaseModel):
    """Of all domains. `times`: what makes an expert a domain's own, see `compare`."""

    model_config = ConfigDict(extra="forbid")

    moeprune_experts: Literal[1] = 1
    model: str
    times: float
    domains: dict[str, DomainUse]
    overlaps: list[Overlap]

    def save(self, path: Path) -> None:
        with write_beside(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")

    @property
    def use(self) -> dict[str, dict[str, list[float]]]:
        """Domain -> layer -> each expert's share."""
        return {
            domain: {name: layer.share for name, layer in used.layers.items()} for domain, used in self.domains.items()
        }


def compare(stats: Mapping[str, Stats], times: float = TIMES) -> DomainExperts:
    """Compare domains.

    Args:
        stats: of each domain, by its name; of one alone, no expert is its own.
        times: an expert is a domain's own where its share there is at least an even one, and at least so many times
            its mean share in the others.

    Raises:
        InputError: Stats of different models, or without the routed tokens.
    """
    first = next(iter(stats.values()))
    for name, other in stats.items():
        if other.model != first.model:
            raise InputError(f"the Stats of {name} are of another model than the first; calibrate the same one")
    share = {domain: {name: _share(layer.count("routed_tokens").numpy()) for name, layer in each.layers.items()}
             for domain, each in stats.items()}  # fmt: skip
    return DomainExperts(
        model=first.model,
        times=times,
        domains={
            domain: DomainUse(
                data=each.data,
                sources=each.sources,
                tokens=each.tokens,
                layers={
                    name: _layer_use(share_E, [share[other][name] for other in stats if other != domain], times)
                    for name, share_E in share[domain].items()
                },
            )
            for domain, each in stats.items()
        },
        overlaps=[_overlap(one, other, share) for one, other in combinations(stats, 2)],
    )


def _share(routed_E: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of a layer that no token reached, all alike."""
    total = routed_E.sum()
    return routed_E / total if total else np.full(len(routed_E), 1 / len(routed_E))


def _layer_use(share_E: NDArray[np.float64], others: list[NDArray[np.float64]], times: float) -> LayerUse:
    seen_E = share_E[share_E > 0]
    own = []
    if others:
        elsewhere_E = np.mean(others, axis=0)
        enough_E = np.maximum(1 / len(share_E), times * elsewhere_E)
        is_own_E = share_E >= enough_E * (1 - 1e-9)  # exactly so much is enough, whatever the rounding
        for expert in sorted(np.flatnonzero(is_own_E), key=lambda expert: -share_E[expert]):
            more = float(share_E[expert] / elsewhere_E[expert]) if elsewhere_E[expert] else None
            own.append(OwnExpert(expert=int(expert), share=float(share_E[expert]), times=more))
    return LayerUse(
        share=share_E.tolist(),
        top_half=_top_half(share_E),
        effective_experts=float(np.exp(-(seen_E * np.log(seen_E)).sum())),
        own=own,
    )


def _top_half(share_E: NDArray[np.float64]) -> float:
    """Of an odd number of experts, the one in the middle counts half."""
    descending_E = np.sort(share_E)[::-1]
    whole, half = divmod(len(share_E), 2)
    return float(descending_E[:whole].sum() + (descending_E[whole] / 2 if half else 0))


def _overlap(one: str, other: str, share: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> Overlap:
    layers = {name: float(np.minimum(share_E, share[other][name]).sum()) for name, share_E in share[one].items()}
    return Overlap(domains=(one, other), mean=sum(layers.values()) / len(layers), layers=layers)
