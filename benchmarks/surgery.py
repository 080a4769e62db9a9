"""How long surgery takes beside `cp`, and how much memory.

    python benchmarks/surgery.py [--gib 4] [--pairs 7] [--directory DIR]

The model has the shape of OLMoE-1B-7B with as many layers as make up the size, and random weights; half of the experts
of each layer go, chosen at random. Surgery is measured against `cp` of the files that it writes, on the same disk, in
turns: the whole command, and in a process that has its libraries loaded the writing alone (with the checks and the plan
of the shards). What is written to disk afterwards, by the system, disturbs neither: it is waited for before each run.
In the last row it counts for both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import random_checkpoint
from measuring import Spread, pairs, publish, ratio, run, seconds

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.plan import LayerPlan, Plan

_TOP_K = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="where to put some three times the model's size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeprune-bench-", dir=arguments.directory) as scratch:
        measure(Path(scratch), int(arguments.gib * (1 << 30)), arguments.pairs)


def measure(scratch: Path, size: int, repeats: int) -> None:
    model, plan_file, written, out = (scratch / name for name in ("model", "plan.json", "written", "out"))
    size = random_checkpoint.write(model, random_checkpoint.olmoe_of(size))
    source = Checkpoint(model)
    plan = half_of(source)
    plan.save(plan_file)
    apply(source, plan, written)
    program = [sys.executable, "-c", "from moeprune.cli import main; main()"]
    command: list[str | Path] = [*program, "apply", "--model", model, "--plan", plan_file, "--out", out]
    peaks: list[int] = []

    def whole() -> None:
        peaks.append(run(command).peak_bytes)

    rows, raw = [], {}
    for name, surgery, synced in (
        ("writing alone", partial(apply, source, plan, out), False),
        ("the whole command", whole, False),
        ("the whole command, until it is on the disk", whole, True),
    ):
        ours, theirs = pairs(
            partial(on_a_quiet_disk, surgery, out, synced),
            partial(on_a_quiet_disk, partial(copy, written, out), out, synced),
            repeats,
        )
        rows.append(
            {
                "surgery": name,
                "seconds": f"{Spread.of(ours):.2f}",
                "`cp`, seconds": f"{Spread.of(theirs):.2f}",
                "ratio of each pair": f"{ratio(ours, theirs):.2f}",
            }
        )
        raw[name] = {"seconds": ours, "cp_seconds": theirs}
    start = [run([sys.executable, "-c", "import moeprune.cli.app, moeprune.steps.prune"]) for _ in range(repeats)]
    largest = max(entry.nbytes for entry in CheckpointFiles(model).entries.values())
    publish(
        "surgery",
        "Surgery beside `cp`",
        rows,
        raw
        | {
            "model_bytes": size,
            "written_bytes": CheckpointFiles(written).bytes_on_disk,
            "largest_tensor_bytes": largest,
            "peak_bytes": peaks,
            "start_seconds": [ran.seconds for ran in start],
            "start_peak_bytes": [ran.peak_bytes for ran in start],
        },
        f"Of a model of {size / (1 << 30):.1f} GiB, {CheckpointFiles(written).bytes_on_disk / (1 << 30):.1f} GiB are "
        f"written, in {repeats} pairs: median (least to most). The command's peak of resident memory is "
        f"{_mib(peaks):,.0f} MiB; its largest tensor has {largest / (1 << 20):,.0f} MiB. Loading its libraries takes "
        f"{Spread.of([ran.seconds for ran in start]):.1f} s of that time and "
        f"{_mib([ran.peak_bytes for ran in start]):,.0f} MiB of that memory, whatever the model's size.",
    )


def half_of(source: Checkpoint) -> Plan:
    """A Plan that keeps some half of each layer's experts."""
    random = Random(0)
    layers = {
        name: LayerPlan(
            experts=layer.experts, top_k=_TOP_K, keep=sorted(random.sample(range(layer.experts), layer.experts // 2))
        )
        for name, layer in source.layout.layers.items()
    }
    return Plan(method="random", options={}, ratio=0.5, model=source.fingerprint, data="0" * 32, layers=layers)


def on_a_quiet_disk(work: Callable[[], Any], out: Path, synced: bool) -> float:
    """Seconds that the work takes; `synced` says whether the disk must have what it wrote to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()

    def until_done() -> None:
        work()
        if synced:
            os.sync()

    return seconds(until_done)


def copy(written: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", written, out], check=True)


def _mib(peaks: list[int]) -> float:
    return max(peaks) / (1 << 20)


if __name__ == "__main__":
    main()
