"""Train the embedded reference model from nothing: `make reference-model`.

A small Qwen2-MoE (16 routed experts, top-2, and a shared one in each of 6 layers) learns code, prose and arithmetic
from the texts of `moeprune.builtin.corpus`. Nothing teaches the router which domain is which: the usual load-balancing
loss, over whole batches of mixed domains, is all it gets.

Writes the checkpoint (bfloat16, tokenizer included) every 250 steps and, beside it in `training.json`, the figures of
the training. The same seed, thread count, Python and library versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moeprune.builtin.corpus import DOMAINS, documents

SEED = 20261121
BLOCK = 256
BATCH = 16
PEAK_LEARNING_RATE, FINAL_LEARNING_RATE = 2.5e-3, 1e-4
WARM_UP = 150
# Prose is the scarcest text (about 0.5 M tokens), so it is seen least, and each token of it still most often.
SHARE = {"code": 0.45, "prose": 0.30, "arithmetic": 0.25}
HELD_OUT_BLOCKS = 32

CONFIG = Qwen2MoeConfig(
    vocab_size=4096,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=16,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=128,
    intermediate_size=512,
    decoder_sparse_step=1,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    router_aux_loss_coef=0.01,
    initializer_range=0.02,
    use_sliding_window=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts; each digit is a token of its own, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for domain in ("code", "prose") for text in documents(domain)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, domain: str, split: str) -> np.ndarray:
    """All documents of a domain as one array of token ids, each ended by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer(list(documents(domain, split)))["input_ids"]:
        ids += encoding
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int32)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate."""
    if step < WARM_UP:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def imbalance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4), over the whole batch, each layer for
    itself.

    The model's own `aux_loss` sums the loads of all layers first, so that one layer's idle expert is made up by the
    busy one of the same number in another, and half of all experts die.
    """
    losses = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        chosen_TK = probability_TE.topk(CONFIG.num_experts_per_tok).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=CONFIG.num_experts) / chosen_TK.numel()
        losses.append(CONFIG.num_experts * (load_E * probability_TE.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out_loss(model: Qwen2MoeForCausalLM, stream: np.ndarray) -> float:
    """Mean loss in nats per token over the first blocks of a held-out stream."""
    blocks = torch.from_numpy(stream[: HELD_OUT_BLOCKS * BLOCK].astype(np.int64)).view(-1, BLOCK)
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in blocks.split(BATCH)]
    model.train()
    return sum(losses) / len(losses)


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, figures: dict[str, object], out: Path) -> None:
    """Write the checkpoint in bfloat16; the model in training stays as it is, in float32."""
    copy = Qwen2MoeForCausalLM(CONFIG)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint into")
    parser.add_argument(
        "--steps", type=int, default=2600, help=f"optimiser steps of {BATCH * BLOCK} tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; the weights depend on it (default: %(default)s)"
    )
    options = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(SEED)
    tokenizer = train_tokenizer()
    train = {domain: token_stream(tokenizer, domain, "train") for domain in DOMAINS}
    held_out = {domain: token_stream(tokenizer, domain, "held-out") for domain in DOMAINS}
    print({domain: len(stream) for domain, stream in train.items()}, "training tokens", flush=True)

    model = Qwen2MoeForCausalLM(CONFIG)
    model.set_experts_implementation("eager")
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    print(f"{model.num_parameters():,} parameters", flush=True)

    curve, started = [], time.monotonic()
    for step in range(options.steps):
        domains = rng.choice(DOMAINS, size=BATCH, p=[SHARE[domain] for domain in DOMAINS])
        starts = [rng.integers(len(train[domain]) - BLOCK) for domain in domains]
        batch = np.stack([train[domain][start : start + BLOCK] for domain, start in zip(domains, starts, strict=True)])
        input_ids = torch.from_numpy(batch.astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        out = model(input_ids=input_ids, output_router_logits=True)
        loss = next_token_loss(out.logits, input_ids)
        (loss + CONFIG.router_aux_loss_coef * imbalance(out.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            losses = {domain: round(held_out_loss(model, held_out[domain]), 4) for domain in DOMAINS}
            seconds = time.monotonic() - started
            curve.append({"step": step + 1, "held_out_loss_nats": losses})
            print(f"step {step + 1}  {seconds:.0f} s  train {loss.item():.3f}  held out {losses}", flush=True)
            figures = {
                "seed": SEED,
                "steps": options.steps,
                "tokens": (step + 1) * BATCH * BLOCK,
                "share": SHARE,
                "training_tokens_available": {domain: len(stream) for domain, stream in train.items()},
                "seconds": round(seconds),
                "threads": options.threads,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "curve": curve,
            }
            save(model, tokenizer, figures, options.out)


if __name__ == "__main__":
    main()
