"""A model that does not fit: calibrated, decided on and cut under a hard limit of the operating system.

    python benchmarks/streaming.py [--gib 8] [--limit 2GiB] [--blocks 16] [--directory DIR]

The model has the shape of OLMoE-1B-7B with as many layers as make up the size, and random weights. It is calibrated for
every statistic of the default method, on blocks of 256 tokens of the built-in code. To show that the limit
is one, the model is at last calibrated in memory under the same limit, which must fail.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import random_checkpoint
from hard_limit import hard_limit
from measuring import Ran, publish, run

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.streaming.room import parse_bytes

_MOEPRUNE = [Path(sys.executable).parent / "moeprune"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--directory", type=Path, default=None, help="where to put some three times the model's size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeprune-bench-", dir=arguments.directory) as scratch:
        measure(Path(scratch), int(arguments.gib * (1 << 30)), arguments.limit, arguments.blocks)


def measure(scratch: Path, size: int, limit: str, blocks: int) -> None:
    model, stats, plan, pruned = (scratch / name for name in ("model", "stats", "plan.json", "pruned"))
    size = random_checkpoint.write(model, random_checkpoint.olmoe_of(size))
    calibrate: list[str | Path] = [
        "calibrate",
        "--for",
        "c-prune",  # the default compares all experts of a layer, which this limit has no room for
        "--model",
        model,
        "--data",
        "builtin://code",
        "--out",
        stats,
        "--dtype",
        "bfloat16",
    ]
    calibrate += ["--max-blocks", str(blocks)]
    steps: dict[str, list[str | Path]] = {
        "calibrate": [*calibrate, "--memory-limit", limit],
        "plan": ["plan", "make", "--method", "c-prune", "--ratio", "0.5", "--stats", stats, "--out", plan],
        "apply": ["apply", "--model", model, "--plan", plan, "--out", pruned],
    }
    rows, raw = [], {}
    for name, step in steps.items():
        with hard_limit(parse_bytes(limit)) as limited:
            ran = run([*_MOEPRUNE, *step], limited.enter, TMPDIR=str(scratch))
            raw[name] = {"seconds": ran.seconds, "peak_rss": ran.peak_bytes, "peak_group": limited.peak()}
            rows.append(_row(f"moeprune {name}", ran, limited.peak()))
            kind = limited.kind
    written = CheckpointFiles(pruned).bytes_on_disk
    shutil.rmtree(pruned)
    with hard_limit(parse_bytes(limit)) as limited:
        try:
            run([*_MOEPRUNE, *calibrate], limited.enter)
        except RuntimeError as error:
            ended = str(error).splitlines()[0].rpartition("ended with ")[2].rstrip(":")
        else:
            raise SystemExit("the model fits into the limit: this shows nothing; take a larger one")
    publish(
        "streaming",
        f"A model of {size / (1 << 30):.1f} GiB under {limit}",
        rows,
        raw | {"model_bytes": size, "written_bytes": written, "tokens": blocks * 256},
        f"{blocks * 256:,} tokens; the pruned model is {written / (1 << 30):.1f} GiB. The limit is kept by a {kind}, "
        "for each process and, in a control group, the files that the system caches for it: so the last column comes "
        f"up to the limit by itself. Without `--memory-limit` the calibration ended under it with exit code {ended}.",
    )


def _row(name: str, ran: Ran, group_peak: int | None) -> dict[str, str]:
    return {
        "step": name,
        "seconds": f"{ran.seconds:.0f}",
        "processor seconds": f"{ran.cpu_seconds:.0f}",
        "peak resident memory, MiB": f"{ran.peak_bytes / (1 << 20):,.0f}",
        "with cached files, MiB": f"{group_peak / (1 << 20):,.0f}" if group_peak else "not counted",
    }


if __name__ == "__main__":
    main()
