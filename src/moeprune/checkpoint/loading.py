"""From a checkpoint directory to a model in memory, on the device there is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeprune.checkpoint import modelling
from moeprune.checkpoint.byte_sources import ByteSource
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.identity import fingerprint
from moeprune.checkpoint.layout import Layout, build_without_weights, find_layout
from moeprune.checkpoint.unsupported import quantisation, refuse_quantisation
from moeprune.errors import InputError


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory. Nothing is read before it is asked for.

    Attributes:
        directory: a local directory with `config.json`, safetensors files and, where text is to be read, a tokenizer.
        trust_remote_code: whether modelling code found in the checkpoint may run. The file that moeprune itself puts
            into a non-uniformly pruned checkpoint runs without it, as long as it is, byte for byte, the one we write.
        weights: where the safetensors files lie, if not in the directory. Such a model can be streamed and cut, but not
            loaded as a whole.
    """

    directory: Path
    trust_remote_code: bool = False
    weights: ByteSource | None = None

    @cached_property
    def files(self) -> CheckpointFiles:
        return CheckpointFiles(self.weights or self.directory)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises InputError where there is no readable config of a known architecture."""
        if not (self.directory / "config.json").is_file():
            raise InputError(f"{self.directory} is not a checkpoint: it has no config.json")
        try:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except (ValueError, OSError, json.JSONDecodeError) as error:
            raise InputError(f"the config of {self.directory} cannot be read: {_first_line(error)}") from error

    @cached_property
    def layout(self) -> Layout:
        return find_layout(self.config, self.files)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.files, self.layout)

    @cached_property
    def experts_per_layer(self) -> dict[str, int]:
        """Routed experts in each layer, whether the checkpoint is an original, uniformly or non-uniformly pruned."""
        own = modelling.experts_per_layer(self.config)
        return own if own is not None else {name: layer.experts for name, layer in self.layout.layers.items()}

    @property
    def may_run_code(self) -> bool:
        """Whether modelling code in the checkpoint runs: the user said so, or it is ours."""
        return self.trust_remote_code or modelling.is_ours(self.directory)

    def without_weights(self, **options: Any) -> PreTrainedModel:
        """The model on the meta device."""
        return build_without_weights(self.config, trust_remote_code=self.may_run_code, **options)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises InputError where the checkpoint has none."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise InputError(f"{self.directory} has no readable tokenizer: {_first_line(error)}") from error
        if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:  # what some classes make of no files at all
            raise InputError(f"{self.directory} has no readable tokenizer: the one there is has no vocabulary")
        return tokenizer

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        sharded: DistributedConfig | None = None,
    ) -> PreTrainedModel:
        """Load the model for inference. Quantised weights are undone, so that experts compute the same on any device.

        Args:
            dtype: of the weights in memory; by default that of the device (`default_dtype`).
            device: by default the one there is (`default_device`), or all GPUs where there are several.
            sharded: how the processes of a group share the model, each of which loads its part alone.

        Raises:
            InputError: the weights cannot be loaded, or do not all fit the architecture.
        """
        _ = self.files.entries  # names a missing or damaged shard before anything is built
        spread: dict[str, Any] = {}
        if sharded is not None:
            spread = {"distributed_config": sharded}
        elif device is None and torch.cuda.device_count() > 1:
            spread = {"device_map": "auto"}
        device = device or default_device()
        try:
            with one_after_another():
                model, info = AutoModelForCausalLM.from_pretrained(
                    self.directory,
                    dtype=dtype or default_dtype(device),
                    trust_remote_code=self.may_run_code,
                    output_loading_info=True,
                    quantization_config=undoing_quantisation(self.config),
                    **spread,
                )
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{self.directory} cannot be loaded: {_first_line(error)}") from error
        absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if absent:
            raise InputError(
                f"{self.directory} does not fit its architecture; missing or misshapen: {', '.join(absent[:3])}"
            )
        return (model if spread else model.to(device)).eval()


def undoing_quantisation(config: PretrainedConfig) -> QuantizationConfigMixin | None:
    """With what transformers undoes the quantisation of stored weights; None where they are not quantised."""
    if quantisation(config) is None:
        return None
    refuse_quantisation(config)
    stated = config.quantization_config
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    return AutoQuantizationConfig.from_dict({**stated, "dequantize": True})


@contextmanager
def one_after_another() -> Iterator[None]:
    """Have transformers read a parameter's tensors when it converts them, and not all at once in threads.

    Otherwise the stored tensors of the whole model are in memory beside those that are made of them.
    """
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def default_device() -> torch.device:
    """CUDA where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where few processors multiply bfloat16 faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
