"""Where a model's experts and routers are, found by experiment and not from a table of model names.

The model is built twice on the meta device (no memory, no weights): as its config says, and with one routed expert
more. Whatever differs between the two belongs to the experts: a tensor whose axis grew by one is indexed by expert
along that axis (fused experts, router rows, biases); a tensor that only the larger model has is one expert's own.
Transformers' weight conversion, run backwards on both, tells the names under which a checkpoint stores them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.errors import InputError


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer.

    Attributes:
        experts: routed experts in this layer.
        fused: name of a tensor in the checkpoint -> its expert axis. Routers are among them.
        separate: for tensors of one expert each, the names of all experts' tensors: `separate[j][i]` is expert i's
            j-th.
        parameters: the model's own names of all of these, by their expert axis.
    """

    experts: int
    fused: dict[str, int]
    separate: list[list[str]]
    parameters: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """All MoE layers of a model.

    Attributes:
        layers: name of the experts module in the model -> its layout, in the order of the model.
        config_path: where the config says how many experts there are, for example `("num_experts",)`.
        aliases: every name that number may have in `config.json`.
        left_out: stored tensor -> why the pruned checkpoint does not carry it.
        config_changes: dotted path in `config.json` -> the value that the pruned checkpoint has there.
    """

    layers: dict[str, LayerLayout]
    config_path: tuple[str, ...]
    aliases: frozenset[str]
    left_out: dict[str, str] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)


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


def find_layout(config: PretrainedConfig, files: CheckpointFiles | None = None) -> Layout:
    """Find the experts of a model, and of its checkpoint where `files` are given.

    Raises:
        InputError: not a Mixture-of-Experts, one that transformers does not dispatch through its experts interface,
            layers with different numbers of experts, or a checkpoint that lacks the expected tensors.
    """
    model = build_without_weights(config)
    modules = experts_modules(model)
    if not modules:
        raise InputError(
            f"{_describe(config)} is not a Mixture-of-Experts that moeprune can read: no module of it dispatches "
            "experts through transformers' ExpertsInterface"
        )
    counts = {expert_count(module) for module in modules.values()}
    if len(counts) > 1:
        raise InputError(
            f"{_describe(config)} has layers with different numbers of experts ({sorted(counts)}); prune the original"
        )
    experts = counts.pop()
    config_path, larger = _grow_by_one_expert(config, experts)
    layers = {name: _layer_layout(model, larger, name, modules, experts, files) for name in modules}
    holder = _holder(config, config_path)
    key = config_path[-1]
    aliases = {alias for alias, canonical in holder.attribute_map.items() if canonical == key}
    return Layout(layers, config_path, frozenset({key, *aliases}))


def _describe(config: PretrainedConfig) -> str:
    return f"the model ({config.model_type})"


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
        candidate = copy.deepcopy(config)
        setattr(_holder(candidate, path), path[-1], experts + 1)
        try:
            larger = build_without_weights(candidate)
        except Exception:  # another number of the same value: the model may refuse it in any way it likes
            continue
        if {expert_count(module) for module in experts_modules(larger).values()} == {experts + 1}:
            return path, larger
    raise InputError(f"{_describe(config)}: no number in its config sets how many routed experts there are")


def _layer_layout(
    model: PreTrainedModel,
    larger: PreTrainedModel,
    name: str,
    modules: dict[str, torch.nn.Module],
    experts: int,
    files: CheckpointFiles | None,
) -> LayerLayout:
    state, grown = model.state_dict(), larger.state_dict()
    parameters = {
        parameter: axis
        for parameter, axis in _grown_axes(state, grown, experts).items()
        if max(modules, key=lambda other: _common_parts(other, parameter)) == name
        and _common_parts(name, parameter) > 0
    }
    as_stored = _stored(model, {p: state[p] for p in parameters})
    as_stored_grown = _stored(larger, {p: grown[p] for p in parameters})
    fused = _grown_axes(as_stored, as_stored_grown, experts)
    separate = [_siblings(extra, experts, as_stored) for extra in as_stored_grown if extra not in as_stored]
    layout = LayerLayout(experts, fused, separate, parameters)
    if files is None or _is_stored_so(files, as_stored):
        return layout
    if _is_stored_so(files, {p: state[p] for p in parameters}):  # saved under the model's own names
        return LayerLayout(experts, parameters, [], parameters)
    missing = sorted(set(as_stored) - set(files.entries))
    raise InputError(
        f"{files.address} does not hold the experts of {name} as its config describes them; "
        + (f"missing: {', '.join(missing[:3])}" if missing else "their shapes differ")
    )


def _grown_axes(small: dict[str, torch.Tensor], large: dict[str, torch.Tensor], experts: int) -> dict[str, int]:
    axes = {}
    for name in small.keys() & large.keys():
        pairs = zip(small[name].shape, large[name].shape, strict=True)
        grown = [axis for axis, (before, after) in enumerate(pairs) if after != before]
        if grown and small[name].shape[grown[0]] == experts:
            axes[name] = grown[0]
    return {name: axes[name] for name in small if name in axes}


def _common_parts(one: str, other: str) -> int:
    """How many leading dotted parts two names share."""
    common = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        common += 1
    return common


def _stored(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """These parameters under the names and in the shapes of a checkpoint."""
    model._weight_conversions = get_model_conversion_mapping(model)
    return revert_weight_conversion(model, state)


def _siblings(extra: str, experts: int, stored: dict[str, torch.Tensor]) -> list[str]:
    """From the name of the additional expert's tensor, the names of all others', in their order."""
    parts = extra.split(".")
    for place, part in enumerate(parts):
        if part == str(experts):
            names = [".".join([*parts[:place], str(index), *parts[place + 1 :]]) for index in range(experts)]
            if all(name in stored for name in names):
                return names
    raise InputError(f"the tensor {extra} belongs to one expert, but its siblings are not numbered 0 to {experts - 1}")


def _is_stored_so(files: CheckpointFiles, expected: dict[str, torch.Tensor]) -> bool:
    return all(
        name in files.entries and files.entries[name].shape == tuple(tensor.shape) for name, tensor in expected.items()
    )
