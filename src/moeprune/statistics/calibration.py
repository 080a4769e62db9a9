"""Run the calibration data through the model once and take down what its experts do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeprune.checkpoint.layout import expert_count
from moeprune.errors import InputError
from moeprune.statistics.collectors import Collector, Probes, Usage
from moeprune.statistics.observer import ExpertsCall
from moeprune.statistics.passes import Batch, ForwardPass
from moeprune.statistics.stats import LayerStats, Stats, block_hash, data_fingerprint

BATCH_BLOCKS = 8
GROUPS = 8


def calibrate(
    run: ForwardPass,
    fingerprint: str,
    ids_BS: torch.Tensor,
    *,
    source: str = "",
    groups: int = GROUPS,
    batch_blocks: int = BATCH_BLOCKS,
    shard: int = 0,
    shards: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Collect Stats.

    Args:
        run: takes the tokens through the model.
        fingerprint: of the model's checkpoint; the Stats carry it.
        ids_BS: token ids `[blocks, tokens per block]`.
        source: address of the data; the Stats carry it.
        groups: C-Prune clusters each group of blocks for itself and lets the groups vote. Which group a block falls
            into is read from its content, so that it is the same whoever computes it.
        batch_blocks: blocks per forward pass.
        shard, shards: take only every `shards`-th batch, from `shard` on. The Stats of all shards, merged, are those of
            one run over everything, bit for bit.
        on_progress: called with how much is done, and of how much.

    Raises:
        InputError: an impossible shard, or a model whose outputs are not finite.
    """
    if not 0 <= shard < shards:
        raise InputError(f"shard {shard} of {shards} does not exist; shards are counted from 0")
    if groups < 1 or batch_blocks < 1:
        raise InputError(f"{groups} groups, {batch_blocks} blocks per batch: both must be at least 1")
    parts = ids_BS.split(batch_blocks)
    batches = [Batch(part, torch.ones_like(part, dtype=torch.bool)) for part in parts[shard::shards]]
    if not batches:
        raise InputError(f"shard {shard} of {shards} has no data: there are only {len(parts)} batches")
    hashes = [[block_hash(block) for block in batch.ids_BS] for batch in batches]
    group_of = [torch.tensor([int.from_bytes(digest[:8], "big") % groups for digest in some]) for some in hashes]
    collectors: list[Collector] = [Usage(), Probes(groups)]
    layers: dict[str, LayerStats] = {}

    def watch(number: int, rows: slice, call: ExpertsCall) -> None:
        layer = layers.setdefault(call.layer, LayerStats(expert_count(call.module), call.index_TK.shape[-1]))
        for collector in collectors:
            collector.collect(call, layer, group_of[number][rows])

    try:
        run(batches, watch, on_progress)
    except OverflowError as error:
        raise InputError(
            f"the model's experts give outputs that cannot be summed: {error}; try another dtype"
        ) from error
    return Stats(
        model=fingerprint,
        data=data_fingerprint([digest for some in hashes for digest in some]),
        block_tokens=ids_BS.shape[1],
        tokens=sum(batch.ids_BS.numel() for batch in batches),
        blocks=sum(map(len, batches)),
        blocks_per_group=torch.bincount(torch.cat(group_of), minlength=groups).tolist(),
        layers={name: layers[name] for name in run.layers if name in layers},
        sources=[source] if source else [],
    )
