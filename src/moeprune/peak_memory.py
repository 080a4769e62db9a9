"""What this process has taken at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_resident_bytes() -> int:
    """Of memory, whatever its device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def peak_memory_bytes() -> int:
    """Where the model is: on a GPU the peak of its allocator, otherwise of resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()
