"""What the computing ran on: logged with every result."""

from __future__ import annotations

import platform

import torch
import transformers
from transformers.utils import logging as transformers_logging

import moeprune
from moeprune.checkpoint.loading import default_device, default_dtype
from moeprune.errors import InputError

DTYPES = ("auto", "float32", "bfloat16")


def dtype_named(name: str) -> torch.dtype:
    """What a name in `DTYPES` means on this machine. Raises InputError for another."""
    match name:
        case "auto":
            return default_dtype(default_device())
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
    raise InputError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")


def describe(dtype: str = "auto") -> dict[str, str]:
    """Device, dtype, threads and versions, as text."""
    return {
        "device": _device(),
        "dtype": str(dtype_named(dtype)).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moeprune": moeprune.__version__,
    }


def _device() -> str:
    if default_device().type != "cuda":
        return f"{platform.machine()} CPU"
    count = torch.cuda.device_count()
    return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name()


def quieten() -> None:
    """Keep the libraries' own bars and advice off a screen that shows ours."""
    import datasets

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs as errors what it raises as well
