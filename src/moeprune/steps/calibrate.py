"""calibrate: one pass of the calibration data through the model -> Stats."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moeprune import places, tracking
from moeprune.atomic import refuse_directory
from moeprune.checkpoint.loading import Checkpoint
from moeprune.methods import BASELINES, DEFAULT, statistics_for
from moeprune.progress import progress
from moeprune.statistics import Stats, merge
from moeprune.statistics.calibration import GROUPS
from moeprune.statistics.calibration import calibrate as collect
from moeprune.statistics.passes import ForwardPass, InMemoryPass
from moeprune.steps import machine
from moeprune.streaming.room import parse_bytes
from moeprune.streaming.streamed import StreamedPass
from moeprune.texts import read_blocks


def calibrate(
    model: str,
    data: str,
    out: str,
    *,
    statistics: Iterable[str] | None = None,
    text_field: str = "text",
    sequences: str = "packed",
    block_tokens: int = 256,
    max_blocks: int = 128,
    batch_blocks: int | None = None,
    groups: int = GROUPS,
    shard: int = 0,
    shards: int = 1,
    dtype: str = "auto",
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
) -> Stats:
    """Collect Stats of `model` on `data` and put them at `out`. See `statistics.calibration.calibrate` and `texts`.

    A shard reads and tokenises all the text, since where a block begins depends on what is before it, and runs only its
    own blocks, which is nearly all of the work.

    Args:
        statistics: what to collect; by default what the default method and the baselines need.
        dtype: of the model in memory (`machine.DTYPES`).
        memory_limit: a size such as `2GiB` that the process keeps to, by bringing in a layer at a time, and of a large
            one some experts at a time.
    """
    limit = parse_bytes(memory_limit) if memory_limit else None
    machine.quieten()
    params = {
        "model": places.origin(model),
        "data": data,
        "block_tokens": block_tokens,
        "max_blocks": max_blocks,
        "sequences": sequences,
        "shard": f"{shard}/{shards}",
        "memory_limit": memory_limit or "none",
    }
    with (
        tracking.step("calibrate", params | machine.describe(dtype)) as run,
        places.output(out) as path,
        _checkpoint(model, trust_remote_code, stays_away=limit is not None) as checkpoint,
        tempfile.TemporaryDirectory(prefix="moeprune-") as scratch,
    ):
        refuse_directory(path)
        fingerprint = checkpoint.fingerprint
        blocks = read_blocks(
            data,
            checkpoint.tokenizer(),
            block_tokens=block_tokens,
            max_blocks=max_blocks,
            text_field=text_field,
            sequences=sequences,
        )
        run.dataset(blocks.name, blocks.address, blocks.fingerprint, "calibration", blocks.tokens)
        through = _through(checkpoint, machine.dtype_named(dtype), limit)
        started = time.monotonic()
        with progress("calibrate") as on_progress:
            stats = collect(
                through,
                fingerprint,
                blocks.ids_BS,
                blocks.mask_BS,
                statistics=statistics_for([DEFAULT, *BASELINES]) if statistics is None else statistics,
                source=blocks.address,
                groups=groups,
                router_groups=checkpoint.layout.groups,
                batch_blocks=batch_blocks,
                shard=shard,
                shards=shards,
                sums_in=None if limit is None else Path(scratch),
                on_progress=on_progress,
            )
        stats.save(path)
        seconds = time.monotonic() - started
        run.metrics(
            {
                "calibration_tokens": stats.tokens,
                "seconds": seconds,
                "throughput_tokens_per_second": stats.tokens / seconds,
            }
        )
        return stats


@contextmanager
def _checkpoint(model: str, trust_remote_code: bool, *, stays_away: bool) -> Iterator[Checkpoint]:
    """The model, brought here as a whole unless its weights stay where they are and are read as they are needed."""
    if stays_away:
        with places.streamed_model(model) as (directory, weights):
            yield Checkpoint(directory, trust_remote_code, weights)
    else:
        with places.local_model(model) as directory:
            yield Checkpoint(directory, trust_remote_code)


def _through(checkpoint: Checkpoint, dtype: torch.dtype | None, memory_limit: int | None) -> ForwardPass:
    if memory_limit is None:
        return InMemoryPass(checkpoint.load(dtype))
    return StreamedPass(checkpoint, memory_limit=memory_limit, dtype=dtype)


def merge_stats(parts: list[str], out: str) -> Stats:
    """Add the Stats of several shards or data sets and put the sum at `out`."""
    loaded = []
    for part in parts:
        with places.local_file(part) as path:
            loaded.append(Stats.load(path))
    merged = merge(loaded)
    with places.output(out) as path:
        merged.save(path)
    return merged
