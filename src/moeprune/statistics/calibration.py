"""Run the calibration data through the model once and take down what its experts do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import torch

from moeprune.errors import InputError
from moeprune.router_groups import NO_GROUPS, RouterGroups
from moeprune.statistics.collectors import OUTSIDE, Collector, Seen, find
from moeprune.statistics.exact import ExactSum
from moeprune.statistics.observer import ExpertsCall
from moeprune.statistics.passes import Batch, ForwardPass
from moeprune.statistics.stats import LayerStats, Stats, block_hash, data_fingerprint

BATCH_TOKENS = 8192  # the weights are read once per batch, by the model as by the probes: a small one is slow for both
GROUPS = 8


@torch.inference_mode()
def calibrate(
    run: ForwardPass,
    fingerprint: str,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor | None = None,
    *,
    statistics: Iterable[str] = OUTSIDE,
    source: str = "",
    groups: int = GROUPS,
    router_groups: RouterGroups = NO_GROUPS,
    batch_blocks: int | None = None,
    shard: int = 0,
    shards: int = 1,
    sums_in: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Collect Stats.

    Args:
        run: takes the tokens through the model.
        fingerprint: of the model's checkpoint; the Stats carry it.
        ids_BS: int64 token ids, `[blocks, tokens per block]`.
        mask_BS: bool; False is padding, to the right of a block's tokens. It counts in nothing. None: there is none.
        statistics: what to collect (`collectors`); by default all that is seen from outside the experts.
        source: address of the data; the Stats carry it.
        groups: C-Prune clusters each group of blocks for itself and lets the groups vote. Which group a block falls
            into is read from its content, so that it is the same whoever computes it.
        router_groups: of the model's layout.
        batch_blocks: blocks per forward pass; by default as many as make `BATCH_TOKENS`.
        shard, shards: take only every `shards`-th batch, from `shard` on. The Stats of all shards, merged, are those of
            one run over everything, bit for bit.
        sums_in: an empty directory for files in which the sums are kept, mapped, where memory is short; they are needed
            as long as the Stats. None: they are kept in memory.
        on_progress: called with how much is done, and of how much.

    Raises:
        InputError: an impossible shard or an unknown statistic, a model whose outputs are not finite, or too little
            memory for one block.
    """
    if batch_blocks is None:
        batch_blocks = max(1, BATCH_TOKENS // ids_BS.shape[1])
    if groups < 1 or batch_blocks < 1:
        raise InputError(f"{groups} groups, {batch_blocks} blocks per batch: both must be at least 1")
    batches = shard_of(make_batches(ids_BS, mask_BS, batch_blocks), shard, shards)
    hashes = [
        [block_hash(ids_S[mask_S]) for ids_S, mask_S in zip(batch.ids_BS, batch.mask_BS, strict=True)]
        for batch in batches
    ]
    group_of = [torch.tensor([int.from_bytes(digest[:8], "big") % groups for digest in some]) for some in hashes]
    collectors = find(statistics)
    layers: dict[str, LayerStats] = {}

    def new_sum(*shape: int, device: torch.device) -> ExactSum:
        if sums_in is None:
            return ExactSum.zeros(*shape, device=device)
        return ExactSum.zeros_in_file(sums_in / str(next(file_number)), *shape)

    file_number = count()

    def watch(number: int, rows: slice, call: ExpertsCall) -> None:
        layer = layers.setdefault(
            call.layer, LayerStats(call.layer_experts, call.index_TK.shape[-1], groups=router_groups)
        )
        _take_down(
            Seen(call, batches[number].mask_BS[rows], group_of[number][rows], groups), collectors, layer, new_sum
        )

    try:
        run(batches, watch, on_progress, inside=any(collector.inside for collector in collectors.values()))
    except OverflowError as error:
        raise InputError(
            f"the model's experts give outputs that cannot be summed: {error}; try another dtype"
        ) from error
    return Stats(
        model=fingerprint,
        data=data_fingerprint([digest for some in hashes for digest in some]),
        block_tokens=ids_BS.shape[1],
        tokens=sum(int(batch.mask_BS.sum()) for batch in batches),
        blocks=sum(map(len, batches)),
        blocks_per_group=torch.bincount(torch.cat(group_of), minlength=groups).tolist(),
        layers={name: layers[name] for name in run.layers if name in layers},
        sources=[source] if source else [],
    )


def make_batches(ids_BS: torch.Tensor, mask_BS: torch.Tensor | None, batch_blocks: int) -> list[Batch]:
    """Blocks of like length together, the longest first: the first batch shows whether memory suffices.

    A batch is as long as its longest block.
    """
    if mask_BS is None:
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    order = mask_BS.sum(1).argsort(descending=True, stable=True)
    return [
        Batch(ids_BS[rows, :longest], mask_BS[rows, :longest])
        for rows in order.split(batch_blocks)
        for longest in [int(mask_BS[rows[0]].sum())]
    ]


def shard_of(batches: list[Batch], shard: int, shards: int) -> list[Batch]:
    """Every `shards`-th batch. Raises InputError where there is no such shard, or nothing in it."""
    if not 0 <= shard < shards:
        raise InputError(f"shard {shard} of {shards} does not exist; shards are counted from 0")
    if not (taken := batches[shard::shards]):
        raise InputError(
            f"shard {shard} of {shards} has no data: there are only {len(batches)} batches; use fewer shards, smaller "
            "batches or more text"
        )
    return taken


def _take_down(
    seen: Seen, collectors: dict[str, Collector], into: LayerStats, new_sum: Callable[..., ExactSum]
) -> None:
    # All is computed before any of it is added, so that a call for which memory runs out leaves no trace.
    values_of = {name: collector.values(seen) for name, collector in collectors.items()}
    for name, values in values_of.items():
        shape, part = collectors[name].shape(seen), collectors[name].part(seen)
        if collectors[name].counts:
            if name not in into.counts:
                into.counts[name] = torch.zeros(shape, dtype=torch.int64, device=values.device)
            into.counts[name][part] += values
        else:
            if name not in into.sums:
                into.sums[name] = new_sum(*shape, device=values.device)
            into.sums[name][part].add_(values.to(into.sums[name].limbs.device))
