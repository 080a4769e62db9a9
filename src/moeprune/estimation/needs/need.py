"""What a step needs, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.estimation.amounts import NOTHING, Amount, Basis, Term, largest

LIBRARIES = 1 << 29  # bytes of Python with torch and transformers in memory, by benchmarks/estimate.py
CUDA_HOST = 2 << 30  # more of them with CUDA
CUDA_DEVICE = 700 << 20  # what CUDA itself takes of a GPU


@dataclass(frozen=True)
class Phase:
    """What is in memory at once.

    Attributes:
        device: where the model computes: on a GPU, or in the pod's memory where there is none.
        host: in the pod's memory in any case.
        passing: in the pod's memory before it goes to a single GPU; to several it goes piece by piece.
    """

    name: str
    device: Amount = NOTHING
    host: Amount = NOTHING
    passing: Amount = NOTHING


@dataclass(frozen=True)
class Need:
    """One step's.

    Attributes:
        step: as the pipeline calls it.
        phases: one after another.
        disk: what a pod brings to its disk and writes there.
        operations: of floating point, of all pods together; each pod does its share.
        moved: bytes of weights that each pod reads.
        pods: that do the step, side by side where the cluster has room.
        computes: whether a GPU helps.
        spreads: whether a model that one GPU is too small for is spread over several.
        processes: of a pod, each with a GPU of its own and an equal part of what is on the device.
        advice: what to do where the memory is too much.
    """

    step: str
    phases: tuple[Phase, ...]
    disk: Amount = NOTHING
    operations: Amount = NOTHING
    moved: Amount = NOTHING
    pods: int = 1
    computes: bool = False
    spreads: bool = False
    processes: int = 1
    advice: str = ""

    def memory(self, gpus: int) -> Amount:
        """Of a pod with so many GPUs, at its peak."""
        libraries = Term("Python and the libraries", LIBRARIES * self.processes, Basis.MEASURED)
        if not gpus:
            return Amount.of(libraries) + largest([phase.host + phase.device for phase in self.phases])
        cuda = Term("CUDA's part of them", CUDA_HOST * self.processes, Basis.ASSUMED)
        held = [phase.host + (phase.passing if gpus == 1 else NOTHING) for phase in self.phases]
        return Amount.of(libraries, cuda) + largest(held)

    def gpu_memory(self) -> Amount:
        """Of all its GPUs together, at its peak."""
        if not self.computes:
            return NOTHING
        return Amount.of(Term("CUDA itself", CUDA_DEVICE * self.processes, Basis.ASSUMED)) + largest(
            [phase.device for phase in self.phases]
        )
