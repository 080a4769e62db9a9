"""Measuring gives what an independent computation gives, in a process of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from masking import draws
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.evaluation.measure import Measured, measure
from moeprune.texts import Blocks


def blocks_of(name: str, seed: int, blocks: int = 5) -> Blocks:
    return Blocks(name, f"made of {seed}", tiny.token_ids(seed, blocks), f"{seed:032x}")


CODE, PROSE = blocks_of("code", 1), blocks_of("prose", 2, blocks=3)


class Dying(Checkpoint):
    """One whose process the kernel kills."""

    def load(self, *arguments: object, **options: object) -> PreTrainedModel:
        os._exit(9)


@pytest.fixture(scope="module")
def measured(qwen: Path) -> Measured:
    return measure(Checkpoint(qwen), [CODE, PROSE], with_expert_use=True, batch_blocks=2)


@pytest.mark.parametrize("data", [CODE, PROSE], ids=lambda data: data.name)
def test_loss_and_perplexity_are_transformers_own(
    data: Blocks, measured: Measured, model_of: Callable[[str], PreTrainedModel]
) -> None:
    with torch.inference_mode():
        expected = model_of("qwen2_moe")(input_ids=data.ids_BS, labels=data.ids_BS).loss.item()
    quality = measured.quality[data.name]
    assert quality.loss_nats == pytest.approx(expected, rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert quality.tokens == len(data.ids_BS) * (tiny.BLOCK_TOKENS - 1)


def test_accuracy_is_the_share_of_tokens_foretold(model_of: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    # Text that the model itself goes on with, so that it foretells some of it, and not all.
    model = model_of("qwen2_moe")
    with torch.inference_mode():
        ids_BS = model.generate(
            tiny.token_ids(3, blocks=4, tokens=8), do_sample=False, min_new_tokens=16, max_new_tokens=16
        )
        foretold = model(input_ids=ids_BS).logits.argmax(-1)
    pairs = [
        (guess, token)
        for guesses, tokens in zip(foretold.tolist(), ids_BS.tolist(), strict=True)
        for guess, token in zip(guesses[:-1], tokens[1:], strict=True)
    ]
    by_hand = sum(guess == token for guess, token in pairs) / len(pairs)
    assert 0.2 < by_hand < 0.99
    model.save_pretrained(tmp_path)
    found = measure(Checkpoint(tmp_path), [Blocks("own", "", ids_BS, "0")])
    assert found.quality["own"].accuracy == pytest.approx(by_hand, abs=1e-9)


def test_expert_use_is_each_expert_s_share(measured: Measured, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("qwen2_moe")
    for data in (CODE, PROSE):
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, arguments, name=name, seen=seen: seen.update({name: arguments[1]})
            )
            for name in tiny.experts_module_names(model)
        ]
        with torch.inference_mode():
            model(input_ids=data.ids_BS)
        for handle in handles:
            handle.remove()
        for name, index_TK in seen.items():
            share = torch.bincount(index_TK.flatten(), minlength=tiny.EXPERTS) / index_TK.numel()
            assert measured.expert_use[data.name][name] == pytest.approx(share.tolist())
        assert measured.expert_use[data.name].keys() == seen.keys()


def test_speed_and_memory_are_measured(measured: Measured) -> None:
    assert measured.tokens_per_second > 0
    assert measured.peak_memory_bytes > 0


def test_batches_do_not_matter_and_use_is_told_on_request(qwen: Path, measured: Measured) -> None:
    other = measure(Checkpoint(qwen), [CODE, PROSE], batch_blocks=100)
    for name, quality in measured.quality.items():
        assert other.quality[name].loss_nats == pytest.approx(quality.loss_nats, rel=1e-5)
        assert other.quality[name].accuracy == quality.accuracy
    assert other.expert_use == {}


def test_a_larger_model_takes_more_memory(qwen: Path, measured: Measured, tmp_path: Path) -> None:
    config = tiny.FAMILIES["qwen2_moe"]()
    config.moe_intermediate_size, config.num_experts = 2048, 32
    tiny.build(config).save_pretrained(tmp_path)
    large = Checkpoint(tmp_path)
    more = large.files.bytes_on_disk - Checkpoint(qwen).files.bytes_on_disk
    assert more > 50e6
    found = measure(large, [CODE])
    assert 0.8 * more < found.peak_memory_bytes - measured.peak_memory_bytes < 4 * more


def test_an_unevenly_pruned_model_can_be_measured(qwen: Path, tmp_path: Path) -> None:
    source = Checkpoint(qwen)
    plan = tiny.plan_for(list(source.layout.layers), draws(0, 3, [2, 5, 7]), source.fingerprint)
    pruned = apply(source, plan, tmp_path / "pruned")
    found = measure(pruned, [CODE], with_expert_use=True)
    with torch.inference_mode():
        expected = pruned.load()(input_ids=CODE.ids_BS, labels=CODE.ids_BS).loss.item()
    assert found.quality["code"].loss_nats == pytest.approx(expected, rel=1e-5)
    assert [len(shares) for shares in found.expert_use["code"].values()] == [2, 5, 7]


class TestWhatCannotBeMeasured:
    def test_a_missing_shard(self, tmp_path: Path) -> None:
        directory = tiny.write(tmp_path, tiny.FAMILIES["qwen2_moe"](), shard="20KB")
        next(iter(directory.glob("model-00001-*"))).unlink()
        with pytest.raises(InputError, match=r"model-00001-.* is missing or damaged"):
            measure(Checkpoint(directory), [CODE])

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        directory = tiny.write(tmp_path, tiny.FAMILIES["qwen2_moe"]())
        tensors = load_file(directory / "model.safetensors")
        tensors["model.norm.weight"][:] = torch.nan
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="loss on code is not a number"):
            measure(Checkpoint(directory), [CODE])

    def test_a_process_that_is_killed(self, qwen: Path) -> None:
        with pytest.raises(InputError, match="ended without a result; most likely memory ran out"):
            measure(Dying(qwen), [CODE])
