"""Where the experts are, and which model it is: told from config, names and shapes, for families that no code names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import families
import pytest
import tiny
import torch
from masking import experts_modules, largest_difference, masked_logits, plain_logits
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moeprune.checkpoint import layout
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError

# family: path of an experts module, first layer, layers, key in the config, fused tensors, tensors of each expert
EXPECTED = {
    "qwen2_moe": ("model.layers.{}.mlp.experts", 0, 3, "num_experts", 1, 3),
    "mixtral": ("model.layers.{}.mlp.experts", 0, 2, "num_local_experts", 1, 3),
    "olmoe": ("model.layers.{}.mlp.experts", 0, 2, "num_experts", 1, 3),
    "deepseek_v2": ("model.layers.{}.mlp.experts", 1, 2, "n_routed_experts", 1, 3),
    "granitemoe": ("model.layers.{}.block_sparse_moe.experts", 0, 2, "num_local_experts", 3, 0),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_experts_and_routers_are_found(
    family: str, checkpoint_of: Callable[[str], Path], model_of: Callable[[str], PreTrainedModel]
) -> None:
    path, first, count, key, fused, separate = EXPECTED[family]
    layout = Checkpoint(checkpoint_of(family)).layout
    assert list(layout.layers) == [path.format(layer) for layer in range(first, first + count)]
    assert layout.config_path == (key,)
    stored = load_file(checkpoint_of(family) / "model.safetensors")
    parameters = dict(model_of(family).named_parameters())
    for name, layer in layout.layers.items():
        assert layer.experts == tiny.EXPERTS
        assert (len(layer.fused), len(layer.separate)) == (fused, separate)
        assert all(stored[tensor].shape[axis] == tiny.EXPERTS for tensor, axis in layer.fused.items())
        assert all(len(names) == tiny.EXPERTS and set(names) <= stored.keys() for names in layer.separate)
        number = name.split(".")[2]
        assert all(tensor.split(".")[2] == number for tensor in chain(layer.fused, *layer.separate))
        block = name.removesuffix(".experts")
        router = "router" if family == "granitemoe" else "gate"
        assert layer.parameters == dict.fromkeys(
            [f"{name}.gate_up_proj", f"{name}.down_proj", f"{block}.{router}.weight"], 0
        )
        assert layer.parameters.keys() <= parameters.keys()


def test_the_number_of_experts_is_told_from_other_numbers_of_the_same_value(tmp_path: Path) -> None:
    config = tiny.FAMILIES["qwen2_moe"]()
    config.num_hidden_layers = config.num_experts = config.num_experts_per_tok = 3
    layout = Checkpoint(tiny.write(tmp_path / "threes", config)).layout
    assert layout.config_path == ("num_experts",)
    assert [layer.experts for layer in layout.layers.values()] == [3, 3, 3]


def test_dense_layers_in_between_are_left_alone(tmp_path: Path) -> None:
    config = tiny.FAMILIES["qwen2_moe"]()
    config.mlp_only_layers = [1]
    checkpoint = Checkpoint(tiny.write(tmp_path / "mixed", config))
    names = list(checkpoint.layout.layers)
    assert names == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    keep, ids_BS = [[1, 2, 3, 7], [0, 4]], tiny.token_ids(0)
    pruned = apply(checkpoint, tiny.plan_for(names, keep, checkpoint.fingerprint), tmp_path / "pruned")
    assert (
        largest_difference(plain_logits(pruned.load(), ids_BS), masked_logits(checkpoint.load(), keep, ids_BS)) < 1e-5
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "granitemoe"])
def test_a_checkpoint_saved_under_the_model_s_own_names(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.build(tiny.FAMILIES[family]()).save_pretrained(source, save_original_format=False)
    checkpoint = Checkpoint(source)
    names = list(checkpoint.layout.layers)
    assert all(not layer.separate for layer in checkpoint.layout.layers.values())
    keep, ids_BS = [[0, 5, 6], [1, 2, 3, 4], [2, 7]][: len(names)], tiny.token_ids(0)
    pruned = apply(checkpoint, tiny.plan_for(names, keep, checkpoint.fingerprint), tmp_path / "pruned")
    assert (
        largest_difference(plain_logits(pruned.load(), ids_BS), masked_logits(checkpoint.load(), keep, ids_BS)) < 1e-5
    )


class TestLayersThatPredictFurtherTokens:
    """Stored after the model's own layers, with experts of their own, and not loaded by transformers."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        directory, config = tmp_path / "source", families.tiny_config("deepseek_v3", num_nextn_predict_layers=1)
        tiny.build(config).save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        last, beyond = (f"model.layers.{config.num_hidden_layers - 1 + place}." for place in (0, 1))
        tensors |= {name.replace(last, beyond): tensor + 1 for name, tensor in tensors.items() if last in name}
        tensors[f"{beyond}eh_proj.weight"] = torch.zeros(32, 64)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    def test_they_are_left_out(self, source: Path, tmp_path: Path) -> None:
        checkpoint = Checkpoint(source)
        left_out = {name for name in checkpoint.files.entries if ".layers.3." in name}
        assert len(left_out) > 3 * families.EXPERTS
        assert checkpoint.layout.left_out.keys() == left_out
        names, keep, ids_BS = list(checkpoint.layout.layers), [[0, 1, 4, 7]] * 2, tiny.token_ids(0)
        pruned = apply(checkpoint, tiny.plan_for(names, keep, checkpoint.fingerprint), tmp_path / "pruned")
        assert not [name for name in pruned.files.entries if ".layers.3." in name]
        assert json.loads((pruned.directory / "config.json").read_text())["num_nextn_predict_layers"] == 0
        expected = masked_logits(checkpoint.load(), keep, ids_BS)
        assert largest_difference(plain_logits(pruned.load(), ids_BS), expected) < 1e-5

    def test_those_without_experts_stay(self, source: Path) -> None:
        tensors = {
            name: tensor
            for name, tensor in load_file(source / "model.safetensors").items()
            if not (".layers.3." in name and ".experts." in name)
        }
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        layout = Checkpoint(source).layout
        assert (layout.left_out, layout.config_changes) == ({}, {})


class TestPrunedBefore:
    def test_evenly_it_is_an_original_like_any_other(self, qwen: Path, tmp_path: Path) -> None:
        first, keep = Checkpoint(qwen), [[0, 1, 3, 4, 6]] * 3
        names = list(first.layout.layers)
        second = apply(first, tiny.plan_for(names, keep, first.fingerprint), tmp_path / "once")
        plan = tiny.plan_for(names, [[0, 2, 4]] * 3, second.fingerprint, experts=5)
        ids_BS = tiny.token_ids(0)
        expected = masked_logits(first.load(), [[0, 3, 6]] * 3, ids_BS)
        twice = apply(second, plan, tmp_path / "twice").load()
        assert largest_difference(plain_logits(twice, ids_BS), expected) < 1e-5

    def test_unevenly_a_sentence_says_what_to_do(self, qwen: Path, tmp_path: Path) -> None:
        first = Checkpoint(qwen)
        plan = tiny.plan_for(list(first.layout.layers), [[0, 1, 2], [0, 1], [3, 4, 5, 6]], first.fingerprint)
        uneven = apply(first, plan, tmp_path / "uneven")
        with pytest.raises(InputError, match=r"2 to 4 experts.*calibrate and prune the original"):
            _ = uneven.layout
        model = uneven.load()
        for module in experts_modules(model).values():  # what replaces modules when it loads reads the number there
            assert module.config.num_experts == module.num_experts  # type: ignore[union-attr]


class TestWhatIsToldByName:
    """Layouts that a family has, but no experiment on the tiny ones above shows."""

    def test_groups_must_keep_enough_to_choose_from(self, tmp_path: Path) -> None:
        config = families.tiny_config("deepseek_v3")
        tiny.build(config).save_pretrained(tmp_path / "source")
        checkpoint = Checkpoint(tmp_path / "source")
        plan = tiny.plan_for(list(checkpoint.layout.layers), [[0, 4]] * 2, checkpoint.fingerprint)
        with pytest.raises(InputError, match="keeps only 1; keep more of each group"):
            apply(checkpoint, plan, tmp_path / "pruned")

    def test_a_published_text_model_of_a_larger_one(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        tiny.build(families.tiny_config("qwen3_5_moe_text")).save_pretrained(source)
        tensors = load_file(source / "model.safetensors")
        published = {
            name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
            for name, tensor in tensors.items()
        } | {"model.visual.patch_embed.weight": torch.ones(3)}
        save_file(published, source / "model.safetensors", metadata={"format": "pt"})
        checkpoint = Checkpoint(source)
        names = list(checkpoint.layout.layers)
        keep, ids_BS = [[0, 1, 4], [2, 3, 7]] * 2, tiny.token_ids(0)
        pruned = apply(checkpoint, tiny.plan_for(names, keep, checkpoint.fingerprint), tmp_path / "pruned")
        assert pruned.files.entries.keys() < published.keys()
        assert "model.visual.patch_embed.weight" in pruned.files.entries
        expected = masked_logits(checkpoint.load(), keep, ids_BS)
        assert largest_difference(plain_logits(pruned.load(), ids_BS), expected) < 1e-5


class TestFingerprint:
    def test_it_is_the_same_however_the_model_is_sharded(self, qwen: Path, tmp_path: Path) -> None:
        sharded = tiny.write(tmp_path / "sharded", tiny.FAMILIES["qwen2_moe"](), shard="20KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
        assert Checkpoint(sharded).fingerprint == Checkpoint(qwen).fingerprint

    def test_it_differs_between_trainings_precisions_and_prunings(self, qwen: Path, tmp_path: Path) -> None:
        config = tiny.FAMILIES["qwen2_moe"]
        original = Checkpoint(qwen)
        names = list(original.layout.layers)
        prints = {
            original.fingerprint,
            Checkpoint(tiny.write(tmp_path / "seed", config(), seed=1)).fingerprint,
            Checkpoint(tiny.write(tmp_path / "half", config(), dtype="bfloat16")).fingerprint,
            *(
                apply(
                    original, tiny.plan_for(names, [keep] * 3, original.fingerprint), tmp_path / "".join(map(str, keep))
                ).fingerprint
                for keep in ([0, 1, 2], [0, 1, 3])
            ),
        }
        assert len(prints) == 5

    def test_one_router_s_number_changes_it(self, qwen: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(qwen, other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.2.mlp.gate.weight"][7, 31] += 1e-6
        save_file(tensors, other / "model.safetensors")
        assert Checkpoint(other).fingerprint != Checkpoint(qwen).fingerprint


class TestWhatCannotBeRead:
    @pytest.fixture
    def copy(self, qwen: Path, tmp_path: Path) -> Path:
        shutil.copytree(qwen, tmp_path / "copy")
        return tmp_path / "copy"

    def test_a_model_without_experts(self, tmp_path: Path) -> None:
        directory = tiny.write(tmp_path / "dense", tiny.dense_config())
        with pytest.raises(InputError, match=r"llama.*not a Mixture-of-Experts"):
            _ = Checkpoint(directory).layout

    def test_layers_with_different_numbers_of_experts(self, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        numbers = count(8)
        monkeypatch.setattr(layout, "expert_count", lambda module: next(numbers))
        with pytest.raises(InputError, match="its layers have 8 to 10 experts; moeprune reads models whose layers"):
            _ = Checkpoint(qwen).layout

    def test_no_config(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(InputError, match=r"no config\.json"):
            _ = Checkpoint(copy).layout

    @pytest.mark.parametrize("text", ["{", '{"model_type": "unheard-of"}', "{}", "[]"])
    def test_a_config_that_says_nothing(self, copy: Path, text: str) -> None:
        (copy / "config.json").write_text(text)
        with pytest.raises(InputError, match="config"):
            _ = Checkpoint(copy).layout

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        with pytest.raises(InputError, match="no safetensors"):
            _ = Checkpoint(copy).layout

    def test_a_damaged_file(self, copy: Path) -> None:
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(InputError, match="missing or damaged"):
            _ = Checkpoint(copy).layout

    @pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
    def test_a_damaged_index(self, copy: Path, text: str) -> None:
        (copy / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="index"):
            _ = Checkpoint(copy).layout

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        sharded = tiny.write(tmp_path / "sharded", tiny.FAMILIES["qwen2_moe"](), shard="20KB")
        next(iter(sharded.glob("model-00002-*"))).unlink()
        with pytest.raises(InputError, match=r"model-00002-.*missing"):
            _ = Checkpoint(sharded).layout
        with pytest.raises(InputError, match=r"model-00002-.*missing"):
            Checkpoint(sharded).load()

    def test_an_expert_that_is_not_there(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
            _ = Checkpoint(copy).layout

    def test_another_tensor_that_is_not_there(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"model\.norm\.weight"):
            Checkpoint(copy).load()

    def test_a_config_of_another_size(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"num_experts": 7}))
        with pytest.raises(InputError, match="shapes differ"):
            _ = Checkpoint(copy).layout

    def test_no_tokenizer(self, copy: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (copy / name).unlink()
        with pytest.raises(InputError, match="tokenizer"):
            Checkpoint(copy).tokenizer()


def test_weights_in_other_formats_are_not_carried_over(qwen: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(qwen, source)
    for name in ("pytorch_model.bin", "model.gguf"):
        (source / name).write_bytes(b"the original's weights")
    save_file({"stranger": torch.zeros(3)}, source / "consolidated.safetensors")
    checkpoint = Checkpoint(source)
    assert "stranger" not in checkpoint.files.entries
    assert checkpoint.files.bytes_on_disk == (source / "model.safetensors").stat().st_size
    plan = tiny.plan_for(list(checkpoint.layout.layers), [[0, 1]] * 3, checkpoint.fingerprint)
    pruned = apply(checkpoint, plan, tmp_path / "pruned")
    names = {path.name for path in pruned.directory.iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "model.gguf", "consolidated.safetensors"}


def test_sizes_are_those_of_the_files(qwen: Path) -> None:
    checkpoint = Checkpoint(qwen)
    assert checkpoint.files.parameters == sum(t.numel() for t in load_file(qwen / "model.safetensors").values())
    assert checkpoint.files.parameters == sum(p.numel() for p in checkpoint.load().parameters())
