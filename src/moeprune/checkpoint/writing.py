"""A checkpoint is written shard by shard, and goes on from where it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moeprune.checkpoint.byte_sources import ByteSource
from moeprune.checkpoint.shards import PlannedShard, index_of, write_shard
from moeprune.checkpoint.targets import Target

_JOB_VERSION = 1  # another for every change of what a job writes; a job begun by another release then starts anew


def job_name(source: ByteSource, source_shards: list[str], shards: list[PlannedShard], plan: str) -> str:
    """A digest of all that a checkpoint is made from: the same for the same job, and for no other."""
    digest = hashlib.sha256()
    versions = {shard: source.version(shard) for shard in source_shards}
    digest.update(json.dumps([_JOB_VERSION, source.address, versions, plan]).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
        for tensor in shard.tensors:
            digest.update(repr(tensor.pieces).encode())
    return digest.hexdigest()[:32]


def write_checkpoint(
    shards: list[PlannedShard],
    source: ByteSource,
    target: Target,
    job: str,
    write_other_files: Callable[[Path], None],
    *,
    on_tensor: Callable[[int, int], None],
    say: Callable[[str], None],
) -> None:
    """Write what is not there yet.

    Args:
        source: where the shards' bytes come from.
        job: from `job_name`.
        write_other_files: puts everything else into a directory.
        on_tensor: called now and then with how many tensors are written, and of how many.
        say: told, in words, what is there from before, and what stays after an interruption.

    Raises:
        InputError: the place is taken, there is no room, or the source changed meanwhile.
    """
    total = sum(len(shard.tensors) for shard in shards)
    opened, before = None, 0
    try:
        with target.open(job) as opened:
            missing = [shard for shard in shards if not opened.has(shard)]
            opened.refuse_without_room(missing)
            before = len(shards) - len(missing)
            if before:
                say(f"continuing: {before} of {len(shards)} shards are there")
            done = total - sum(len(shard.tensors) for shard in missing)
            for shard in missing:
                with opened.place_for(shard) as path:
                    write_shard(shard, source, path, partial(_tell, on_tensor, done, total))
                done += len(shard.tensors)
            write_other_files(opened.folder)
            for name, text in index_of(shards).items():
                (opened.folder / name).write_text(text)
    except BaseException:
        kept = before + (opened.placed if opened else 0)
        if kept:
            say(f"stopped: {kept} of {len(shards)} shards are kept, and the same command goes on from there")
        raise


def _tell(on_tensor: Callable[[int, int], None], before: int, total: int, of_shard: int) -> None:
    if before + of_shard:
        on_tensor(before + of_shard, total)
