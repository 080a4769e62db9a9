"""`python benchmarks/calibration.py`: what calibrating costs above the bare forward pass over the same tokens.

In one process, on one model in memory, in pairs: a forward pass (without the logits, which calibration does not compute
either), and a calibration for the default method over the same batch, in turns the one and the other first. The table
tells the ratio within pairs. The models have the shapes of published ones, cut to their first layers, and random
weights; `--model DIR` measures your own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import random_checkpoint
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.methods import DEFAULT, statistics_for
from moeprune.statistics.calibration import BATCH_TOKENS, calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps import machine

RESULTS = Path(__file__).parent / "results"
LIMIT = 1.1
_SMALL = {"vocab_size": 8192, "tie_word_embeddings": False, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}


def granite(layers: int) -> PretrainedConfig:
    """The shape of Granite-3.0-1B-A400M: 32 experts of width 512, top-8."""
    return AutoConfig.for_model(
        "granitemoe",
        hidden_size=1024,
        intermediate_size=512,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=32,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        **_SMALL,
    )


def qwen3(layers: int) -> PretrainedConfig:
    """The shape of Qwen3-30B-A3B: 128 experts of width 768, top-8."""
    return AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        norm_topk_prob=True,
        **_SMALL,
    )


# A layer of each: what calibrating costs, it costs per layer.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "granite-3.0-1b-a400m": lambda: granite(1),
    "olmoe-1b-7b": lambda: random_checkpoint.olmoe(1),
    "qwen3-30b-a3b": lambda: qwen3(1),
}


@dataclass(frozen=True)
class Row:
    """One model in one dtype. Seconds are medians; the ratio is calibrating to passing, within pairs."""

    model: str
    dtype: str
    tokens: int
    block_tokens: int
    pass_seconds: float
    calibration_seconds: float
    ratio: float
    least: float
    most: float
    pairs: int


def measure(name: str, checkpoint: Checkpoint, dtype: str, block_tokens: int, pairs: int) -> Row:
    model = checkpoint.load(machine.dtype_named(dtype))
    blocks = max(1, BATCH_TOKENS // block_tokens)
    ids_BS = torch.randint(0, model.config.get_text_config().vocab_size, (blocks, block_tokens))
    run, needed = InMemoryPass(model), statistics_for([DEFAULT])
    both = [
        lambda: bare(model, ids_BS),
        lambda: calibrate(run, "benchmark", ids_BS, statistics=needed),
    ]
    for work in both:  # pays for what is allocated once
        timed(work)
    times: list[list[float]] = []
    for pair in range(pairs):
        first = pair % 2
        one, other = timed(both[first]), timed(both[1 - first])
        times.append([other, one] if first else [one, other])
    ratios = [calibrating / passing for passing, calibrating in times]
    passing, calibrating = (statistics.median(column) for column in zip(*times, strict=True))
    return Row(
        name,
        dtype,
        ids_BS.numel(),
        block_tokens,
        passing,
        calibrating,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        pairs,
    )


@torch.inference_mode()
def bare(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)


def timed(work: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def checkpoints(own: Path | None, shapes: list[str]) -> Iterator[Iterator[tuple[str, Checkpoint]]]:
    """Names and checkpoints; those made here are gone when the next one is asked for."""
    with tempfile.TemporaryDirectory() as scratch:

        def made() -> Iterator[tuple[str, Checkpoint]]:
            for name in shapes:
                random_checkpoint.write(Path(scratch) / name, SHAPES[name]())
                yield name, Checkpoint(Path(scratch) / name)

        yield iter([(own.name, Checkpoint(own))]) if own else made()


def table(rows: list[Row]) -> str:
    head = ["model", "dtype", "tokens", "forward pass, s", "calibrating, s", "ratio, median", "least to most", "pairs"]
    lines = [head, ["---"] * 2 + ["---:"] * 6]
    lines += [
        [
            row.model,
            row.dtype,
            f"{row.tokens:,} in blocks of {row.block_tokens}",
            f"{row.pass_seconds:.2f}",
            f"{row.calibration_seconds:.2f}",
            f"{row.ratio:.3f}",
            f"{row.least:.3f} to {row.most:.3f}",
            str(row.pairs),
        ]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="your own checkpoint, in place of those made here")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=machine.DTYPES)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    machine.quieten()
    torch.manual_seed(0)
    rows = []
    with checkpoints(options.model, options.shapes) as found:
        for name, checkpoint in found:
            for dtype in options.dtypes:
                rows.append(measure(name, checkpoint, dtype, options.block_tokens, options.pairs))
                gc.collect()
                sys.stderr.write(f"{name}, {dtype}: {rows[-1].ratio:.3f}\n")
    text = table(rows)
    sys.stdout.write(f"{text}\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "calibration.md").write_text(text + "\n")
    record = {"machine": machine.describe(), "limit": LIMIT, "rows": [asdict(row) for row in rows]}
    (RESULTS / "calibration.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
