"""Checkpoints whose weights are quantised: what belongs to an expert goes and stays with it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from masking import experts_modules, largest_difference, masked_logits, plain_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError

BLOCK = 16
FP8_DENSE = ["self_attn", "shared_experts", "gate", "lm_head", "model.layers.0.mlp"]


Quantise = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def write(directory: Path, family: str, quantise: Quantise, stated: dict[str, Any]) -> Path:
    """A tiny checkpoint of a family, whose experts' weights are random numbers of the quantised form."""
    torch.manual_seed(0)
    config = families.tiny_config(family, hidden_size=64, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        tensors |= quantise(name, tensor)
    save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"quantization_config": stated}))
    return directory


def fp8_blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if ".mlp.experts." not in name:
        return {name: tensor}
    blocks = [-(-size // BLOCK) for size in tensor.shape]
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.rand(blocks) + 0.5}


def mxfp4_blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pairs of 4-bit numbers, and an exponent for each 32 of them."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    experts, columns, rows = tensor.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(123, 127, (experts, rows, columns // 32), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


FORMS: dict[str, tuple[str, Quantise, dict[str, Any]]] = {
    "fp8": (
        "deepseek_v3",
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": FP8_DENSE},
    ),
    "mxfp4": (
        "gpt_oss",
        mxfp4_blocks,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]},
    ),
}


@pytest.fixture(params=FORMS)
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(write(tmp_path / "source", *FORMS[request.param]))


@pytest.mark.parametrize("keep", [[0, 2, 3, 4, 6, 7], [1, 2, 5, 7]])
def test_it_is_cut_as_it_is_stored_and_computes_the_same(
    quantised: Checkpoint, keep: list[int], tmp_path: Path
) -> None:
    model, ids_BS = quantised.load(torch.float32), tiny.token_ids(0)
    names = list(experts_modules(model))
    plan = tiny.plan_for(names, [keep] * len(names), quantised.fingerprint)
    pruned = apply(quantised, plan, tmp_path / "pruned")
    before, after = (load_file(each.directory / "model.safetensors") for each in (quantised, pruned))
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if tensor.dtype == torch.uint8:  # one tensor for all experts
            assert torch.equal(tensor, before[name][keep])
        if "experts." in name and name.endswith("_inv"):  # of one expert
            number = int(name.split("experts.")[1].split(".")[0])
            old = name.replace(f"experts.{number}.", f"experts.{keep[number]}.")
            assert torch.equal(tensor, before[old])
    expected = masked_logits(model, [keep] * len(names), ids_BS)
    assert largest_difference(plain_logits(pruned.load(torch.float32), ids_BS), expected) < 1e-5 * expected.abs().max()
    assert largest_difference(plain_logits(model, ids_BS), expected) > 1e-3 * expected.abs().max()


def test_layers_may_keep_different_numbers(quantised: Checkpoint, tmp_path: Path) -> None:
    model, ids_BS = quantised.load(torch.float32), tiny.token_ids(0)
    names = list(experts_modules(model))
    keep = [[0, 3, 4, 6] if place % 2 else [0, 1, 2, 4, 5, 7] for place in range(len(names))]
    pruned = apply(quantised, tiny.plan_for(names, keep, quantised.fingerprint), tmp_path / "pruned")
    expected = masked_logits(model, keep, ids_BS)
    assert largest_difference(plain_logits(pruned.load(torch.float32), ids_BS), expected) < 1e-5 * expected.abs().max()
    stated = json.loads((pruned.directory / "config.json").read_text())["quantization_config"]
    assert stated.get("dequantize", False) == (stated["quant_method"] == "mxfp4")


def test_scales_that_are_not_there_are_missed(tmp_path: Path) -> None:
    directory = write(tmp_path / "source", *FORMS["fp8"])
    tensors = load_file(directory / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("experts.3.up_proj.weight_scale_inv"))
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=lost):
        _ = Checkpoint(directory).layout


def test_whatever_lies_below_an_expert_s_name_is_the_expert_s(tmp_path: Path) -> None:
    directory = write(tmp_path / "source", *FORMS["fp8"])
    tensors = load_file(directory / "model.safetensors")
    ups = [name for name in tensors if name.endswith(".up_proj.weight") and ".mlp.experts." in name]
    scale_of = {name.replace(".weight", ".input_scale"): torch.rand(()) for name in ups}
    save_file(tensors | scale_of, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint, keep = Checkpoint(directory), [1, 3, 4, 5]
    names = list(checkpoint.layout.layers)
    pruned = apply(checkpoint, tiny.plan_for(names, [keep] * 2, checkpoint.fingerprint), tmp_path / "pruned")
    after = load_file(pruned.directory / "model.safetensors")
    for name in (name for name in after if name.endswith("input_scale")):
        new = int(name.split("experts.")[1].split(".")[0])
        assert torch.equal(after[name], scale_of[name.replace(f"experts.{new}.", f"experts.{keep[new]}.")])
    assert sum(name.endswith("input_scale") for name in after) == len(keep) * len(names)


def test_a_router_quantised_in_blocks_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "source", *FORMS["fp8"])
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight_scale_inv"] = torch.ones(1, 4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"gate\.weight in blocks that several experts share"):
        _ = Checkpoint(directory).layout


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_what_cannot_be_undone_is_refused_by_name(method: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "source", "mixtral", lambda name, tensor: {name: tensor}, {"quant_method": method})
    for act in (lambda: Checkpoint(directory).layout, lambda: Checkpoint(directory).load()):
        with pytest.raises(InputError, match=f"quantised as {method}.*prune the unquantised original"):
            act()
