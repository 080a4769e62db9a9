"""Where a model's experts and routers are, found by experiment and not from a table of model names.

The model is built twice on the meta device (no memory, no weights): as its config says, and with one routed expert
more. Whatever differs between the two belongs to the experts: a tensor whose axis grew by one is indexed by expert
along that axis (fused experts, router rows, biases); a tensor that only the larger model has is one expert's own.
Transformers' weight conversion, run backwards on both, tells the names under which a checkpoint stores them.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moeprune.checkpoint import modelling, prediction_layers, unsupported
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.stored_names import StoredExperts, StoredTensors, as_stored_here, stored_ways
from moeprune.errors import InputError
from moeprune.router_groups import NO_GROUPS, RouterGroups

_TABLE_AXES = 2


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer.

    Attributes:
        experts: routed experts in this layer.
        fused: name of a tensor in the checkpoint -> its expert axis. Routers are among them. Where that axis is longer
            than there are experts, what follows the last is no routed expert's (but a shared one's, or the choice to
            skip), and stays.
        separate: for tensors of one expert each, the names of all experts' tensors: `separate[j][i]` is expert i's
            j-th.
        parameters: the model's own names of all of these, by their expert axis.
        tables: names of tensors whose values are numbers of experts, `[tokens, experts per token]`.
        routers: those of `fused` that choose and weigh experts, and are no part of them.
        top_k: experts that run for a token, where the router says so.
    """

    experts: int
    fused: dict[str, int]
    separate: list[list[str]]
    parameters: dict[str, int]
    tables: list[str] = field(default_factory=list)
    routers: frozenset[str] = frozenset()
    top_k: int | None = None


@dataclass(frozen=True)
class Layout:
    """All MoE layers of a model.

    Attributes:
        layers: name of the experts module in the model -> its layout, in the order of the model.
        config_path: where the config says how many experts there are, for example `("num_experts",)`.
        aliases: every name that number may have in `config.json`.
        left_out: stored tensor -> why the pruned checkpoint does not carry it.
        config_changes: dotted path in `config.json` -> the value that the pruned checkpoint has there.
        groups: of experts, among which its routers choose first.
    """

    layers: dict[str, LayerLayout]
    config_path: tuple[str, ...]
    aliases: frozenset[str]
    left_out: dict[str, str] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    groups: RouterGroups = NO_GROUPS


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module that dispatches through transformers' `ExpertsInterface`, by its name."""
    # The interface's decorator leaves this mark on each instance; a class decorated in a version to come has it, too.
    return {name: module for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}


def expert_count(module: torch.nn.Module) -> int:
    """Routed experts of an experts module; each has this attribute, by the contract of the interface."""
    return cast(int, module.num_experts)


def build_without_weights(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a config on the meta device: names and shapes, no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


def with_experts(config: PretrainedConfig, path: tuple[str, ...], count: int) -> PretrainedConfig:
    """A copy of a config with another number of experts, which it states at `path` (`Layout.config_path`)."""
    config = copy.deepcopy(config)
    setattr(_holder(config, path), path[-1], count)
    return config


def find_layout(config: PretrainedConfig, files: CheckpointFiles | None = None) -> Layout:
    """Find the experts of a model, and of its checkpoint where `files` are given.

    Raises:
        InputError: not a Mixture-of-Experts, one of those in `unsupported`, or a checkpoint that lacks the expected
            tensors.
    """
    unsupported.refuse_quantisation(config)
    if modelling.condensed_widths(config):
        raise unsupported.refusal(config, unsupported.CONDENSED)
    if uneven := modelling.experts_per_layer(config):
        raise unsupported.refusal(config, unsupported.PRUNED_UNEVENLY.format(counts=_range(uneven.values())))
    model = build_without_weights(config)
    modules = experts_modules(model)
    if not modules:
        raise InputError(
            f"the model ({config.model_type}) is not a Mixture-of-Experts that moeprune can read: no module of it "
            "dispatches experts through transformers' ExpertsInterface"
        )
    counts = {expert_count(module) for module in modules.values()}
    if len(counts) > 1:
        raise unsupported.refusal(config, unsupported.UNEVEN.format(counts=_range(counts)))
    config_path, larger = _grow_by_one_expert(config, counts.pop())
    layers = _layer_layouts(config, model, larger, files)
    stored_here = files.entries if files else {}
    of_experts = [name for layer in layers.values() for name in chain(layer.fused, *layer.separate)]
    left_out = prediction_layers.stored(stored_here, of_experts, config.get_text_config().num_hidden_layers)
    holder = _holder(config, config_path)
    return Layout(
        layers,
        config_path,
        frozenset({config_path[-1], *(alias for alias, own in holder.attribute_map.items() if own == config_path[-1])}),
        left_out,
        prediction_layers.config_changes(config) if left_out else {},
        _router_groups(holder),
    )


def _range(counts: Iterable[int]) -> str:
    counts = set(counts)
    return f"{min(counts)} to {max(counts)}"


def _holder(config: PretrainedConfig, path: tuple[str, ...]) -> PretrainedConfig:
    for part in path[:-1]:
        config = getattr(config, part)
    return config


def _config_paths(config: PretrainedConfig, value: int, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every place in the config, sub-configs included, that holds this number."""
    for key, held in vars(config).items():
        if isinstance(held, PretrainedConfig):
            yield from _config_paths(held, value, (*prefix, key))
        elif held == value and type(held) is int:
            yield (*prefix, key)


def _grow_by_one_expert(config: PretrainedConfig, experts: int) -> tuple[tuple[str, ...], PreTrainedModel]:
    """Find which number in the config is that of the experts: the one that makes the model have one more."""
    for path in _config_paths(config, experts):
        try:
            larger = build_without_weights(with_experts(config, path, experts + 1))
        except Exception:  # another number of the same value: the model may refuse it in any way it likes
            continue
        if {expert_count(module) for module in experts_modules(larger).values()} == {experts + 1}:
            return path, larger
    raise unsupported.refusal(config, unsupported.UNKNOWN_COUNT)


def _layer_layouts(
    config: PretrainedConfig, model: PreTrainedModel, larger: PreTrainedModel, files: CheckpointFiles | None
) -> dict[str, LayerLayout]:
    modules = experts_modules(model)
    state, grown = model.state_dict(), larger.state_dict()
    per_layer: dict[str, dict[str, int]] = defaultdict(dict)
    for parameter, axis in _grown_axes(config, state, grown).items():
        per_layer[_owner(config, parameter, list(modules))][parameter] = axis
    stored = StoredTensors(files) if files else None
    layers = {}
    for name, module in modules.items():
        names = [*per_layer[name], *_tables_beside(name, state)]
        own, own_grown = {one: state[one] for one in names}, {one: grown[one] for one in names}
        routers = {one: tensor for one, tensor in own.items() if not one.startswith(f"{name}.")}
        ways = [
            _stored_experts(config, small, large, expert_count(module), frozenset(beside))
            for small, large, beside in zip(
                stored_ways(model, own), stored_ways(larger, own_grown), stored_ways(model, routers), strict=True
            )
        ]
        found = as_stored_here(ways, name, stored) if stored else ways[0]
        layers[name] = LayerLayout(
            expert_count(module),
            found.fused,
            found.separate,
            per_layer[name],
            found.tables,
            found.routers,
            _top_k(model, name),
        )
    return layers


def _top_k(model: PreTrainedModel, name: str) -> int | None:
    """What the router beside an experts module says; nearly every one has this attribute."""
    block = model.get_submodule(name.rpartition(".")[0])
    stated = {vars(part)["top_k"] for part in block.modules() if isinstance(vars(part).get("top_k"), int)}
    return stated.pop() if len(stated) == 1 else None


def _tables_beside(name: str, state: dict[str, torch.Tensor]) -> list[str]:
    """What chooses experts by the token instead of a router: whole numbers in rows, in the experts' block."""
    block = name.rpartition(".")[0] + "."
    return [
        one
        for one, tensor in state.items()
        if one.startswith(block) and tensor.dim() == _TABLE_AXES and not tensor.is_floating_point()
    ]


def _stored_experts(
    config: PretrainedConfig,
    small: dict[str, torch.Tensor],
    large: dict[str, torch.Tensor],
    experts: int,
    beside: frozenset[str],
) -> StoredExperts:
    fused = _grown_axes(config, small, large)
    return StoredExperts(
        experts,
        {stored: tuple(tensor.shape) for stored, tensor in small.items()},
        fused,
        [_siblings(stored, experts, small) for stored in large if stored not in small],
        [stored for stored, tensor in small.items() if not tensor.is_floating_point()],
        beside & fused.keys(),
    )


def _owner(config: PretrainedConfig, parameter: str, modules: list[str]) -> str:
    """The experts module that a parameter belongs to: the one that lies nearest to it."""
    common = [_common_parts(module, parameter) for module in modules]
    if len(modules) > 1 and common.count(max(common)) > 1:
        raise unsupported.refusal(config, unsupported.SHARED_ROUTER.format(tensor=parameter))
    return modules[common.index(max(common))]


def _common_parts(one: str, other: str) -> int:
    """How many leading dotted parts two names share."""
    common = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        common += 1
    return common


def _grown_axes(
    config: PretrainedConfig, small: dict[str, torch.Tensor], large: dict[str, torch.Tensor]
) -> dict[str, int]:
    """Tensors of both models that differ in shape -> the axis along which the larger has one more."""
    axes = {}
    for name in small:
        if name not in large or small[name].shape == large[name].shape:
            continue
        growth = [after - before for before, after in zip(small[name].shape, large[name].shape, strict=True)]
        if sorted(growth) != [0] * (len(growth) - 1) + [1]:
            raise unsupported.refusal(config, unsupported.UNKNOWN_GROWTH.format(tensor=name))
        axes[name] = growth.index(1)
    return axes


def _router_groups(holder: PretrainedConfig) -> RouterGroups:
    count = getattr(holder, "n_group", None) or 1
    if count == 1 or getattr(holder, "topk_method", "") == "greedy":
        return NO_GROUPS
    return RouterGroups(count, holder.topk_group)


def _siblings(extra: str, experts: int, stored: dict[str, torch.Tensor]) -> list[str]:
    """From the name of the additional expert's tensor, the names of all others', in their order."""
    parts = extra.split(".")
    for place, part in enumerate(parts):
        if part == str(experts):
            names = [".".join([*parts[:place], str(index), *parts[place + 1 :]]) for index in range(experts)]
            if all(name in stored for name in names):
                return names
    raise InputError(f"the tensor {extra} belongs to one expert, but its siblings are not numbered 0 to {experts - 1}")
