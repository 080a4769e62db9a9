"""REAP by `llmcompressor` on checkpoints, as a program of its own in that library's environment.

    python peer_reap.py TOKENS.json OUT RATIO DTYPE MODEL ...

Prints one line of JSON a model: the error, unless it was pruned, saved below OUT and loaded from there.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def prune(model_path, blocks, out, ratio, dtype):  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    data = Dataset.from_list([{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks])
    oneshot(
        model=model,
        dataset=data,
        recipe=REAPPruningModifier(sparsity=ratio),
        max_seq_length=len(blocks[0]),
        num_calibration_samples=len(blocks),
        moe_calibrate_all_experts=False,
    )
    model.save_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out)


def main(tokens_path, out, ratio, dtype, *models):  # type: ignore[no-untyped-def]
    blocks = json.loads(Path(tokens_path).read_text())
    for model in models:
        told = {"model": Path(model).name, "known": Path(model).name in CONFIG_MAPPING}
        try:
            prune(model, blocks, Path(out) / Path(model).name, float(ratio), dtype)
        except Exception as error:
            if len(models) == 1:
                raise
            told["error"] = f"{type(error).__name__}: {error}"[:200]
        sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
