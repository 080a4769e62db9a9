"""Every causal-LM family of the installed transformers that dispatches its experts through `ExpertsInterface`, tiny.

Families are discovered, and their tiny configs made by rules over the names of the fields, so that a family of a
transformers to come is tested without a change here. What a rule cannot know is in `OVERRIDES`, each with its reason.
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPERTS = 8
TOP_K = 2
GROUPS = 2
VOCABULARY = 320

_MARK = "use_experts_implementation"  # the decorator with which a modelling file joins the interface


@cache
def discovered() -> list[str]:
    """Model types, alphabetically."""
    models = Path(transformers.__file__).parent / "models"
    return sorted(
        model_type
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for file in (models / model_type_to_module_name(model_type)).glob("modeling_*.py")
        if _MARK in file.read_text()
    )


def has_table(model_type: str) -> bool:
    """Whether some of the layers choose experts by a table from token to expert."""
    return "hash_moe" in (getattr(tiny_config(model_type), "mlp_layer_types", None) or [])


# Field name -> its tiny value; the first match decides. A field that is 0, or not a number, stays as it is.
_SIZES: list[tuple[str, int | float]] = [
    (r"vocab", VOCABULARY),
    (r"(bos|eos|pad|sep|eod)_token_id$", 0),
    (r"token_(id|index)$", 5),
    (r"^initializer_range$", 0.25),  # large enough that each expert shows in the logits
    (r"nextn|mtp", 0),
    (r"^max_position_embeddings$|^model_max_length$|^rel_extent$", 128),
    (r"sliding_window(_size)?$|chunk_size$|block_size$", 8),
    (r"^hidden_size$|^ple_embed_dim$", 32),
    (r"(key_value|kv|key)_heads$|index_n_heads$", 2),
    (r"num_heads$|n_heads$|attention_heads$|value_heads$", 4),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"head_dim$|d_head$", 16),
    (r"rank$|^hc_lowrank$|^hidden_size_per_layer_input$|^router_hidden_size$", 16),
    (r"_state(_size)?$", 8),
    (r"^index_topk$", 8),
]
# These make the model a Mixture-of-Experts. Where a family leaves them open (None), they are filled in, too.
_EXPERTS: list[tuple[str, int]] = [
    (r"shared_experts$", 1),
    (r"^(moe_)?n(um)?_(local_|routed_)?experts$", EXPERTS),
    (r"^num_experts_per_tok(en)?$|^moe_(top)?k$|^top_k_experts$", TOP_K),
    (r"intermediate_size$", 16),
]
# What a family can have, but has none of by default: a first layer without experts, shared experts.
_OPTIONS = [
    (r"^first_k_dense_replace$|^num_dense_layers$|^moe_layer_start_index$|^num_shared_experts$", 1),
    (r"^shared_intermediate_size$", 16),
]


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A config of this family of a few kilobytes' model, with a layer of each kind that the family has."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merged(_shrunk(config_class), OVERRIDES.get(model_type, {}) | changes))


def _shrunk(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    full = config_class()
    full.allow_global_per_layer_attribute_access = True
    values: dict[str, Any] = {}
    for name in _fields(config_class):
        default = getattr(full, name, None)
        if name == "text_config":  # the others, of images and sound, are of no part that is built here
            values[name] = _shrunk(type(default))
        elif (tiny := _tiny_value(name, default)) is not None:
            values[name] = tiny
    values |= _groups(full)
    if getattr(full, "kv_lora_rank", None):  # latent attention has a key per head
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | _few_layers(full)


def _fields(config_class: type[PretrainedConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _tiny_value(name: str, default: Any) -> int | float | None:
    is_number = type(default) in (int, float)
    rules = [
        *(_EXPERTS if default is None or default else []),
        *(_SIZES if default else []),
        *_OPTIONS,
    ]
    rules = rules if is_number or default is None else []
    return next((tiny for pattern, tiny in rules if re.search(pattern, name)), None)


def _groups(full: PretrainedConfig) -> dict[str, int]:
    """Where a router chooses among groups of experts first: half of them."""
    chosen = getattr(full, "n_group", None) or 1
    if chosen == 1:
        return {}
    return {"n_group": GROUPS, "topk_group": 1}


def _few_layers(full: PretrainedConfig) -> dict[str, Any]:
    """One layer of each kind, and one more of the last two."""
    names = _fields(type(full))
    depth = getattr(full, "num_hidden_layers", None)
    if depth is None or "num_hidden_layers" not in names:
        return {}
    lists = {
        name: list(value)
        for name, value in ((name, getattr(full, name, None)) for name in names)
        if isinstance(value, list | tuple) and len(value) == depth
    }
    kinds = [json.dumps([of_layers[layer] for of_layers in lists.values()]) for layer in range(depth)]
    chosen = sorted({*(kinds.index(kind) for kind in kinds), depth - 1, depth - 2})
    return {"num_hidden_layers": len(chosen)} | {
        name: [of_layers[layer] for layer in chosen] for name, of_layers in lists.items()
    }


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merged(merged.get(name, {}), change) if isinstance(change, dict) else change
    return merged


_DOTS_SLIDING = {  # sliding layers have sizes of their own, which are not fields but arguments
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA_EXPERTS = {"enable_moe_block": True, "global_head_dim": 16}  # experts are an option, off by default
_QWEN4_INDEXER = {  # open by default, and wanted all together
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "text_config": _DOTS_SLIDING,
        "vision_config": {"adapter_out_dim": 32},  # not built, but must fit the hidden size
        "audio_config": {"adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS_SLIDING,
    "gemma4": {"text_config": _GEMMA_EXPERTS},
    "gemma4_text": _GEMMA_EXPERTS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},  # no attention
    "hunyuan_v1_moe": {"head_dim": 8},  # open by default, and needed for its rotary embedding
    # A mamba layer and an attention layer, each with experts and without: what the periods of 8 and 2 come to.
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},  # no default
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],  # a layer is one block
        "n_groups": 2,  # of its mamba layers: must divide their heads
        "mamba_head_dim": 16,
    },
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "zaya": {"num_experts_per_tok": 1},  # it supports no other
}
