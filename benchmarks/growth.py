"""How time and memory of calibration grow with a model's layers, experts and width, and with the tokens.

    python benchmarks/growth.py [--repeats 3]

Models of OLMoE's shape in small, one of its sizes changed at a time; each is calibrated in a process of its own, once
with the whole model in memory and once streamed. From these runs come two rates, of reading weights and of computing,
and from the rates and the shapes of two large models what those would take. Whatever is not measured is marked so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import random_checkpoint
import torch
from measuring import Spread, publish, run
from transformers import AutoConfig, PretrainedConfig

from moeprune.checkpoint.layout import build_without_weights, expert_count, experts_modules
from moeprune.checkpoint.loading import Checkpoint
from moeprune.methods import BASELINES, DEFAULT, statistics_for
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.streaming.streamed import StreamedPass

_BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Point:
    """One run's sizes."""

    layers: int = 4
    experts: int = 32
    hidden: int = 1024
    tokens: int = 4096

    def config(self) -> PretrainedConfig:
        config = random_checkpoint.olmoe(self.layers)
        config.hidden_size, config.intermediate_size, config.num_experts = self.hidden, self.hidden // 2, self.experts
        config.num_experts_per_tok, config.vocab_size = 4, 8192
        return config


BASE = Point()
VARIED: dict[str, list[int]] = {
    "layers": [4, 8],
    "experts": [32, 64],
    "hidden": [1024, 2048],
    "tokens": [4096, 8192],
}


@dataclass(frozen=True)
class Work:
    """What a calibration has to do, from the model's shape alone.

    Attributes:
        weights: bytes of all weights but the output head's, which no calibration needs.
        operations: floating-point operations of the forward pass.
        layer: bytes of the largest layer with its experts.
        expert: bytes of one routed expert.
        largest_part: bytes of the largest part that is not routed experts: a layer's attention, or the embedding.
        statistics: bytes of the Stats.
    """

    weights: int
    operations: float
    layer: int
    expert: int
    largest_part: int
    statistics: int


def work_of(config: PretrainedConfig, tokens: int, weight_bytes: float = 2) -> Work:
    model = build_without_weights(config, dtype=torch.bfloat16)
    experts = experts_modules(model)
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    total = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in head.parameters())
    routed = {name: sum(p.numel() for p in module.parameters()) for name, module in experts.items()}
    one = max(routed[name] // expert_count(experts[name]) for name in experts)
    top_k = config.num_experts_per_tok
    dense = total - sum(routed.values()) - embedding.weight.numel()
    active = dense + len(experts) * top_k * one
    layers = model.base_model.layers
    part_of = [sum(p.numel() for name, p in layer.named_parameters() if ".experts." not in name) for layer in layers]
    hidden = embedding.weight.shape[1]
    sums = sum(2 * 8 * 8 * expert_count(module) * hidden for module in experts.values())
    return Work(
        int(total * weight_bytes),
        2.0 * active * tokens,
        int((max(routed.values()) + max(part_of)) * weight_bytes),
        int(one * weight_bytes),
        int(max(*part_of, embedding.weight.numel()) * weight_bytes),
        sums,
    )


def measure_here(directory: str, streamed: bool, tokens: int) -> dict[str, float]:
    """Calibrate in this process."""
    checkpoint = Checkpoint(Path(directory))
    before = _peak()
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(1, 2000, (tokens // _BLOCK_TOKENS, _BLOCK_TOKENS), generator=generator)
    started = time.perf_counter()
    through = StreamedPass(checkpoint) if streamed else InMemoryPass(checkpoint.load())
    calibrate(through, "model", ids_BS, statistics=statistics_for([DEFAULT, *BASELINES]), batch_blocks=4)
    return {"seconds": time.perf_counter() - started, "memory": _peak() - before}


def _peak() -> int:
    """Bytes that this process has had in memory at most, without mapped files where the system tells them apart."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10


def measure(repeats: int, scratch: Path) -> list[dict[str, Any]]:
    points = [(name, replace(BASE, **{name: size})) for name, sizes in VARIED.items() for size in sizes]
    results: list[dict[str, Any]] = []
    measured: dict[tuple[Point, bool], list[dict[str, float]]] = {}  # the base is a point of each row
    for name, point in points:
        directory = scratch / f"{point.layers}-{point.experts}-{point.hidden}"
        if not directory.exists():
            random_checkpoint.write(directory, point.config())
        for streamed in (False, True):
            if (point, streamed) not in measured:
                measured[point, streamed] = [_in_a_process(directory, streamed, point.tokens) for _ in range(repeats)]
            runs = measured[point, streamed]
            results.append({"varied": name, "point": asdict(point), "streamed": streamed, "runs": runs})
            _say(f"{name} {point} {'streamed' if streamed else 'in memory'}: {runs[-1]}")
    return results


def _in_a_process(directory: Path, streamed: bool, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--here", str(directory), "--tokens", str(tokens)]
    output = run([*command, "--streamed"] if streamed else command).output
    return json.loads(output.strip().splitlines()[-1])


def rates(results: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Seconds to start, bytes read and operations per second: least squares over the streamed runs."""
    rows, seconds = [], []
    for result in results:
        if result["streamed"]:
            work = work_of(Point(**result["point"]).config(), result["point"]["tokens"])
            rows.append([1.0, work.weights, work.operations])
            seconds.append(Spread.of([one["seconds"] for one in result["runs"]]).median)
    design = torch.tensor(rows, dtype=torch.float64)
    scale = design.abs().amax(0)
    target = torch.tensor(seconds, dtype=torch.float64)[:, None]
    start, per_byte, per_operation = (torch.linalg.lstsq(design / scale, target).solution[:, 0] / scale).tolist()
    return start, 1 / per_byte if per_byte > 0 else math.inf, 1 / per_operation if per_operation > 0 else math.inf


def slope(results: list[dict[str, Any]], name: str, streamed: bool, what: str) -> str:
    """The exponent between the smallest and the largest size: 1 is proportional, 0 is no growth."""
    of = [result for result in results if result["varied"] == name and result["streamed"] == streamed]
    low, high = (Spread.of([one[what] for one in result["runs"]]).median for result in (of[0], of[-1]))
    return f"{math.log(high / low) / math.log(VARIED[name][-1] / VARIED[name][0]):.2f}"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where to put some 2 GiB of models")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # this and the next two: one run in a process of its own
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--streamed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        sys.stdout.write(json.dumps(measure_here(arguments.here, arguments.streamed, arguments.tokens)) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="moeprune-bench-", dir=arguments.directory) as scratch:
        results = measure(arguments.repeats, Path(scratch))
    report(results)


def report(results: list[dict[str, Any]]) -> None:
    rows = []
    for name, sizes in VARIED.items():
        for streamed in (False, True):
            of = [result for result in results if result["varied"] == name and result["streamed"] == streamed]
            row = {"varied": f"{name} {', '.join(map(str, sizes))}", "pass": "streamed" if streamed else "in memory"}
            row["seconds"] = ", ".join(f"{Spread.of([r['seconds'] for r in o['runs']]).median:.1f}" for o in of)
            row["time grows as power"] = slope(results, name, streamed, "seconds")
            row["memory, MiB"] = ", ".join(
                f"{Spread.of([r['memory'] for r in o['runs']]).median / (1 << 20):,.0f}" for o in of
            )
            row["memory grows as power"] = slope(results, name, streamed, "memory")
            rows.append(row)
    start, reading, computing = rates(results)
    brought_in = f"weights brought in at {reading / 1e9:.2f} GB/s"
    if math.isinf(reading):
        brought_in = "weights brought in too fast to tell beside the computing (their files were cached)"
    notes = (
        f"Base: {BASE}. Memory is the peak beyond what the libraries take. Least squares over the streamed runs: "
        f"{start:.1f} s to start, {brought_in}, computing at "
        f"{computing / 1e9:.0f} GFLOP/s.\n\n" + extrapolated(reading, computing)
    )
    publish("growth", "How calibration grows", rows, {"results": results, "rates": [start, reading, computing]}, notes)


# What a GPU node is taken to do: assumptions, not measurements.
_NODE_READS = 5e9  # bytes per second, local NVMe disks
_NODE_COMPUTES = 8 * 4e14  # operations per second: 8 GPUs at 40 % of 1 PFLOP/s in bfloat16
_TOKENS = 128 * 2048


def extrapolated(reading: float, computing: float) -> str:
    """What DeepSeek-V3 and Kimi-K2 would take."""
    lines = []
    deepseek = AutoConfig.for_model("deepseek_v3")
    kimi = AutoConfig.for_model(
        "deepseek_v3",
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        vocab_size=163840,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    for name, config in (("DeepSeek-V3 (671B)", deepseek), ("Kimi-K2 (1T)", kimi)):
        work = work_of(config, _TOKENS, weight_bytes=1)  # stored as FP8
        in_memory = 2 * work.layer  # brought in as bfloat16
        least = 2 * 2 * (work.largest_part + 3 * work.expert)
        here = work.weights / reading + work.operations / computing
        one = work.weights / _NODE_READS + work.operations / _NODE_COMPUTES
        ten = work.weights / _NODE_READS + work.operations / _NODE_COMPUTES / 10
        lines.append(
            f"| {name} | {work.weights / 1e9:,.0f} GB | {work.operations / 1e15:,.0f} | {in_memory / 1e9:.0f} GB "
            f"| {least / 1e9:.0f} GB | {work.statistics / 1e9:.1f} GB | {here / 3600:,.1f} h "
            f"| {one / 60:,.1f} min | {ten / 60:,.1f} min |"
        )
    return (
        f"Extrapolated from these rates and the models' shapes, for {_TOKENS:,} tokens, weights stored as FP8; nothing "
        f"of it is measured. A node is *assumed* to read {_NODE_READS / 1e9:.0f} GB/s and to compute "
        f"{_NODE_COMPUTES / 1e15:.1f} PFLOP/s (8 GPUs at 40 % of their peak); ten nodes share the tokens, and each "
        "reads all weights.\n\n"
        "| model | weights read | PFLOP | a whole layer in memory, bfloat16 | least memory, some experts at a time "
        "| Stats | this machine | one GPU node | ten GPU nodes |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
