"""Condensed layers: a router, its experts and a shared one become one dense gated MLP.

Experts that all run for every token, each times a constant, are one MLP: the rows of their gates and of their ups one
below the other, the columns of their downs side by side, times the constants (CD-MoE, arXiv 2412.00069). Where the
config can say that these layers are dense, the result is of the original's architecture, and no code is needed;
otherwise the modelling file makes them so.

Weights are computed in float32 and stored as the source's dtype; one expert's are in memory at a time, or the last
projection of a whole layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint import modelling
from moeprune.checkpoint.dense_layers import DenseLayers
from moeprune.checkpoint.expert_weights import ExpertWeights, Role
from moeprune.checkpoint.layout import build_without_weights, experts_modules
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.pieces import PlannedTensor, Values
from moeprune.checkpoint.stored_names import stored_ways
from moeprune.checkpoint.unsupported import QUANTISED_CONDENSED, quantisation, refusal
from moeprune.errors import InputError
from moeprune.moe_blocks import Activation, GatedMlp, MoeBlock, as_gated_mlp, find_block, take_apart
from moeprune.plan import LayerPlan, Plan

_ROLES: tuple[Role, ...] = ("gate", "up", "down")
_TRIED_TOKENS, _TRIED_SCALE = 5, 0.1


@dataclass(frozen=True)
class CondensedLayers:
    """What becomes of the layers that a plan condenses.

    Attributes:
        left_out: stored tensors that go.
        planned: those that come in their place.
        config_changes: dotted path in `config.json` -> value, where these make the layers dense.
        widths: experts module -> how wide the modelling file makes the dense layer, where the config cannot.
    """

    left_out: frozenset[str] = frozenset()
    planned: tuple[PlannedTensor, ...] = ()
    config_changes: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


NOTHING_CONDENSED = CondensedLayers()


def condense(source: Checkpoint, plan: Plan) -> CondensedLayers:
    """Work out, from headers alone, how a plan's condensed layers are written.

    Raises:
        InputError: the weights are quantised, a layer's experts are none that a dense MLP could stand for, or nothing
            would be left of it.
    """
    if not plan.condensed:
        return NOTHING_CONDENSED
    if method := quantisation(source.config):
        raise refusal(source.config, QUANTISED_CONDENSED.format(method=method))
    if len(plan.condensed) == len(plan.layers):
        raise InputError(
            "the plan condenses every layer, and no Mixture-of-Experts would be left; keep a router in one"
        )
    model = build_without_weights(source.config)
    layers = {name: _Layer(source, model, name, layer) for name, layer in plan.condensed.items()}
    widths = {name: layer.width for name, layer in layers.items()}
    stated = json.loads((source.directory / "config.json").read_text())
    found = DenseLayers(source.config, stated, model, widths).find()
    changes, dense = found or ({}, None)
    planned = tuple(tensor for layer in layers.values() for tensor in layer.planned(dense))
    left_out = frozenset().union(*(layer.stored for layer in layers.values()))
    return CondensedLayers(left_out, planned, changes, {} if found else widths)


class _Layer:
    """One layer that is condensed."""

    def __init__(self, source: Checkpoint, model: PreTrainedModel, name: str, plan: LayerPlan) -> None:
        assert plan.condensed is not None
        self._files = source.files
        self._model = model
        self._name = name
        self._weight_of = plan.condensed
        self._shared_scale = plan.shared_scale
        self._block = find_block(model, name)
        _try(model, self._block)
        self._experts = ExpertWeights(source.files, model, name)
        self._way, self.stored = self._stored_as(source)
        self._hidden, shared_width = self._sizes()
        self.width = shared_width + len(plan.condensed) * self._experts.width
        if not self.width:
            raise InputError(f"nothing would be left of {name}: it has no shared experts, and the plan keeps no others")

    def planned(self, dense: PreTrainedModel | None) -> Iterator[PlannedTensor]:
        """The dense layer's tensors; `dense` is the model in which the config makes it so."""
        like = self._like()
        for role, name in self._names(dense).items():
            pieces = self._columns(like) if role == "down" else self._rows(role, like)
            shape = (self._hidden, self.width) if role == "down" else (self.width, self._hidden)
            yield PlannedTensor(name, self._files.entries[like].dtype, shape, tuple(pieces))

    def _rows(self, role: Role, like: str) -> Iterator[Values]:
        """Shared and routed experts, one below the other."""
        dtype = self._files.dtype(like)
        row_bytes = self._hidden * dtype.itemsize
        if shared := self._shared_names:
            rows = self._files.entries[shared[role]].shape[0]
            yield Values(rows * row_bytes, partial(self._read_shared, shared[role], dtype))
        for expert in self._weight_of:
            yield Values(self._experts.width * row_bytes, partial(self._read, role, expert, dtype))

    def _columns(self, like: str) -> Iterator[Values]:
        dtype = self._files.dtype(like)
        yield Values(self._hidden * self.width * dtype.itemsize, partial(self._down, dtype))

    def _down(self, dtype: torch.dtype) -> torch.Tensor:
        """Shared and routed experts side by side, each times its constant."""
        down_HI = torch.empty(self._hidden, self.width, dtype=dtype)
        start = 0
        if shared := self._shared_names:
            part_HI = self._files.read([shared["down"]])[shared["down"]]
            down_HI[:, : part_HI.shape[1]] = part_HI.float() * self._shared_scale
            start = part_HI.shape[1]
        for expert, weight in self._weight_of.items():
            stop = start + self._experts.width
            down_HI[:, start:stop] = self._experts.read("down", expert).float() * weight
            start = stop
        return down_HI

    def _read(self, role: Role, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self._experts.read(role, expert).to(dtype)

    def _read_shared(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._files.read([name])[name].to(dtype)

    def _like(self) -> str:
        """A stored tensor of whose dtype the dense layer's are."""
        if shared := self._shared_names:
            return shared["down"]
        return next(iter(self._named({f"{self._name}.down_proj": self._model.get_submodule(self._name).down_proj})))

    @cached_property
    def _shared_names(self) -> dict[Role, str] | None:
        """Under which names the shared expert's weights are stored."""
        mlp = self._block.shared_mlp
        if mlp is None:
            return None
        module = f"{self._block.name}.{self._block.shared}"
        return self._stored_names(self._model, module, mlp)

    def _names(self, dense: PreTrainedModel | None) -> dict[Role, str]:
        """Under which names the dense layer's weights will be stored."""
        if dense is None:
            own = GatedMlp(*(f"{name}.weight" for name in modelling.DENSE_PROJECTIONS))
            tensors = {f"{self._block.name}.{name}": torch.empty(1, 1, device="meta") for name in vars(own).values()}
            stored = {name: next(iter(self._named({name: tensor}))) for name, tensor in tensors.items()}
            return {role: stored[f"{self._block.name}.{getattr(own, role)}"] for role in _ROLES}
        act: Activation = experts_modules(self._model)[self._name].act_fn  # type: ignore[assignment]
        mlp = as_gated_mlp(dense.get_submodule(self._block.name), act)
        assert mlp is not None
        return self._stored_names(dense, self._block.name, mlp)

    def _stored_names(self, model: PreTrainedModel, module: str, mlp: GatedMlp) -> dict[Role, str]:
        names = {role: f"{module}.{getattr(mlp, role)}" for role in _ROLES}
        return {role: next(iter(self._named({name: model.get_parameter(name)}))) for role, name in names.items()}

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the model as this checkpoint stores them."""
        return stored_ways(self._model, tensors)[self._way]

    def _stored_as(self, source: Checkpoint) -> tuple[int, frozenset[str]]:
        """In which of the ways its tensors are stored, and their names."""
        inside = self._block.name + "."
        state = {name: tensor for name, tensor in self._model.state_dict().items() if name.startswith(inside)}
        layout = source.layout.layers[self._name]
        others = {*layout.fused, *layout.tables, *(name for names in layout.separate for name in names)}
        for way, stored in enumerate(stored_ways(self._model, state)):
            if stored.keys() <= self._files.entries.keys():
                return way, frozenset(stored.keys() | (others & self._files.entries.keys()))
        raise InputError(f"{source.files.address} does not store {self._block.name} in any way that is known")

    def _sizes(self) -> tuple[int, int]:
        """The hidden size, and the shared expert's width, 0 where there is none."""
        module = self._model.get_submodule(self._name)
        down = module.down_proj
        hidden = down.shape[-1] if module.is_transposed else down.shape[-2]
        shared = self._shared_names
        return int(hidden), self._files.entries[shared["gate"]].shape[0] if shared else 0


def _try(model: PreTrainedModel, block: MoeBlock) -> None:
    """See that the block only adds up its experts, with random numbers for all weights but these.

    Raises:
        InputError: it does something else.
    """
    module = model.get_submodule(block.name)
    generator = torch.Generator().manual_seed(0)
    without_values = {
        name: tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not f"{block.name}.{name}".startswith(block.experts + ".")
    }
    try:
        for name, tensor in without_values.items():
            values = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * _TRIED_SCALE
            _set(module, name, torch.nn.Parameter(values) if isinstance(tensor, torch.nn.Parameter) else values)
        hidden = model.config.get_text_config().hidden_size
        take_apart(model, block, torch.randn(_TRIED_TOKENS, hidden, generator=generator))
    finally:
        for name, tensor in without_values.items():
            _set(module, name, tensor)


def _set(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, tensor)
