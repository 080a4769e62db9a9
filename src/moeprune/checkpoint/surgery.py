"""Carry out a Plan on a checkpoint without building the model.

Headers tell where every tensor lies, so the shards to write are planned first, and then written as streams of the
source's bytes. What is not an expert's is carried over unchanged: the other tensors, tokenizer, chat template,
generation config, licence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from moeprune.checkpoint import constants, merging, modelling
from moeprune.checkpoint.card import card
from moeprune.checkpoint.condensing import NOTHING_CONDENSED, CondensedLayers, condense
from moeprune.checkpoint.dense_layers import put
from moeprune.checkpoint.expert_tables import renumbered
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.layout import Layout
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.merging import Mean, expert_means, merged, merged_own, router_means, stand_ins
from moeprune.checkpoint.other_files import CARD_NAME, copy_other_files, other_files
from moeprune.checkpoint.pieces import PlannedTensor, Values, unchanged
from moeprune.checkpoint.shards import SHARD_BYTES, index_of, plan_shards
from moeprune.checkpoint.sparsifying import Sparsifier
from moeprune.checkpoint.targets import LocalTarget, Target
from moeprune.checkpoint.writing import job_name, write_checkpoint
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.statistics import Stats


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written.

    Attributes:
        parameters: how many.
        zeros: those made zero.
        bytes_on_disk: of its safetensors files.
        needs_code: whether it brings a modelling file, without which it does not load.
    """

    parameters: int
    zeros: int
    bytes_on_disk: int
    needs_code: bool


def apply(
    source: Checkpoint, plan: Plan, out: Path, *, stats: Stats | None = None, shard_bytes: int = SHARD_BYTES
) -> Checkpoint:
    """Write the pruned checkpoint into a directory of this machine. See `cut`."""
    cut(source, plan, LocalTarget(out), stats=stats, shard_bytes=shard_bytes)
    return Checkpoint(out, source.trust_remote_code)


def cut(
    source: Checkpoint,
    plan: Plan,
    target: Target,
    *,
    stats: Stats | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Write the pruned checkpoint, or what of it an interrupted call with the same arguments left to do.

    Args:
        source: the original that the plan was made for.
        target: a directory that does not exist yet, or is empty, or likewise on S3.
        stats: what the plan was made from, for one that `takes_stats`.
        shard_bytes: of tensors in one file at most; a single larger tensor gets a file of its own.
        on_tensor: called now and then with how many tensors are done, and of how many.
        say: told, in words, what was there already, and what stays after an interruption.

    Raises:
        InputError: the plan is for another model, the Stats are missing or others, the place is taken, or the source
            cannot be read.
    """
    target.refuse_if_unusable()
    check_fits(source, plan)
    _check_stats(plan, stats)
    constants.check(source, plan, stats)
    sparsifier = Sparsifier(source, plan, plan.sparsity, stats) if plan.sparsity else None
    if sparsifier and (unseen := sparsifier.experts_without_tokens):
        say(f"{unseen} experts received no tokens in calibration; their weights are ranked by magnitude alone")
    condensed = condense(source, plan)
    texts = _texts(source, plan, condensed)
    files = source.files
    tensors = _planned(files, source.layout, plan, condensed, sparsifier)
    tensors = chain(tensors, condensed.planned, constants.planned(source, plan, stats))
    shards = plan_shards(tensors, shard_bytes)
    made_from = texts["pruning_plan.json"] + (stats.digest() if stats and plan.takes_stats else "")
    job = job_name(files.source, files.shards, shards, made_from)

    def write_other_files(folder: Path) -> None:
        copy_other_files(source.directory, folder)
        for name, text in texts.items():
            (folder / name).write_text(text)

    write_checkpoint(shards, files.source, target, job, write_other_files, on_tensor=on_tensor, say=say)
    return Written(
        sum(shard.parameters for shard in shards),
        sparsifier.zeros if sparsifier else 0,
        sum(shard.file_bytes for shard in shards),
        modelling.FILE_NAME in texts,
    )


@dataclass(frozen=True)
class Foreseen:
    """What a Plan will make of a model: parameters as they are stored, and bytes of all its files together."""

    parameters: int
    bytes: int


def foresee(source: Checkpoint, plan: Plan) -> Foreseen:
    """What `cut` would write, from headers alone."""
    condensed = condense(source, plan)
    shards = plan_shards(_foreseen(source, plan, condensed), SHARD_BYTES)
    texts = _texts(source, plan, condensed) | index_of(shards)
    copied = (path.stat().st_size for path in other_files(source.directory) if path.name not in texts)
    written = (len(text.encode()) for text in texts.values())
    weights = sum(shard.file_bytes for shard in shards)
    return Foreseen(sum(shard.parameters for shard in shards), weights + sum(copied) + sum(written))


def foreseen_shapes(source: Checkpoint, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The tensors that `cut` would write, by name, from headers alone."""
    return {tensor.name: tensor.shape for tensor in _foreseen(source, plan, condense(source, plan))}


def _foreseen(source: Checkpoint, plan: Plan, condensed: CondensedLayers) -> Iterator[PlannedTensor]:
    """What `cut` would write, of whatever values."""
    tensors = _planned(source.files, source.layout, plan, condensed)
    return chain(tensors, condensed.planned, constants.planned(source, plan, None))


def check_fits(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where a plan was made for another model, or cannot be carried out on this one."""
    if modelling.experts_per_layer(source.config) is not None:
        raise InputError(
            f"{source.files.address} is pruned already, layer by layer differently; prune the original with another "
            "ratio"
        )
    if plan.model != source.fingerprint:
        raise InputError(
            f"the plan was made for another model (fingerprint {plan.model[:12]}) than {source.files.address} "
            f"({source.fingerprint[:12]}); make one with `moeprune plan make` from Stats of this model"
        )
    _check_layers(source, plan)
    _check_groups(source, plan)
    merging.check(source, plan)


def _check_stats(plan: Plan, stats: Stats | None) -> None:
    """Raise InputError where the Stats that a plan was made from are missing, or are others."""
    if stats is None and plan.takes_stats:
        raise InputError(
            "carrying this plan out takes numbers from the Stats that it was made from; give them, `--stats FILE`"
        )
    if stats is not None and (stats.model, stats.data) != (plan.model, plan.data):
        what, of = ("model", "another model") if stats.model != plan.model else ("data", "other data")
        raise InputError(
            f"these Stats are of {of} (fingerprint {getattr(stats, what)[:12]}) than the plan was made from "
            f"({getattr(plan, what)[:12]}); give those that the plan was made from"
        )


def _check_layers(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where the plan's layers are not those of the model."""
    address, layers = source.files.address, source.layout.layers
    if missing := [name for name in layers if name not in plan.layers]:
        raise InputError(f"the plan does not say what becomes of {missing[0]}, a layer of {address}")
    if unknown := [name for name in plan.layers if name not in layers]:
        raise InputError(f"the plan names the layer {unknown[0]}, which {address} does not have")
    for name, layer in layers.items():
        planned = plan.layers[name]
        if planned.experts != layer.experts:
            raise InputError(
                f"the plan says that {name} has {planned.experts} `experts`, but in {address} it has {layer.experts}"
            )
        if layer.top_k not in (None, planned.top_k):
            raise InputError(
                f"the plan says that {planned.top_k} experts of {name} run for each token (`top_k`), but in {address} "
                f"{layer.top_k} do"
            )


def _check_groups(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError where the router first chooses among equal groups of experts, and they would not stay equal."""
    groups = source.layout.groups
    for name, layer in plan.layers.items():
        if layer.condensed is not None:
            continue
        kept = groups.of_each(layer.choosable, layer.experts)
        if len(set(kept)) > 1:
            raise InputError(
                f"the router of {name} chooses among {groups.count} groups of experts before it chooses experts; "
                "the plan must keep the same number of each group"
            )
        if len(layer.choosable) < groups.least_kept(layer.top_k):
            raise InputError(
                f"the router of {name} chooses {layer.top_k} experts from {groups.chosen} of {groups.count} groups, in "
                f"which the plan keeps only {kept[0] * groups.chosen}; keep more of each group"
            )


def _planned(
    files: CheckpointFiles,
    layout: Layout,
    plan: Plan,
    condensed: CondensedLayers = NOTHING_CONDENSED,
    sparsifier: Sparsifier | None = None,
) -> Iterator[PlannedTensor]:
    """Every tensor that is made of the source's of the same name, in the order in which it stores them."""
    along: dict[str, tuple[int, list[Mean]]] = {}
    own: dict[str, tuple[str, list[str], Mean]] = {}
    tables: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    left_out = condensed.left_out | layout.left_out.keys()
    for layer_name, layer in layout.layers.items():
        planned = plan.layers[layer_name]
        if planned.condensed is not None:
            continue
        experts, rows = expert_means(planned), router_means(planned)
        for name, axis in layer.fused.items():
            rows_past_the_experts = range(layer.experts, files.entries[name].shape[axis])
            chosen = rows if name in layer.routers else experts
            along[name] = axis, [*chosen, *({row: 1.0} for row in rows_past_the_experts)]
        for name in layer.tables:
            tables[name] = partial(
                renumbered, keep=planned.choosable, experts=layer.experts, stand_ins=stand_ins(planned)
            )
        for names in layer.separate:
            left_out |= set(names)
            own |= {
                names[old]: (names[new], names, mean)
                for new, (old, mean) in enumerate(zip(planned.keep, experts, strict=True))
            }
    for name, entry in files.entries.items():
        if sparsifier and sparsifier.concerns(name):
            yield sparsifier.planned(name, own[name][0] if name in own else name)
        elif name in along:
            yield merged(files, name, *along[name])
        elif name in tables:
            values = Values(entry.nbytes, partial(_changed_table, files, name, tables[name]))
            yield PlannedTensor(name, entry.dtype, entry.shape, (values,))
        elif name in own:
            yield merged_own(files, *own[name])
        elif name not in left_out:
            yield unchanged(name, entry)


def _changed_table(files: CheckpointFiles, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return change(files.read([name])[name])


def _texts(source: Checkpoint, plan: Plan, condensed: CondensedLayers) -> dict[str, str]:
    """The files that are written anew, by name."""
    layout = source.layout
    config: dict[str, Any] = json.loads((source.directory / "config.json").read_text())
    holder = config
    for part in layout.config_path[:-1]:
        holder = holder.setdefault(part, {})
    stated = layout.aliases & holder.keys() or {layout.config_path[-1]}
    choosable = [len(layer.choosable) for layer in plan.layers.values() if layer.condensed is None]
    if choosable:
        holder.update(dict.fromkeys(stated, max(choosable)))
    for path, value in (layout.config_changes | condensed.config_changes).items():
        put(config, path, value)
    texts = {
        "pruning_plan.json": plan.to_json(),
        CARD_NAME: card(plan, layout.left_out, condensed_by_code=bool(condensed.widths)),
    }
    if plan.needs_code or condensed.widths:
        base_class = _stock_class(source)
        constant_rows = {name: constants.rows(layer) for name, layer in plan.layers.items() if layer.constant}
        config |= modelling.describe(
            base_class,
            layout.config_path,
            plan.experts_per_layer,
            config.get("quantization_config"),
            constant_rows,
            condensed.widths,
        )
        texts[modelling.FILE_NAME] = modelling.source(
            base_class, layout.config_path, constants=bool(constant_rows), condensed=bool(condensed.widths)
        )
    return texts | {"config.json": json.dumps(config, indent=2) + "\n"}


def _stock_class(source: Checkpoint) -> str:
    """The transformers class that the modelling file extends.

    Raises:
        InputError: the model has code of its own.
    """
    from transformers import AutoModelForCausalLM

    config = source.config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{source.files.address} brings its own modelling code; only a plan that keeps the same number of experts "
            "in each layer, puts no constants in others' places, and condenses no layers but those that its config can "
            "call dense, can be applied to it"
        )
    return AutoModelForCausalLM._model_mapping[type(config)].__name__
