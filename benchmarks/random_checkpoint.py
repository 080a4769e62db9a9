"""Checkpoints of a real family's shape with random weights, of any size, written tensor by tensor.

They are stored under the names and in the shapes that the family's published checkpoints have, with a real tokenizer,
so that everything can be run on them. What the experts do is noise: good for time and memory, for nothing else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from moeprune.checkpoint.layout import build_without_weights
from moeprune.places import REFERENCE_MODEL, local_model

_ITEM_BYTES = 2  # bfloat16
_SHARD_BYTES = 4 << 30


def olmoe(layers: int) -> PretrainedConfig:
    """The shape of OLMoE-1B-7B: 64 experts of width 1,024, top-8; 420 million parameters a layer."""
    return AutoConfig.for_model(
        "olmoe",
        intermediate_size=1024,
        num_experts=64,
        **_sizes(layers, hidden=2048, heads=16, key_value_heads=16),
    )


def granite(layers: int) -> PretrainedConfig:
    """The shape of Granite-3.0-1B-A400M: 32 experts of width 512, top-8."""
    return AutoConfig.for_model(
        "granitemoe",
        intermediate_size=512,
        num_local_experts=32,
        **_sizes(layers, hidden=1024, heads=16, key_value_heads=8),
    )


def qwen3(layers: int) -> PretrainedConfig:
    """The shape of Qwen3-30B-A3B: 128 experts of width 768, top-8."""
    return AutoConfig.for_model(
        "qwen3_moe",
        moe_intermediate_size=768,
        head_dim=128,
        num_experts=128,
        norm_topk_prob=True,
        **_sizes(layers, hidden=2048, heads=32, key_value_heads=4),
    )


def _sizes(layers: int, hidden: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    """What all have, under the names that all have for it; a vocabulary that weighs little beside the layers."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_experts_per_tok": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def olmoe_of(size: int) -> PretrainedConfig:
    """That shape with as many layers as it takes to have at least so many bytes."""
    first, second = (sum(_bytes(shape) for shape in stored_shapes(olmoe(layers)).values()) for layers in (1, 2))
    return olmoe(max(1, -(-(size - (2 * first - second)) // (second - first))))


def stored_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this config, as they are stored."""
    model = build_without_weights(config, dtype=torch.bfloat16)
    model._weight_conversions = get_model_conversion_mapping(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def write(directory: Path, config: PretrainedConfig, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its tensors. Memory holds one tensor."""
    directory.mkdir(parents=True)
    shapes = stored_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(directory / file, {name: shapes[name] for name in shard}, generator)
    total = sum(map(_bytes, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    with local_model(REFERENCE_MODEL) as reference:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            copy(reference / name, directory / name)
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if shard and size + _bytes(shape) > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(shape)
    yield shard


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    offset, header = 0, {}
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + _bytes(shape)]}
        offset += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)


def _bytes(shape: tuple[int, ...]) -> int:
    return prod(shape) * _ITEM_BYTES
