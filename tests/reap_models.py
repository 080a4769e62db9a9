"""Models and tokens from a seed, the same in every release of torch and numpy, and what REAP keeps of them elsewhere.

Weights are uniform numbers from Philox, whose bits numpy promises: normal deviates are made by algorithms that a
release may change.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

FILE = Path(__file__).parent / "reference" / "reap.json"
RATIOS = (0.125, 0.25, 0.5, 0.75)
VOCABULARY = 512
LAYERS = 3
_BLOCKS, _TOKENS = 8, 64
_SPREAD = 0.6  # so that routers decide, and each expert shows

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Gate weights of a softmax over all experts, renormalised over the chosen ones or not, or over the chosen ones alone.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": False},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
}


def config_of(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **_SIZES, **FAMILIES[family])


def write(directory: Path, family: str) -> Path:
    """A checkpoint in float32."""
    AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {name: _weight(f"{family} {name}", tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def token_ids() -> torch.Tensor:
    """`[blocks, tokens per block]`; some tokens are much more frequent than others, as in any text."""
    return torch.from_numpy(1 + (_uniform("tokens", (_BLOCKS, _TOKENS)) ** 3 * (VOCABULARY - 1)).astype(np.int64))


def _weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 1:  # a norm's
        return torch.ones_like(tensor)
    uniform = _uniform(name, tuple(tensor.shape)) - 0.5
    return torch.from_numpy((_SPREAD * uniform).astype(np.float32))


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Numbers from 0 to 1, which are a name's own."""
    bits = np.random.Philox(key=crc32(name.encode())).random_raw(prod(shape))
    return (bits >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**53
