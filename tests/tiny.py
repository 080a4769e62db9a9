"""Tiny random models of several families, with a real tokenizer and texts to run through them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

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

from moeprune.plan import LayerPlan, Plan
from moeprune.statistics import ExactSum, LayerStats, Stats

EXPERTS = 8
TOP_K = 2
HIDDEN = 32
BLOCK_TOKENS = 24
VOCABULARY = 320

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.25,  # large enough that each expert shows in the logits
}

# Between them: gate weights from a softmax before and after the choice of the top-k, renormalised or not or scaled; a
# shared expert; a dense first layer; three names for the number of experts; experts stored one by one and fused.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        num_hidden_layers=3,
        num_experts=EXPERTS,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
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
    "granitemoe": lambda: GraniteMoeConfig(**_SIZES, num_hidden_layers=2, num_local_experts=EXPERTS),
}


def dense_config() -> PretrainedConfig:
    """Of a model without experts."""
    sizes = {key: value for key, value in _SIZES.items() if key != "num_experts_per_tok"}
    return LlamaConfig(**sizes, num_hidden_layers=1)


def group_limited_config() -> PretrainedConfig:
    """Of a model that first chooses groups of experts, then experts among them."""
    config = FAMILIES["deepseek_v2"]()
    config.topk_method, config.n_group, config.topk_group = "group_limited_greedy", 4, 2
    return config


_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into
""".split()  # noqa: SIM905


def sentences(seed: int, count: int) -> list[str]:
    """Random words, the same for a seed."""
    random = Random(seed)
    return [" ".join(random.choices(_WORDS, k=random.randint(8, 20))) + "." for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(0, 200), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=0, pad_token_id=0)
    return model


def write(directory: Path, config: PretrainedConfig, seed: int = 0, shard: str = "1GB", dtype: str = "float32") -> Path:
    """A checkpoint as its authors would publish it."""
    build(config, seed).to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("Do with it what you like.\n")
    (directory / "README.md").write_text("# The original\n")
    return directory


def token_ids(seed: int, blocks: int = 2, tokens: int = BLOCK_TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (blocks, tokens), generator=generator)


def router_weights(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Each layer's router, found by the names that these families give it."""
    return {
        int(name.split(".")[2]): parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".gate.weight", ".router.weight"))
    }


def experts_module_names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(".experts")]


def plan_for(names: list[str], keep: list[list[int]], fingerprint: str, experts: int = EXPERTS) -> Plan:
    layers = {name: LayerPlan(experts=experts, top_k=TOP_K, keep=kept) for name, kept in zip(names, keep, strict=True)}
    return Plan(method="by hand", options={}, ratio=0.5, model=fingerprint, data="0" * 32, layers=layers)


def _inside_sums(routed_E: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """What calibration could have seen inside experts that are used so often."""
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = 16, len(routed_E)
    output_ETH = torch.randn(experts, tokens, 4, generator=generator)  # as if each token of an expert were one of these
    gated_EN = output_ETH.flatten(1) * routed_E[:, None].sqrt()
    per_token_E = routed_E / tokens
    square_EH = output_ETH.square().sum(1) * per_token_E[:, None]
    squares = {f"{gated}{what}_square": square_EH for gated in ("", "gated_") for what in ("input", "hidden")}
    apart_EE = (output_ETH[:, None] - output_ETH).square().sum((2, 3))
    apart_EE.diagonal().copy_(output_ETH.square().sum((1, 2)))
    return squares | {
        "stand_in": apart_EE * per_token_E[:, None] / 4,
        "gated_norm": output_ETH.norm(dim=-1).sum(1) * per_token_E / 2,
        "output": output_ETH.sum(1) * per_token_E[:, None],
        "output_square": output_ETH.square().sum((1, 2)) * per_token_E,
        "overlap": gated_EN @ gated_EN.T / tokens,
    }


def make_stats(
    routed_LE: Sequence[Sequence[int]],
    probes_LGEH: torch.Tensor | None = None,
    *,
    top_k: int = TOP_K,
    blocks_per_group: list[int] | None = None,
    name: str = "model.layers.{}.mlp.experts",
    model: str = "f" * 64,
    data: str = "1" * 32,
) -> Stats:
    """Stats by hand: how often each expert of each layer is used, and what it puts out, summed over each group."""
    experts = len(routed_LE[0])
    if probes_LGEH is None:
        generator = torch.Generator().manual_seed(0)
        probes_LGEH = torch.randn(len(routed_LE), 2, experts, 4, generator=generator)
    blocks_per_group = blocks_per_group or [3] * probes_LGEH.shape[1]
    layers = {}
    for place, (routed_E, probes_GEH) in enumerate(zip(routed_LE, probes_LGEH, strict=True)):
        routed = torch.tensor(routed_E, dtype=torch.int64)
        layers[name.format(place)] = LayerStats(
            experts,
            top_k,
            counts={"routed_tokens": routed},
            sums={
                statistic: ExactSum.zeros(*value.shape).add_(value)
                for statistic, value in (
                    _inside_sums(routed, place) | {"gate": routed / 2, "probe_output": probes_GEH}
                ).items()
            },
        )
    blocks = sum(blocks_per_group)
    return Stats(model, data, BLOCK_TOKENS, blocks * BLOCK_TOKENS, blocks, blocks_per_group, layers)
