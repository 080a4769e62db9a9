"""A condensed layer is an ordinary dense one: the logits are those of a model with its block replaced by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from authors_cd_moe import with_dense
from elsewhere import run_elsewhere
from masking import largest_difference, masked_logits, plain_logits
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.dense_layers import DenseLayers
from moeprune.checkpoint.layout import build_without_weights, experts_modules, find_layout
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply, cut
from moeprune.checkpoint.targets import LocalTarget
from moeprune.errors import InputError
from moeprune.moe_blocks import find_block, take_apart
from moeprune.plan import LayerPlan, Plan

EQUAL = 1e-5
CONDENSED = "some of its layers are condensed, which only its own modelling file knows"
UNEVEN = "its layers have 3 to 5 experts, which only its own modelling file knows"
ALL = list(range(tiny.EXPERTS))
WEIGHTS = {5: 0.25, 0: 0.5, 6: 0.125}


@dataclass
class Case:
    """What is made of the layers in turn: weights of routed experts where it is condensed, or the experts that stay."""

    config: Callable[[], PretrainedConfig]
    layers: list[dict[int, float] | list[int]]
    scale: float = 1.0
    dtype: str = "float32"
    plan: Plan = field(init=False)
    source: Path = field(init=False)
    pruned: Path = field(init=False)
    result: dict[str, Any] = field(init=False)
    ids_BS: torch.Tensor = field(init=False)


def deepseek(**changes: Any) -> PretrainedConfig:
    config = tiny.FAMILIES["deepseek_v2"]()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


STOCK = {
    "qwen": Case(tiny.FAMILIES["qwen2_moe"], [ALL, WEIGHTS, {1: 0.5, 2: 0.25, 3: 1.0}], scale=0.75),
    "qwen-half": Case(tiny.FAMILIES["qwen2_moe"], [[0, 3, 4], {}, [5, 6, 7]], dtype="bfloat16"),
    "deepseek-first": Case(lambda: deepseek(intermediate_size=16 + 3 * 16), [WEIGHTS, ALL]),
}
WITH_CODE = {
    "mixtral": Case(tiny.FAMILIES["mixtral"], [[1, 2, 5, 6, 7], WEIGHTS]),
    "granitemoe": Case(tiny.FAMILIES["granitemoe"], [{2: 1.0}, ALL]),
    "deepseek-last": Case(lambda: deepseek(intermediate_size=16 + 3 * 16), [ALL, WEIGHTS]),
    "qwen-other-widths": Case(tiny.FAMILIES["qwen2_moe"], [WEIGHTS, {1: 0.5}, ALL], scale=0.75),
    "qwen-uneven": Case(tiny.FAMILIES["qwen2_moe"], [[0, 3, 4], {1: 0.5}, [1, 2, 5, 6, 7]]),
}
CASES = STOCK | WITH_CODE


def plan_of(source: Path, layers: list[dict[int, float] | list[int]], scale: float = 1.0) -> Plan:
    checkpoint = Checkpoint(source)
    planned = {}
    for (name, layout), decided in zip(checkpoint.layout.layers.items(), layers, strict=True):
        top = {"experts": layout.experts, "top_k": tiny.TOP_K, "keep": sorted(decided)}
        condensed = {"condensed": decided, "shared_scale": scale} if isinstance(decided, dict) else {}
        planned[name] = LayerPlan.model_validate(top | condensed)
    return Plan(method="by hand", options={}, ratio=0.5, model=checkpoint.fingerprint, data="0" * 32, layers=planned)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All of them, and what each then computed in a process that cannot import moeprune."""
    root = tmp_path_factory.mktemp("condensed")
    described = []
    for number, (name, case) in enumerate(CASES.items()):
        case.source, case.pruned = root / name / "source", root / name / "pruned"
        tiny.write(case.source, case.config(), dtype=case.dtype)
        case.plan = plan_of(case.source, case.layers, case.scale)
        apply(Checkpoint(case.source), case.plan, case.pruned)
        case.ids_BS = tiny.token_ids(number)
        trust = name in WITH_CODE
        described.append({"name": name, "directory": str(case.pruned), "trust": trust, "ids": case.ids_BS.tolist()})
    for name, result in run_elsewhere(described, root).items():
        CASES[name].result = result
    return CASES


def reference(case: Case) -> torch.Tensor:
    model = Checkpoint(case.source).load(torch.float32)
    dense = {name: (dict(layer.condensed or {}), layer.shared_scale) for name, layer in case.plan.condensed.items()}
    keep = [layer.keep for layer in case.plan.layers.values() if layer.condensed is None]
    return masked_logits(with_dense(model, dense), keep, case.ids_BS)


@pytest.mark.parametrize("name", CASES)
def test_its_logits_are_those_of_a_model_with_the_block_replaced(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    assert "error" not in case.result, case.result["error"]
    equal = EQUAL if case.dtype == "float32" else 0.05  # the weights times their constants are rounded
    expected = reference(case)
    assert largest_difference(case.result["logits"], expected) < equal
    original = plain_logits(Checkpoint(case.source).load(torch.float32), case.ids_BS)
    assert largest_difference(original, expected) > 10 * equal
    assert torch.equal(case.result["again"], case.result["logits"])
    assert case.result["generated"].shape[1] > tiny.BLOCK_TOKENS
    left = [len(layer.keep) for layer in case.plan.layers.values() if layer.condensed is None]
    assert case.result["experts"] == left


@pytest.mark.parametrize("name", CASES)
def test_it_brings_code_only_where_its_config_cannot_say_it(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    config = json.loads((case.pruned / "config.json").read_text())
    card = (case.pruned / "README.md").read_text()
    assert f"{len(case.plan.condensed)} of {len(case.plan.layers)} have none any more" in card
    assert ("trust_remote_code=True" in card) == (name in WITH_CODE)
    assert ("auto_map" in config) == (name in WITH_CODE)
    assert [path.name for path in case.pruned.glob("*.py")] == (["modeling_pruned.py"] if name in WITH_CODE else [])
    assert case.result["class"].startswith("Pruned") == (name in WITH_CODE)
    if name == "qwen":
        assert (config["mlp_only_layers"], config["intermediate_size"]) == ([1, 2], 24 + 3 * 16)
    if name == "deepseek-first":
        assert config["first_k_dense_replace"] == 2


@pytest.mark.parametrize("name", CASES)
def test_moeprune_itself_reads_it(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    checkpoint = Checkpoint(case.pruned)  # without the user's trust in remote code: the file is ours
    assert checkpoint.experts_per_layer == case.plan.experts_per_layer
    assert {entry.dtype for entry in checkpoint.files.entries.values()} == {
        entry.dtype for entry in Checkpoint(case.source).files.entries.values()
    }
    if name in WITH_CODE:
        with pytest.raises(InputError, match=UNEVEN if name == "qwen-uneven" else CONDENSED):
            _ = checkpoint.layout


def test_what_is_condensed_into_a_stock_checkpoint_can_be_pruned_again(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["qwen"]
    again = tiny.plan_for(list(case.plan.experts_per_layer), [[1, 4, 6]], Checkpoint(case.pruned).fingerprint)
    pruned = apply(Checkpoint(case.pruned), again, tmp_path / "again")
    expected = masked_logits(Checkpoint(case.pruned).load(), [[1, 4, 6]], case.ids_BS)
    assert largest_difference(plain_logits(pruned.load(), case.ids_BS), expected) < EQUAL


def test_other_tensors_are_as_they_were(cases: dict[str, Case]) -> None:
    case = cases["qwen-half"]
    before, after = Checkpoint(case.source).files, Checkpoint(case.pruned).files
    dense = [f"model.layers.1.mlp.{projection}.weight" for projection in ("gate_proj", "up_proj", "down_proj")]
    assert {name for name in after.entries if ".layers.1.mlp." in name} == set(dense)
    others = [name for name in before.entries if ".layers.1.mlp." not in name]
    for name in (name for name in others if ".mlp." not in name):
        assert torch.equal(before.read([name])[name], after.read([name])[name])


def test_an_interrupted_one_goes_on(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["mixtral"]
    told: list[str] = []

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    def write(on_tensor: Callable[[int, int], None]) -> None:
        target = LocalTarget(tmp_path / "out")
        cut(Checkpoint(case.source), case.plan, target, shard_bytes=20_000, on_tensor=on_tensor, say=told.append)

    with pytest.raises(KeyboardInterrupt):
        write(stop)
    write(lambda done, total: None)
    assert any("continuing" in text for text in told)
    assert (
        largest_difference(plain_logits(Checkpoint(tmp_path / "out").load(), case.ids_BS), case.result["logits"]) == 0
    )


def test_it_is_distilled(
    cases: dict[str, Case], corpus: Path, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for name in ("qwen", "granitemoe"):
        case, out = cases[name], tmp_path / name
        given = ["--teacher", case.source, "--student", case.pruned, "--plan", case.pruned / "pruning_plan.json"]
        code, told, err = run_cli(
            "distill",
            *given,
            "--data",
            corpus,
            "--out",
            out,
            "--block-tokens",
            24,
            "--max-blocks",
            8,
            "--batch-blocks",
            2,
        )
        assert code == 0, err
        before, after = (float(part.split()[-1]) for part in told.partition(" of what")[0].split(" -> "))
        assert after < before
        changed = {
            tensor
            for tensor, entry in Checkpoint(out).files.entries.items()
            if not torch.equal(*(Checkpoint(one).files.read([tensor])[tensor] for one in (out, case.pruned)))
        }
        condensed = [place for place, layer in enumerate(case.layers) if isinstance(layer, dict)]
        assert changed
        assert all(any(f".layers.{place}." in tensor for place in condensed) for tensor in changed)  # nothing else


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"mlp_only_layers", "intermediate_size"}),
        ("deepseek_v3", {"first_k_dense_replace"}),
        ("glm4_moe_lite", {"mlp_layer_types"}),
        ("afmoe", {"num_dense_layers"}),
        ("mixtral", None),
    ],
)
def test_a_config_that_can_call_a_layer_dense_is_found(family: str, changes: set[str] | None) -> None:
    config = families.tiny_config(family)
    model = build_without_weights(config)
    name = next(iter(experts_modules(model)))
    width = 80 if changes and "intermediate_size" in changes else 16  # or that of the dense layers there are
    found = DenseLayers(config, config.to_dict(), model, {name: width}).find()
    assert (set(found[0]) if found else None) == changes
    if found:
        left = experts_modules(AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | found[0])))
        assert list(left) == list(experts_modules(model))[1:]


class TestWrongUse:
    def test_no_layer_left_with_a_router(self, qwen: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the plan condenses every layer"):
            apply(Checkpoint(qwen), plan_of(qwen, [WEIGHTS] * 3), tmp_path / "out")

    def test_nothing_left(self, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
        source = checkpoint_of("mixtral")
        with pytest.raises(InputError, match=r"nothing would be left of model\.layers\.0.*no shared experts"):
            apply(Checkpoint(source), plan_of(source, [{}, ALL]), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("family", "reason"),
        [
            ("gpt_oss", "its experts have biases"),
            ("nemotron_h", "its experts have no gate"),
            ("inkling2_text", "its experts do more to gate and up than to multiply them"),
            ("axk1", "its block does more to their output than to add to it"),
            ("inkling_text", "its block adds something to their output that is no gated MLP"),
            ("gemma4_text", "its block takes more than hidden states"),
            ("zaya", "its block gives more than hidden states"),
        ],
    )
    def test_what_no_dense_layer_can_stand_for(self, family: str, reason: str) -> None:
        model: PreTrainedModel = tiny.build(families.tiny_config(family))
        name = list(experts_modules(model))[-1]
        with pytest.raises(InputError, match=f"{name} cannot be condensed into a dense layer: {reason}"):
            take_apart(model, find_block(model, name), torch.randn(5, model.config.get_text_config().hidden_size))

    def test_a_block_that_only_its_surgeon_looks_at(self, tmp_path: Path) -> None:
        tiny.write(tmp_path / "source", families.tiny_config("cohere2_moe"))
        decided: list[dict[int, float] | list[int]] = [WEIGHTS, *[ALL] * 8]
        layers = len(find_layout(families.tiny_config("cohere2_moe")).layers)
        with pytest.raises(InputError, match="its block does more to their output than to add to it"):
            apply(Checkpoint(tmp_path / "source"), plan_of(tmp_path / "source", decided[:layers]), tmp_path / "out")

    def test_quantised(self, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
        source = checkpoint_of("mixtral")
        plan = plan_of(source, [WEIGHTS, ALL])
        quantised = Checkpoint(source)
        _ = quantised.layout, quantised.fingerprint
        quantised.config.quantization_config = FineGrainedFP8Config()
        with pytest.raises(InputError, match=r"quantised as fp8, .*condense layers of the unquantised original"):
            apply(quantised, plan, tmp_path / "out")

    def test_a_scale_of_a_layer_with_a_router(self) -> None:
        with pytest.raises(ValueError, match="`shared_scale` is of a condensed layer"):
            LayerPlan(experts=4, top_k=2, keep=[0, 1, 2], shared_scale=0.5)
