"""Carry out a Plan on a checkpoint, tensor by tensor, without building the model.

Memory holds one shard being written and one tensor being read. What is not an expert's is carried over unchanged: the
other tensors, tokenizer, chat template, generation config, licence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeprune.atomic import build_beside, refuse_to_overwrite
from moeprune.checkpoint import modelling
from moeprune.checkpoint.card import write_card
from moeprune.checkpoint.files import SHARD_BYTES, copy_other_files, write_tensors
from moeprune.checkpoint.layout import Layout
from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.plan import Plan


def apply(
    source: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """Write the pruned checkpoint.

    Args:
        source: the original that the plan was made for.
        out: a directory that does not exist yet, or is empty.
        shard_bytes: the largest shard to write; a single larger tensor gets a shard of its own.
        on_tensor: called after each tensor with how many are done, and of how many.

    Raises:
        InputError: the plan is for another model, the place is taken, or the source cannot be read.
    """
    refuse_to_overwrite(out)
    check_fits(source, plan)
    cuts = _cuts(source.layout, plan)
    with build_beside(out) as beside:
        copy_other_files(source.directory, beside)
        _write_config(source, plan, beside)
        write_tensors(_cut(source, cuts, on_tensor), beside, shard_bytes)
        (beside / "pruning_plan.json").write_text(plan.model_dump_json(indent=1) + "\n")
        write_card(beside, plan)
    return Checkpoint(out, source.trust_remote_code)


def check_fits(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where a plan was made for another model, or cannot be carried out on this one."""
    if modelling.experts_per_layer(source.config):
        raise InputError(
            f"{source.directory} is pruned already, layer by layer differently; prune the original with another ratio"
        )
    layout = {name: layer.experts for name, layer in source.layout.layers.items()}
    planned = {name: layer.experts for name, layer in plan.layers.items()}
    if layout != planned or plan.model != source.fingerprint:
        raise InputError(
            f"the plan was made for another model (fingerprint {plan.model[:12]}) than {source.directory} "
            f"({source.fingerprint[:12]}); make one with `moeprune plan` from Stats of this model"
        )

    _check_groups(source, plan)


def _check_groups(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where the router first chooses among equal groups of experts, and they would not stay equal."""
    holder = source.config
    for part in source.layout.config_path[:-1]:
        holder = getattr(holder, part)
    groups = getattr(holder, "n_group", None) or 1
    if groups == 1 or getattr(holder, "topk_method", "") == "greedy":
        return
    for name, layer in plan.layers.items():
        kept = Counter(expert // (layer.experts // groups) for expert in layer.keep)
        if len(kept) < groups or len(set(kept.values())) > 1:
            raise InputError(
                f"the router of {name} chooses among {groups} groups of experts before it chooses experts; "
                "the plan must keep the same number of each group"
            )


# What happens to one stored tensor: its new name and values, or None where it goes.
_Cut = Callable[[torch.Tensor], torch.Tensor]


def _cuts(layout: Layout, plan: Plan) -> dict[str, tuple[str, _Cut] | None]:
    cuts: dict[str, tuple[str, _Cut] | None] = {}
    for layer_name, layer in layout.layers.items():
        keep = plan.layers[layer_name].keep
        for name, axis in layer.fused.items():
            cuts[name] = (name, partial(_select, axis=axis, keep=keep))
        for names in layer.separate:
            cuts |= dict.fromkeys(names)
            cuts |= {names[old]: (names[new], _unchanged) for new, old in enumerate(keep)}
    return cuts


def _select(tensor: torch.Tensor, axis: int, keep: list[int]) -> torch.Tensor:
    return tensor.index_select(axis, torch.tensor(keep))


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _cut(
    source: Checkpoint, cuts: dict[str, tuple[str, _Cut] | None], on_tensor: Callable[[int, int], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    total = len(source.files.entries)
    for done, (name, tensor) in enumerate(source.files.tensors(), start=1):
        action = cuts.get(name, (name, _unchanged))
        if action is not None:
            new_name, cut = action
            yield new_name, cut(tensor).contiguous()
        on_tensor(done, total)


def _write_config(source: Checkpoint, plan: Plan, out: Path) -> None:
    config: dict[str, Any] = json.loads((source.directory / "config.json").read_text())
    holder = config
    for part in source.layout.config_path[:-1]:
        holder = holder.setdefault(part, {})
    stated = source.layout.aliases & holder.keys() or {source.layout.config_path[-1]}
    holder.update(dict.fromkeys(stated, max(plan.experts_per_layer.values())))
    if not plan.is_uniform:
        base_class = _stock_class(source)
        path = source.layout.config_path
        config |= modelling.describe(base_class, path, plan.experts_per_layer)
        (out / modelling.FILE_NAME).write_text(modelling.source(base_class, path))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _stock_class(source: Checkpoint) -> str:
    """The transformers class that the modelling file extends.

    Raises:
        InputError: the model has code of its own, or keeps its router outside the block that the file rebuilds.
    """
    from transformers import AutoModelForCausalLM

    config = source.config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{source.directory} brings its own modelling code; only a uniform plan can be applied to it")
    for name, layer in source.layout.layers.items():
        block = name.rpartition(".")[0] + "."
        outside = [parameter for parameter in layer.parameters if not parameter.startswith(block)]
        if outside:
            raise InputError(
                f"the router {outside[0]} lies outside the block {block[:-1]}; only a uniform plan can be applied"
            )
    return AutoModelForCausalLM._model_mapping[type(config)].__name__
