"""calibrate: the text once through the original, whose experts are watched.

In memory: the model, a batch's pass, what is looked at inside the experts, and the sums. Streamed: what the limit says.
"""

from __future__ import annotations

import math

from moeprune.errors import InputError
from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.needs.case import (
    FLOAT32,
    Case,
    converting,
    forward,
    least_limit,
    on_its_way,
    one_pass,
    weights,
)
from moeprune.estimation.needs.need import LIBRARIES, Need, Phase
from moeprune.estimation.units import in_bytes
from moeprune.statistics.calibration import BATCH_TOKENS
from moeprune.statistics.collectors import STAND_IN_SHARE, find
from moeprune.streaming.streamed import FEWEST_EXPERTS

_COPIES = 2  # of what choices put out, in float32: as it is and what is made of it
_ADVICE = "give --calibration-memory-limit, and layers are brought in one at a time"


def need(case: Case) -> Need:
    """Raises InputError where the memory limit is too small."""
    work, shards = case.work, case.work.calibration_shards
    blocks = -(-work.calibration_blocks // shards)
    batch = min(blocks, max(1, BATCH_TOKENS // work.block_tokens)) * work.block_tokens
    all_tokens = work.calibration_blocks * work.block_tokens
    operations = Amount.of(
        Term("passes", forward(case.original, all_tokens, work.block_tokens)),
        Term("every expert on some tokens", _probes(case, all_tokens)),
    )
    limit = work.calibration_memory_limit
    if limit is None:
        phases = _in_memory(case, batch)
        disk = Amount.of(case.brought, _stats(case))
    else:
        _refuse_too_small(case, limit)
        phases = (Phase("streaming", Amount.of(Term("the memory limit", limit - LIBRARIES))),)
        disk = Amount.of(_stats(case), Term("sums, mapped", case.stats_bytes), _spilled(case, blocks))
    return Need(
        "calibrate",
        phases,
        disk,
        operations,
        moved=Amount.of(Term("the original", case.original.bytes_on_disk)),
        pods=shards,
        computes=True,
        spreads=limit is None,
        advice=_ADVICE if limit is None else "give a smaller --calibration-memory-limit",
    )


def _in_memory(case: Case, batch: int) -> tuple[Phase, ...]:
    model = weights(case.original, case.item, "the original")
    fusing = converting(case.original, case.item)
    sums = Term("sums", case.stats_bytes)
    passing = Amount.of(
        model, one_pass(case.original, batch, case.item), _inside(case, batch), _compared(case, batch), sums
    )
    return Phase("loading", Amount.of(model, fusing), passing=on_its_way(case, case.original)), Phase("passes", passing)


def _inside(case: Case, tokens: int) -> Term:
    """Each choice's hidden activations and output, and these in float32."""
    collectors = find(case.statistics).values()
    if not any(collector.inside for collector in collectors):
        return Term("inside the experts", 0)
    layers, hidden = case.original.layers.values(), case.original.hidden
    widest = max(layer.top_k * (layer.width + hidden) for layer in layers)
    return Term("inside the experts", tokens * widest * (case.item + _COPIES * FLOAT32), Basis.ASSUMED)


def _compared(case: Case, tokens: int) -> Term:
    """Every expert's output for the sample that `stand_in` takes, in the model's dtype and in float32."""
    if "stand_in" not in case.statistics:
        return Term("experts compared", 0)
    most = max(
        math.ceil(tokens / _step(layer.experts, layer.top_k)) * layer.experts for layer in case.original.layers.values()
    )
    return Term("experts compared", most * case.original.hidden * (case.item + _COPIES * FLOAT32), Basis.ASSUMED)


def _step(experts: int, top_k: int) -> int:
    """Of so many tokens, one is in the sample."""
    return math.ceil(experts / (STAND_IN_SHARE * top_k))


def _probes(case: Case, tokens: int) -> float:
    """Every expert on one mean input per block, and on the sample."""
    per_block = tokens / case.work.block_tokens if "probe_output" in case.statistics else 0
    total = 0.0
    for layer in case.original.layers.values():
        sample = tokens / _step(layer.experts, layer.top_k) if "stand_in" in case.statistics else 0
        total += (per_block + sample) * 2.0 * layer.routed
    return total


def _stats(case: Case) -> Term:
    return Term("Stats", case.stats_bytes)


def _spilled(case: Case, blocks: int) -> Term:
    """What stopped passes hold: at each layer some hidden states of all tokens."""
    held = blocks * case.work.block_tokens * 3 * case.original.hidden * case.item
    return Term("what stopped passes hold", held, Basis.ASSUMED)


def _refuse_too_small(case: Case, limit: int) -> None:
    least = least_limit(case.original, case.item, case.work.block_tokens, FEWEST_EXPERTS, LIBRARIES)
    if limit < least:
        raise InputError(
            f"a calibration memory limit of {in_bytes(limit)} is too small for this model: some {in_bytes(least)} are "
            "needed for the libraries, the largest part, a few experts and one sequence"
        )
