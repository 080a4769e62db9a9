"""What `moeprune estimate` says, beside what the steps really take.

    python benchmarks/estimate.py [--model embedded] [--blocks 16] [--directory DIR]

Each step of a run is done in a process of its own, on the embedded model and on random weights of OLMoE's shape in
small, whose memory is watched while it runs: anonymous pages of it and of the processes that it starts, which are what
a pod must have. (Files that are mapped count for the system, which drops them when it needs the room.) What is on the
disk afterwards is compared, too. Memory is bounded well where the ratio is a little above 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import random_checkpoint
from measuring import publish
from transformers import PretrainedConfig

from moeprune.estimation.estimate import Estimate
from moeprune.estimation.work import Work
from moeprune.places import REFERENCE_MODEL
from moeprune.steps import estimate as estimating

_DATA = "builtin://code"
_TEXTS = ["builtin://code/held-out"]
_INTERVAL = 0.005  # seconds between two looks at memory
EMBEDDED, SHAPED = "embedded", "OLMoE-shaped"


@dataclass(frozen=True)
class Run:
    """One model's run, in a directory of its own, as the pipeline's steps do it."""

    model: str
    folder: Path
    work: Work

    def calibrate(self) -> None:
        from moeprune.methods import statistics_of_run
        from moeprune.steps.calibrate import calibrate

        calibrate(
            self.model,
            _DATA,
            str(self.folder / "stats"),
            statistics=statistics_of_run([self.work.method, *self.work.baselines]),
            max_blocks=self.work.calibration_blocks,
        )

    def merge_stats(self) -> None:
        from moeprune.steps.calibrate import merge_stats

        merge_stats([str(self.folder / "stats")], str(self.folder / "merged"))

    def cluster(self) -> None:
        from moeprune.steps.cluster import cluster

        cluster(str(self.folder / "merged"), str(self.folder / "clusters"))

    def global_prune(self) -> None:
        from moeprune.steps.prune import prune

        prune(
            self.model,
            self.work.method,
            self.work.budget.ratio,
            str(self.folder / "merged"),
            str(self.folder / "plan.json"),
            str(self.folder / "pruned"),
            data=_DATA,
            recovery_blocks=self.work.recovery_blocks,
            clusters=str(self.folder / "clusters"),
            baselines=self.work.baselines,
            baselines_out=str(self.folder / "baselines"),
        )

    def distill(self) -> None:
        from moeprune.steps.distill import distill

        distill(
            self.model,
            str(self.folder / "pruned"),
            str(self.folder / "plan.json"),
            _DATA,
            str(self.folder / "learnt"),
            max_blocks=self.work.distillation_blocks,
            epochs=self.work.distillation_epochs,
            part=0,
            parts=1,
        )

    def merge_distilled(self) -> None:
        from moeprune.steps.merge_distilled import merge_distilled

        merge_distilled([str(self.folder / "learnt")], str(self.folder / "pruned"), str(self.folder / "distilled"))

    def evaluate(self) -> None:
        from moeprune.steps.evaluate import Named, evaluate

        names = ("pruned", "distilled", *(f"baselines/{name}" for name in self.work.baselines))
        models = [Named("original", self.model), *(Named(name, str(self.folder / name)) for name in names)]
        evaluate(models, _TEXTS, str(self.folder / "report.json"), max_blocks=self.work.evaluation_blocks)


_STEPS: dict[str, tuple[Callable[[Run], None], tuple[str, ...]]] = {
    "calibrate": (Run.calibrate, ("stats",)),
    "merge-stats": (Run.merge_stats, ("merged",)),
    "cluster": (Run.cluster, ()),
    "global-prune": (Run.global_prune, ("pruned", "baselines")),
    "distill": (Run.distill, ("learnt",)),
    "merge-distilled": (Run.merge_distilled, ("distilled",)),
    "evaluate": (Run.evaluate, ()),
}
# What of a step's disk is written where it is looked for afterwards.
_WRITTEN = {
    "calibrate": ("Stats",),
    "merge-stats": ("their sum",),
    "global-prune": ("the pruned model", "2 baselines"),
}


def peak_of(work: Callable[[Run], None], run: Run) -> int:
    """Bytes of anonymous memory that a step takes at most, in a new process and those that it starts."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(run,))
    process.start()
    watched, most = psutil.Process(process.pid), 0
    while process.is_alive():
        most = max(most, sum(map(_anonymous, _family(watched))))
        time.sleep(_INTERVAL)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} ended with {process.exitcode}")
    return most


def _family(process: psutil.Process) -> list[int]:
    try:
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) << 10
    except (OSError, StopIteration):
        return 0


def measure(name: str, run: Run) -> tuple[list[dict[str, str]], dict[str, Any]]:
    run.folder.mkdir()
    estimated = estimating.estimate(run.model, run.work)
    rows, raw = [], {}
    for step, (work, outputs) in _STEPS.items():
        took = peak_of(work, run)
        disk = sum(_size(run.folder / output) for output in outputs)
        rows.append(row := _row(name, step, estimated, took, disk))
        raw[step] = {"peak": took, "disk": disk}
        sys.stderr.write(f"{row}\n")
    return rows, {"measured": raw, "estimate": estimated.model_dump(mode="json")}


def _row(name: str, step: str, estimated: Estimate, took: int, disk: int) -> dict[str, str]:
    found = estimated.step(step)
    assert found is not None
    written = sum(part.value for part in found.disk.parts if part.what in _WRITTEN.get(step, ()))
    return {
        "model": name,
        "step": step,
        "memory, MiB": f"{took / (1 << 20):,.0f}",
        "estimate": f"{found.memory.value / (1 << 20):,.0f}",
        "ratio": f"{found.memory.value / took:.2f}",
        "written, MB": f"{disk / 1e6:,.2f}" if written else "",
        "estimate ": f"{written / 1e6:,.2f}" if written else "",
        "ratio ": f"{written / disk:.4f}" if written else "",
    }


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _olmoe() -> PretrainedConfig:
    """A quarter of a billion parameters."""
    config = random_checkpoint.olmoe(4)
    config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok = 1024, 512, 32, 4
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = (EMBEDDED, SHAPED)
    parser.add_argument("--model", dest="models", action="append", choices=both, help="repeatable; default: both")
    parser.add_argument("--blocks", type=int, default=16, help="of text, for every step")
    parser.add_argument("--directory", type=Path, default=None, help="where to put some 5 GB of models")
    arguments = parser.parse_args()
    blocks = arguments.blocks
    work = Work(
        calibration_blocks=blocks,
        recovery_blocks=blocks,
        distillation_blocks=blocks,
        distillation_epochs=1,
        evaluation_blocks=blocks,
        evaluation_texts=len(_TEXTS),
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows, raw = [], {}
    with tempfile.TemporaryDirectory(prefix="moeprune-bench-", dir=arguments.directory) as scratch:
        for name in arguments.models or both:
            model = REFERENCE_MODEL if name == EMBEDDED else str(Path(scratch) / "model")
            if name == SHAPED:
                random_checkpoint.write(Path(model), _olmoe())
            of_model, raw[name] = measure(name, Run(model, Path(scratch) / name, work))
            rows += of_model
    publish(
        "estimate",
        "Estimates beside what is measured",
        rows,
        raw,
        f"{blocks} blocks of {work.block_tokens} tokens for every step. Memory: the peak of anonymous pages, looked at "
        "every few milliseconds. Written: all files; how long the Plans in them are is not foreseen.",
    )


if __name__ == "__main__":
    main()
