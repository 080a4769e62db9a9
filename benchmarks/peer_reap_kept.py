"""Which experts `llmcompressor` keeps by REAP, as a program of its own in that library's environment.

    python peer_reap_kept.py TOKENS.json RATIO,RATIO,... MODEL ...

Prints one line of JSON: the versions, and for each model and ratio the kept experts of each layer, in their order.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from transformers import AutoModelForCausalLM


def kept(model_path, blocks, ratio, report):  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks]),
        recipe=REAPPruningModifier(sparsity=ratio, report_path=str(report)),
        max_seq_length=len(blocks[0]),
        num_calibration_samples=len(blocks),
        moe_calibrate_all_experts=False,
        pipeline="basic",
    )
    layers = json.loads(report.read_text())
    return [layers[name] for name in sorted(layers, key=lambda name: int(name.split(".")[2]))]


def main(tokens_path, ratios, *models):  # type: ignore[no-untyped-def]
    blocks = json.loads(Path(tokens_path).read_text())
    versions = {name: version(name) for name in ("llmcompressor", "transformers", "torch")}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        kept_by = {
            Path(model).name: {ratio: kept(model, blocks, float(ratio), report) for ratio in ratios.split(",")}
            for model in models
        }
    sys.stdout.write("\n" + json.dumps({"versions": versions, "kept": kept_by}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
