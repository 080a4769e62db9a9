"""Zeros inside the experts that stay, found while they are written: one expert's tensor is in memory at a time.

Axes: O outputs of a projection, I features that go into it.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.pieces import PlannedTensor, Values
from moeprune.checkpoint.projections import Projection, find_projections
from moeprune.checkpoint.unsupported import refuse_to_sparsify_quantised
from moeprune.errors import InputError
from moeprune.plan import Plan, Sparsity
from moeprune.sparsity import ENERGY, compared, zeros
from moeprune.statistics import Stats


class Sparsifier:
    """Makes the experts' projections sparse as a Plan says.

    Args:
        source: the checkpoint that is cut.
        stats: what the Plan was made from; may be missing where its score needs none.

    Raises:
        InputError: the weights are quantised, or stored in an order that is not known; the pattern does not fit their
            shape; or the Stats lack what the score needs.
    """

    def __init__(self, source: Checkpoint, plan: Plan, sparsity: Sparsity, stats: Stats | None) -> None:
        refuse_to_sparsify_quantised(source.config)
        _refuse_with_other_changes(plan)
        self._files = source.files
        self._keep = plan.keep
        self._sparsity = sparsity
        self._stats = stats
        self._check_statistics()
        self._projections = find_projections(source.config, source.layout, source.files)
        for name, projection in self._projections.items():
            self._check_width(name, projection)

    def _check_statistics(self) -> None:
        wanted = ENERGY[self._sparsity.score].values()
        for layer in self._stats.layers.values() if self._stats else ():
            if lacking := sorted(wanted - layer.sums.keys()):
                raise InputError(
                    f"these Stats do not hold {', '.join(lacking)}, by which the plan ranks weights; calibrate "
                    f"again with `moeprune calibrate --for {self._sparsity.score}`"
                )

    def _check_width(self, name: str, projection: Projection) -> None:
        shape = self._files.entries[name].shape
        try:
            compared(self._sparsity.pattern, shape[projection.input_axis])
        except ValueError as error:
            raise InputError(f"{name} cannot be made sparse: {error}; choose another pattern") from error

    @property
    def experts_without_tokens(self) -> int:
        """How many of those that stay have no energies to rank by."""
        statistic = ENERGY[self._sparsity.score].get("input")
        if statistic is None or self._stats is None:
            return 0
        seen = {name: layer.sums[statistic].limbs.any(-1).any(0) for name, layer in self._stats.layers.items()}
        return sum(int((~seen[name][keep]).sum()) for name, keep in self._keep.items())

    @property
    def zeros(self) -> int:
        """How many weights it makes zero in all."""
        total = 0
        for name, projection in self._projections.items():
            if self.concerns(name):
                experts = len(self._keep[projection.layer]) if projection.expert is None else 1
                sides = self._files.entries[name].shape[-2:]
                count, of = compared(self._sparsity.pattern, sides[projection.input_axis])
                total += experts * math.prod(sides) // of * count
        return total

    def concerns(self, stored: str) -> bool:
        """Whether a stored tensor holds projections of experts that stay."""
        projection = self._projections.get(stored)
        return projection is not None and projection.expert in (None, *self._keep[projection.layer])

    def planned(self, stored: str, name: str) -> PlannedTensor:
        """A stored tensor that this concerns, sparse, under a name."""
        projection, entry = self._projections[stored], self._files.entries[stored]
        if projection.expert is not None:
            make = partial(self._sparse, stored, projection, projection.expert)
            return PlannedTensor(name, entry.dtype, entry.shape, (Values(entry.nbytes, make),))
        keep, nbytes = self._keep[projection.layer], entry.nbytes // entry.shape[0]
        pieces = tuple(Values(nbytes, partial(self._sparse, stored, projection, expert)) for expert in keep)
        return PlannedTensor(name, entry.dtype, (len(keep), *entry.shape[1:]), pieces)

    def _sparse(self, stored: str, projection: Projection, expert: int) -> torch.Tensor:
        if projection.expert is None:
            weight = self._files.read_slice(stored, 0, expert, expert + 1)[0]
        else:
            weight = self._files.read([stored])[stored]
        weight_OI = weight if projection.input_axis == -1 else weight.T
        energy_I = self._energy(projection, expert)
        weight_OI.masked_fill_(zeros(weight_OI, energy_I, self._sparsity.pattern), 0)
        return weight

    def _energy(self, projection: Projection, expert: int) -> torch.Tensor | None:
        statistic = ENERGY[self._sparsity.score].get(projection.feature)
        if statistic is None or self._stats is None:
            return None
        return self._stats.layers[projection.layer].sums[statistic][expert,].value()


def _refuse_with_other_changes(plan: Plan) -> None:
    """Raise InputError where the energies are not those of the experts that are written, or zeros would not last."""
    changed = {
        "merges experts": any(layer.merged for layer in plan.layers.values()),
        "condenses layers": any(layer.condensed is not None for layer in plan.layers.values()),
        "fits what stays": plan.recovery is not None,
    }
    for what, planned in changed.items():
        if planned:
            raise InputError(f"the plan {what} and makes weights zero; only one of these can be carried out at once")
