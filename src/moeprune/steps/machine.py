"""What the computing ran on: logged with every result."""

from __future__ import annotations

import platform

import torch
import transformers
from transformers.utils import logging as transformers_logging

import moeprune
from moeprune.checkpoint.loading import default_device, default_dtype


def describe() -> dict[str, str]:
    """Device, dtype, threads and versions, as text."""
    device = default_device()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "dtype": str(default_dtype(device)).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moeprune": moeprune.__version__,
    }


def quieten() -> None:
    """Keep the libraries' own bars and advice off a screen that shows ours."""
    import datasets

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs as errors what it raises as well
