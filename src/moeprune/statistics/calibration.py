"""Run the calibration data through the model once and take down what its experts do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import expert_count
from moeprune.errors import InputError
from moeprune.statistics.collectors import Collector, Probes, Usage
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.stats import LayerStats, Stats, block_hash, data_fingerprint

BATCH_BLOCKS = 8
GROUPS = 8


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    fingerprint: str,
    ids_BS: torch.Tensor,
    *,
    source: str = "",
    groups: int = GROUPS,
    batch_blocks: int = BATCH_BLOCKS,
    shard: int = 0,
    shards: int = 1,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Collect Stats.

    Args:
        model: on its device, in evaluation mode.
        fingerprint: of the model's checkpoint; the Stats carry it.
        ids_BS: token ids `[blocks, tokens per block]`.
        source: address of the data; the Stats carry it.
        groups: C-Prune clusters each group of blocks for itself and lets the groups vote. Which group a block falls
            into is read from its content, so that it is the same whoever computes it.
        batch_blocks: blocks per forward pass.
        shard, shards: take only every `shards`-th batch, from `shard` on. The Stats of all shards, merged, are those of
            one run over everything, bit for bit.
        on_batch: called after each batch with how many are done, and of how many.

    Raises:
        InputError: an impossible shard, or a model whose outputs are not finite.
    """
    if not 0 <= shard < shards:
        raise InputError(f"shard {shard} of {shards} does not exist; shards are counted from 0")
    if groups < 1 or batch_blocks < 1:
        raise InputError(f"{groups} groups, {batch_blocks} blocks per batch: both must be at least 1")
    batches = list(ids_BS.split(batch_blocks))[shard::shards]
    if not batches:
        raise InputError(
            f"shard {shard} of {shards} has no data: there are only {-(-len(ids_BS) // batch_blocks)} batches"
        )
    collectors: list[Collector] = [Usage(), Probes(groups)]
    layers: dict[str, LayerStats] = {}
    group_B = torch.empty(0, dtype=torch.int64)

    def watch(call: ExpertsCall) -> None:
        layer = layers.setdefault(call.layer, LayerStats(expert_count(call.module), call.index_TK.shape[-1]))
        for collector in collectors:
            collector.collect(call, layer, group_B)

    hashes: list[bytes] = []
    blocks_per_group = torch.zeros(groups, dtype=torch.int64)
    with observe(model, watch):
        for done, batch_BS in enumerate(batches, start=1):
            of_batch = [block_hash(block) for block in batch_BS]
            hashes += of_batch
            group_B = torch.tensor([int.from_bytes(digest[:8], "big") % groups for digest in of_batch])
            blocks_per_group += torch.bincount(group_B, minlength=groups)
            try:
                model(input_ids=batch_BS.to(model.device), use_cache=False)
            except OverflowError as error:
                raise InputError(
                    f"the model's experts give outputs that cannot be summed: {error}; try another dtype"
                ) from error
            on_batch(done, len(batches))
    return Stats(
        model=fingerprint,
        data=data_fingerprint(hashes),
        block_tokens=ids_BS.shape[1],
        tokens=sum(batch.numel() for batch in batches),
        blocks=len(hashes),
        blocks_per_group=blocks_per_group.tolist(),
        layers=layers,
        sources=[source] if source else [],
    )
