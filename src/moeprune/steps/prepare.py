"""prepare: what the calibrations of a run have to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeprune.errors import InputError
from moeprune.methods import statistics_of_run


class Share(NamedTuple):
    """One calibration's: the number of its shard of the data, and the statistics to collect."""

    shard: int
    statistics: list[str]


def prepare(method: str, baselines: Sequence[str] = (), *, shards: int = 1) -> list[Share]:
    """A share for each shard. Raises InputError for an unknown method, or less than one shard."""
    if shards < 1:
        raise InputError(f"the calibration data cannot be split into {shards} shards; 1 is the whole")
    statistics = statistics_of_run([method, *baselines])
    return [Share(shard, statistics) for shard in range(shards)]
