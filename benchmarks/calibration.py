"""`python benchmarks/calibration.py`: what calibrating costs above the bare forward pass over the same tokens.

In one process, on one model in memory, in pairs: a forward pass (without the logits, which calibration does not compute
either), and a calibration for the default method over the same batch, in turns the one and the other first. The table
tells the ratio within pairs. The models have the shapes of published ones, cut to their first layers, and random
weights; `--model DIR` measures your own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import random_checkpoint
import torch
from measuring import Spread, pairs, publish, ratio
from transformers import PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.methods import DEFAULT, statistics_for
from moeprune.statistics.calibration import BATCH_TOKENS, calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps import machine

_NOTES = (
    "Time is the clock's; CPU time is that of all threads of the process, which what else runs on the machine changes "
    "less. In brackets the least and the most. The limit is 1.1."
)
# A layer of each: what calibrating costs, it costs per layer.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "granite-3.0-1b-a400m": lambda: random_checkpoint.granite(1),
    "olmoe-1b-7b": lambda: random_checkpoint.olmoe(1),
    "qwen3-30b-a3b": lambda: random_checkpoint.qwen3(1),
}


@dataclass(frozen=True)
class Times:
    """Of one piece of work, in seconds."""

    clock: float
    cpu: float


@dataclass(frozen=True)
class Result:
    """One model in one dtype, pair by pair."""

    model: str
    dtype: str
    tokens: int
    block_tokens: int
    passing: list[Times]
    calibrating: list[Times]

    def row(self) -> dict[str, str]:
        passing, calibrating = ([times.clock for times in each] for each in (self.passing, self.calibrating))
        cpu = [[times.cpu for times in each] for each in (self.calibrating, self.passing)]
        return {
            "model, one layer": self.model,
            "dtype": self.dtype,
            "tokens": f"{self.tokens:,} in blocks of {self.block_tokens}",
            "forward pass, s": f"{Spread.of(passing):.2f}",
            "calibrating, s": f"{Spread.of(calibrating):.2f}",
            "ratio": f"{ratio(calibrating, passing):.3f}",
            "ratio of CPU times": f"{ratio(*cpu):.3f}",
        }


def measure(name: str, checkpoint: Checkpoint, dtype: str, block_tokens: int, repeats: int) -> Result:
    model = checkpoint.load(machine.dtype_named(dtype))
    blocks = max(1, BATCH_TOKENS // block_tokens)
    ids_BS = torch.randint(0, model.config.get_text_config().vocab_size, (blocks, block_tokens))
    run, needed = InMemoryPass(model), statistics_for([DEFAULT])

    def calibrating() -> Times:
        return timed(lambda: calibrate(run, "benchmark", ids_BS, statistics=needed))

    def passing() -> Times:
        return timed(lambda: bare(model, ids_BS))

    calibrating(), passing()  # these pay for what is allocated once
    return Result(name, dtype, ids_BS.numel(), block_tokens, *pairs(passing, calibrating, repeats))


@torch.inference_mode()
def bare(model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)


def timed(work: Callable[[], object]) -> Times:
    _wait()
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    _wait()
    return Times(time.perf_counter() - clock, time.process_time() - cpu)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="your own checkpoint, in place of those made here")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:1], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=machine.DTYPES)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    machine.quieten()
    torch.manual_seed(0)
    results = []
    with checkpoints(options.model, options.shapes) as found:
        for name, checkpoint in found:
            for dtype in options.dtypes:
                results.append(measure(name, checkpoint, dtype, options.block_tokens, options.pairs))
                gc.collect()
                sys.stderr.write(f"{name}, {dtype}: {results[-1].row()['ratio']}\n")
    publish("calibration", "Calibrating above the bare forward pass", [each.row() for each in results], results, _NOTES)


if __name__ == "__main__":
    main()
