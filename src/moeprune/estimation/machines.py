"""What does the work, and how fast that is: measured here, or a GPU of which the maker's numbers are known."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from moeprune.checkpoint.loading import default_device, default_dtype
from moeprune.errors import InputError
from moeprune.estimation.amounts import Basis
from moeprune.estimation.anatomy import Anatomy

_GIB = 1 << 30
EFFICIENCY = 0.3  # of a GPU's peak that passes through a Mixture-of-Experts reach: assumed
USABLE = 0.92  # of a GPU's memory: the rest is the allocator's gaps
_DISK_READS = 1e9  # bytes per second, of a disk or an object store: assumed
_PROBE_SECONDS = 0.3
_PROBE_TOKENS = 8192
_PROBE_EXPERTS = 3  # in turns, so that no cache holds their weights


@dataclass(frozen=True)
class Rate:
    """Per second, and where that is known from."""

    value: float
    basis: Basis
    why: str


@dataclass(frozen=True)
class Machine:
    """One pod's machine.

    Attributes:
        name: for people.
        gpu_memory: bytes of one GPU; 0 where models are computed on the processor, in the pod's own memory.
        computes: floating-point operations per second, of one GPU or of all cores.
        reads: bytes of weights per second.
        item: bytes of a number of a loaded model, which is as `Checkpoint.load` chooses it for such a machine.
    """

    name: str
    gpu_memory: int
    computes: Rate
    reads: Rate
    item: int


@dataclass(frozen=True)
class Gpu:
    """As its maker publishes it: memory, and dense bfloat16 (or, where it has none, float16) operations per second."""

    memory: int
    peak: float


GPUS = {
    "T4": Gpu(16 * _GIB, 65e12),
    "L4": Gpu(24 * _GIB, 121e12),
    "A10G": Gpu(24 * _GIB, 70e12),
    "A100-40GB": Gpu(40 * _GIB, 312e12),
    "A100-80GB": Gpu(80 * _GIB, 312e12),
    "L40S": Gpu(48 * _GIB, 362e12),
    "H100-80GB": Gpu(80 * _GIB, 989e12),
    "H200": Gpu(141 * _GIB, 989e12),
    "B200": Gpu(180 * _GIB, 2250e12),
    "MI300X": Gpu(192 * _GIB, 1307e12),
}


def gpu(name: str) -> Machine:
    """Raises InputError for a GPU that is not in the table."""
    known = {one.lower(): one for one in GPUS}
    if name.lower() not in known:
        raise InputError(f"nothing is known of the GPU {name!r}; known: {', '.join(GPUS)}")
    name = known[name.lower()]
    found = GPUS[name]
    why = f"{EFFICIENCY:.0%} of the published {found.peak / 1e12:,.0f} TFLOP/s"
    return Machine(name, found.memory, Rate(EFFICIENCY * found.peak, Basis.ASSUMED, why), _assumed_reads(), 2)


def here(anatomy: Anatomy) -> Machine:
    """This machine, on which experts of this model's shape are run for a moment."""
    device = default_device()
    memory, name = 0, f"this machine, {os.cpu_count()} cores"
    if device.type == "cuda":
        memory, name = torch.cuda.mem_get_info()[1], f"this machine's {torch.cuda.get_device_name()}"
    rate = Rate(_measured(anatomy, device), Basis.MEASURED, "experts of this model's shape, run here for a moment")
    return Machine(name, memory, rate, _assumed_reads(), default_dtype(device).itemsize)


def _assumed_reads() -> Rate:
    return Rate(_DISK_READS, Basis.ASSUMED, "a disk or object store of 1 GB/s")


@torch.inference_mode()
def _measured(anatomy: Anatomy, device: torch.device) -> float:
    """Operations per second in experts, each on as many tokens as it gets of a batch."""
    layer, dtype = anatomy.largest, default_dtype(device)
    tokens = max(1, _PROBE_TOKENS * layer.top_k // layer.experts)
    x_TH = torch.randn(tokens, anatomy.hidden, device=device, dtype=dtype)
    rows = max(1, layer.per_expert // (3 * anatomy.hidden))
    experts = [
        (
            torch.randn(anatomy.hidden, 2 * rows, device=device, dtype=dtype),
            torch.randn(rows, anatomy.hidden, device=device, dtype=dtype),
        )
        for _ in range(min(_PROBE_EXPERTS, layer.experts))
    ]

    def run_all() -> None:
        for first_HI, down_IH in experts:
            gate_TI, up_TI = (x_TH @ first_HI).chunk(2, dim=-1)
            _ = (torch.nn.functional.silu(gate_TI) * up_TI) @ down_IH
        if device.type == "cuda":
            torch.cuda.synchronize()

    run_all()
    started, best = time.perf_counter(), float("inf")
    while (begun := time.perf_counter()) - started < _PROBE_SECONDS:
        run_all()
        best = min(best, time.perf_counter() - begun)  # what else runs here is not the machine's doing
    return len(experts) * 2.0 * tokens * 3 * rows * anatomy.hidden / best
