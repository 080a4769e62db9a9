"""What the tests share: tiny random models of five families with a real tokenizer, texts, and the two services.

Everything is made in a temporary directory; nothing is downloaded, and the user's own environment is kept out.
"""

from __future__ import annotations

import os
import shutil
import tempfile

# Read by the libraries when they are imported: what they cache goes to a directory of this test run.
_HOME = tempfile.mkdtemp(prefix="moeprune-tests-")
os.environ |= {"HF_HOME": _HOME, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GenerationConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from moeprune.checkpoint.loading import Checkpoint
from moeprune.services import Services, session
from moeprune.services.ports import free_ports
from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.texts import Blocks, read_blocks

torch.set_num_threads(1)

EXPERTS = 8
TOP_K = 2
HIDDEN = 32
BLOCK_TOKENS = 24

_SIZES = {
    "vocab_size": 320,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,  # large enough that each expert shows in the logits
}

# Between them: gate weights from a softmax before and after the choice of the top-k, with and without being renormalised;
# a shared expert; a dense first layer; experts counted by four different names.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        num_hidden_layers=3,
        num_experts=EXPERTS,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=1,
        norm_topk_prob=False,
    ),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_hidden_layers=2, num_local_experts=EXPERTS),
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_hidden_layers=2, num_experts=EXPERTS, norm_topk_prob=True),
    "deepseek_v2": lambda: DeepseekV2Config(
        **_SIZES,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        topk_method="greedy",
        routed_scaling_factor=1.5,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **_SIZES, num_hidden_layers=2, num_local_experts=EXPERTS, logits_scaling=1.0, residual_multiplier=1.0
    ),
}
