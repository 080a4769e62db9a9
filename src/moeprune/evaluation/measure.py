"""Measure one checkpoint: how well it predicts text, how fast, in how much memory.

Every model is measured in a process of its own, so that no model's memory is another's. The processes are forked from a
server that has the libraries loaded, and count only what comes on top.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.evaluation.report import Quality
from moeprune.fitting import Fitting
from moeprune.peak_memory import peak_memory_bytes
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.texts import Blocks

BATCH_BLOCKS = 8


@dataclass(frozen=True)
class Measured:
    """One model's figures; `expert_use` is the share of routed tokens by data set, layer and expert."""

    quality: dict[str, Quality]
    peak_memory_bytes: int
    tokens_per_second: float
    expert_use: dict[str, dict[str, list[float]]]


def measure(
    checkpoint: Checkpoint, data: list[Blocks], *, with_expert_use: bool = False, batch_blocks: int = BATCH_BLOCKS
) -> Measured:
    """Measure a checkpoint in a process of its own.

    Raises:
        InputError: it cannot be loaded or run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moeprune.evaluation.measure", "transformers.generation"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(
                _measure_here, checkpoint, data, with_expert_use, batch_blocks, torch.get_num_threads()
            ).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"measuring {checkpoint.directory} ended without a result; most likely memory ran out: use smaller "
                "batches"
            ) from error


def _measure_here(
    checkpoint: Checkpoint, data: list[Blocks], with_expert_use: bool, batch_blocks: int, threads: int
) -> Measured:
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    baseline = peak_memory_bytes()
    model = checkpoint.load()
    quality: dict[str, Quality] = {}
    speeds: list[float] = []
    fitting = Fitting("measuring on")
    with torch.inference_mode():
        # The first pass pays for loading and kernel choices; it is not timed.
        warm_up_BS = data[0].ids_BS[:1]
        fitting.run(len(warm_up_BS), lambda rows: _logits(model, warm_up_BS[rows]))
        for blocks in data:
            quality[blocks.name] = _quality(model, blocks, batch_blocks, fitting, speeds)
        peak = peak_memory_bytes() - baseline
        expert_use = (
            {blocks.name: _expert_use(model, blocks, batch_blocks) for blocks in data} if with_expert_use else {}
        )
    return Measured(quality, peak, statistics.median(speeds), expert_use)


@dataclass
class _Score:
    """Sums over the positions that were predicted."""

    loss: float = 0.0
    hits: int = 0
    predicted: int = 0


def _quality(
    model: PreTrainedModel, blocks: Blocks, batch_blocks: int, fitting: Fitting, speeds: list[float]
) -> Quality:
    """Next-token loss and accuracy over all positions of each block but its first token."""
    score = _Score()
    for batch_BS in blocks.ids_BS.split(batch_blocks):
        fitting.run(len(batch_BS), lambda rows, batch_BS=batch_BS: _add_score(model, batch_BS[rows], score, speeds))  # type: ignore[misc]
    mean = score.loss / score.predicted
    if not math.isfinite(mean):
        raise InputError(
            f"the model's loss on {blocks.name} is not a number; its weights are damaged or overflow in this dtype"
        )
    return Quality(
        loss_nats=mean,
        perplexity=math.exp(min(mean, 700)),
        accuracy=score.hits / score.predicted,
        tokens=score.predicted,
    )


def _add_score(model: PreTrainedModel, ids_BS: torch.Tensor, into: _Score, speeds: list[float]) -> None:
    started = time.perf_counter()
    logits_BSV = _logits(model, ids_BS)
    _wait_for_device()
    seconds = time.perf_counter() - started
    loss, hits = 0.0, 0
    for logits_SV, ids_S in zip(logits_BSV, ids_BS.to(logits_BSV.device), strict=True):
        scores, target = logits_SV[:-1].float(), ids_S[1:]  # a block at a time: float32 logits are large
        loss += torch.nn.functional.cross_entropy(scores, target, reduction="sum").item()
        hits += int((scores.argmax(-1) == target).sum())
    # All at the end: where memory runs out before, nothing has been counted.
    into.loss += loss
    into.hits += hits
    into.predicted += ids_BS[:, 1:].numel()
    speeds.append(ids_BS.numel() / seconds)


def _logits(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BS.to(model.device), use_cache=False).logits


def _expert_use(model: PreTrainedModel, blocks: Blocks, batch_blocks: int) -> dict[str, list[float]]:
    stats = calibrate(
        InMemoryPass(model), "", blocks.ids_BS, statistics=["routed_tokens"], groups=1, batch_blocks=batch_blocks
    )
    counts = {name: layer.count("routed_tokens") for name, layer in stats.layers.items()}
    return {name: (count_E / count_E.sum()).tolist() for name, count_E in counts.items()}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
