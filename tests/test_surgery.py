"""A pruned checkpoint is an ordinary one, and its logits are the original's without the dropped experts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from elsewhere import run_elsewhere
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masking import draws, largest_difference, masked_logits, plain_logits
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.plan import Plan

EQUAL = 1e-5
UNIFORM = {
    "six-each": [6, 6, 6],
    "only-top-k": [2, 2, 2],
    "five-sharded-output": [5, 5, 5],
    "five-sharded-input": [5, 5, 5],
}
UNEVEN = {
    "some": [3, 7, 5],
    "extremes": [8, 2, 8],
    "uneven-sharded-output": [4, 6, 3],
    "uneven-sharded-input": [6, 4, 7],
}
SMALL_SHARD = 20_000  # bytes; every one of the models has several times as much
KINDS = {**UNIFORM, **UNEVEN}
CASES = [(family, kind) for family in tiny.FAMILIES for kind in KINDS]


@dataclass
class Case:
    source: Path
    pruned: Path
    plan: Plan
    ids_BS: torch.Tensor
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> list[list[int]]:
        return list(self.plan.keep.values())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def is_experts(name: str) -> bool:
    """Whether a stored tensor is indexed by expert, or one expert's, in the families here."""
    parts = (".experts.", ".gate.weight", ".router.layer.weight", ".input_linear.", ".output_linear.")
    return any(part in name for part in parts)


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint_of: Callable[[str], Path],
    model_of: Callable[[str], PreTrainedModel],
) -> dict[tuple[str, str], Case]:
    """Every family pruned in every way, and what each then computed in a process that cannot import moeprune."""
    root = tmp_path_factory.mktemp("surgery")
    made = {}
    for number, (family, kind) in enumerate(CASES):
        source = checkpoint_of(family)
        if kind.endswith("-input"):
            source = root / "sharded" / family
            if not source.is_dir():
                tiny.write(source, tiny.FAMILIES[family](), shard=f"{SMALL_SHARD // 1000}KB")
        names = tiny.experts_module_names(model_of(family))
        keep = draws(number, len(names), KINDS[kind][: len(names)])
        checkpoint = Checkpoint(source)
        plan = tiny.plan_for(names, keep, checkpoint.fingerprint)
        out = root / family / kind
        if kind.endswith("-output"):
            apply(checkpoint, plan, out, shard_bytes=SMALL_SHARD)
        else:
            apply(checkpoint, plan, out)
        made[family, kind] = Case(source, out, plan, tiny.token_ids(number))

    described = [
        {
            "name": f"{family}-{kind}",
            "directory": str(case.pruned),
            "trust": kind in UNEVEN,
            "ids": case.ids_BS.tolist(),
        }
        for (family, kind), case in made.items()
    ]
    results = run_elsewhere(described, root)
    for (family, kind), case in made.items():
        case.result = results[f"{family}-{kind}"]
    return made


@pytest.mark.parametrize(("family", "kind"), CASES)
class TestEachFamily:
    def test_its_logits_are_the_masked_original_s(
        self,
        cases: dict[tuple[str, str], Case],
        model_of: Callable[[str], PreTrainedModel],
        family: str,
        kind: str,
    ) -> None:
        case = cases[family, kind]
        assert "error" not in case.result, case.result["error"]
        assert case.result["experts"] == [len(kept) for kept in case.keep]
        expected = masked_logits(model_of(family), case.keep, case.ids_BS)
        assert largest_difference(case.result["logits"], expected) < EQUAL
        # The comparison means something: masking changes the logits by far more.
        assert largest_difference(plain_logits(model_of(family), case.ids_BS), expected) > 1000 * EQUAL

    def test_it_generates_and_saves_and_loads_again(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        result = cases[family, kind].result
        assert result["generated"].shape[1] > tiny.BLOCK_TOKENS
        assert torch.equal(result["generated"][:, : tiny.BLOCK_TOKENS], cases[family, kind].ids_BS)
        assert torch.equal(result["again"], result["logits"])

    def test_a_uniform_one_is_of_the_stock_class_and_brings_no_code(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        case = cases[family, kind]
        code = [path.name for path in case.pruned.glob("*.py")]
        config = json.loads((case.pruned / "config.json").read_text())
        if kind in UNIFORM or len({len(kept) for kept in case.keep}) == 1:
            assert not code
            assert "auto_map" not in config
            assert not case.result["class"].startswith("Pruned")
        else:
            assert code == ["modeling_pruned.py"]
            assert case.result["class"].startswith("Pruned")

    def test_all_that_is_not_an_expert_s_is_as_it_was(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        case = cases[family, kind]
        before, after = tensors_of(case.source), tensors_of(case.pruned)
        others = {name for name in before if not is_experts(name)}
        assert others == {name for name in after if not is_experts(name)}
        assert len(others) > 5
        for name in others:
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "LICENSE",
        ):
            assert (case.pruned / name).read_bytes() == (case.source / name).read_bytes(), name

    def test_the_config_differs_only_in_the_number_of_experts(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        case = cases[family, kind]
        before = json.loads((case.source / "config.json").read_text())
        after = json.loads((case.pruned / "config.json").read_text())
        counts = [len(kept) for kept in case.keep]
        numbers = {"num_experts", "num_local_experts", "n_routed_experts"}
        assert {key for key in numbers & after.keys() if after[key] == max(counts)} == numbers & before.keys()
        code = {"architectures", "auto_map", "pruned_experts", "pruned_experts_path"} if len(set(counts)) > 1 else set()
        assert {key for key in after if after[key] != before.get(key, object())} - code <= numbers
        assert set(before) <= set(after)
        if code:
            assert after["pruned_experts"] == case.plan.experts_per_layer

    def test_the_index_says_where_each_tensor_is(
        self, cases: dict[tuple[str, str], Case], family: str, kind: str
    ) -> None:
        case = cases[family, kind]
        shards = sorted(path.name for path in case.pruned.glob("*.safetensors"))
        if not kind.endswith("-output"):
            assert shards == ["model.safetensors"]
            assert not (case.pruned / "model.safetensors.index.json").exists()
            return
        assert len(shards) > 2
        assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        index = json.loads((case.pruned / "model.safetensors.index.json").read_text())
        found = {shard: load_file(case.pruned / shard) for shard in shards}
        assert index["weight_map"] == {name: shard for shard, tensors in found.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in found.values() for t in tensors.values())
        for tensors in found.values():
            assert sum(t.nbytes for t in tensors.values()) <= SMALL_SHARD or len(tensors) == 1

    def test_it_tells_what_was_done(self, cases: dict[tuple[str, str], Case], family: str, kind: str) -> None:
        case = cases[family, kind]
        assert Plan.load(case.pruned / "pruning_plan.json") == case.plan
        card = (case.pruned / "README.md").read_text()
        assert "The original" not in card
        assert case.plan.model in card
        assert ("trust_remote_code=True" in card) == bool(list(case.pruned.glob("*.py")))
        assert not list(case.pruned.parent.glob(".*"))

    def test_moeprune_itself_reads_it(self, cases: dict[tuple[str, str], Case], family: str, kind: str) -> None:
        case = cases[family, kind]
        checkpoint = Checkpoint(case.pruned)  # without the user's trust in remote code: the file is ours
        assert checkpoint.experts_per_layer == case.plan.experts_per_layer
        logits = plain_logits(checkpoint.load(), case.ids_BS)
        assert largest_difference(logits, case.result["logits"]) < EQUAL


def test_the_right_experts_stay_in_the_right_order(cases: dict[tuple[str, str], Case]) -> None:
    case = cases["mixtral", "some"]
    before, after = tensors_of(case.source), tensors_of(case.pruned)
    for layer, kept in enumerate(case.keep):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(after[f"{prefix}.gate.weight"], before[f"{prefix}.gate.weight"][kept])
        for new, old in enumerate(kept):
            for weight in ("w1", "w2", "w3"):
                name = f"{prefix}.experts.{{}}.{weight}.weight"
                assert torch.equal(after[name.format(new)], before[name.format(old)])
        assert f"{prefix}.experts.{len(kept)}.w1.weight" not in after


@pytest.fixture(scope="module")
def granite(checkpoint_of: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(checkpoint_of("granitemoe"))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_plan_is_carried_out(
    data: st.DataObject, granite: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    some = st.sets(st.integers(0, tiny.EXPERTS - 1), min_size=tiny.TOP_K).map(sorted)
    keep = [data.draw(some) for _ in granite.layout.layers]
    shard_bytes = data.draw(st.integers(1, 200_000))
    plan = tiny.plan_for(list(granite.layout.layers), keep, granite.fingerprint)
    out = tmp_path_factory.mktemp("any") / "pruned"
    apply(granite, plan, out, shard_bytes=shard_bytes)
    before, after = tensors_of(granite.directory), tensors_of(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kept = keep[int(name.split(".")[2])] if is_experts(name) else slice(None)
        assert torch.equal(tensor, before[name][kept]), name
    assert Checkpoint(out).experts_per_layer == plan.experts_per_layer


def test_settings_made_on_an_uneven_model_reach_every_layer(cases: dict[tuple[str, str], Case]) -> None:
    model = Checkpoint(cases["qwen2_moe", "some"].pruned).load()
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        modules = [model.get_submodule(name) for name in tiny.experts_module_names(model)]
        assert {module.config._experts_implementation for module in modules} == {implementation}


def test_every_precision_is_kept(tmp_path: Path) -> None:
    source = Checkpoint(tiny.write(tmp_path / "half", tiny.FAMILIES["qwen2_moe"](), dtype="bfloat16"))
    names = list(source.layout.layers)
    plan = tiny.plan_for(names, [[0, 1, 5], [2, 3, 4], [1, 6, 7]], source.fingerprint)
    pruned = apply(source, plan, tmp_path / "pruned")
    assert {entry.dtype for entry in pruned.files.entries.values()} == {"BF16"}


def test_two_models_of_one_name_do_not_get_each_other_s_code(
    cases: dict[tuple[str, str], Case], tmp_path: Path, model_of: Callable[[str], PreTrainedModel]
) -> None:
    for family in ("qwen2_moe", "granitemoe", "qwen2_moe"):
        case = cases[family, "some"]
        named = tmp_path / family / "pruned"
        if not named.exists():
            named.parent.mkdir()
            named.symlink_to(case.pruned)
        model = Checkpoint(named).load()
        assert largest_difference(plain_logits(model, case.ids_BS), case.result["logits"]) < EQUAL


class TestRefusals:
    def test_a_plan_of_another_model(self, qwen: Path, tmp_path: Path) -> None:
        other = Checkpoint(tiny.write(tmp_path / "other", tiny.FAMILIES["qwen2_moe"](), seed=1))
        plan = tiny.plan_for(list(other.layout.layers), [[0, 1]] * 3, other.fingerprint)
        with pytest.raises(InputError, match="another model"):
            apply(Checkpoint(qwen), plan, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]

    @pytest.mark.parametrize("what", ["file", "directory"])
    def test_a_place_that_is_taken(self, qwen: Path, tmp_path: Path, what: str) -> None:
        out = tmp_path / "out"
        if what == "file":
            out.write_text("mine")
        else:
            out.mkdir()
            (out / "mine").write_text("mine")
        source = Checkpoint(qwen)
        plan = tiny.plan_for(list(source.layout.layers), [[0, 1]] * 3, source.fingerprint)
        with pytest.raises(InputError, match="exists already"):
            apply(source, plan, out)
        assert (out if what == "file" else out / "mine").read_text() == "mine"

    def test_an_empty_directory_is_no_hindrance(self, qwen: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        source = Checkpoint(qwen)
        plan = tiny.plan_for(list(source.layout.layers), [[0, 1]] * 3, source.fingerprint)
        assert apply(source, plan, tmp_path / "out").files.entries

    def test_an_unevenly_pruned_model_is_not_pruned_again(
        self, cases: dict[tuple[str, str], Case], tmp_path: Path
    ) -> None:
        case = cases["qwen2_moe", "some"]
        with pytest.raises(InputError, match="pruned already"):
            apply(Checkpoint(case.pruned), case.plan, tmp_path / "out")

    def test_groups_of_experts_that_a_plan_would_tear(self, tmp_path: Path) -> None:
        source = Checkpoint(tiny.write(tmp_path / "groups", tiny.group_limited_config()))
        names = list(source.layout.layers)
        with pytest.raises(InputError, match="group"):
            apply(source, tiny.plan_for(names, [[0, 1, 2, 4]] * 2, source.fingerprint), tmp_path / "torn")
        keep = [[0, 3, 5, 6], [1, 2, 4, 7]]  # one of each group of two
        pruned = apply(source, tiny.plan_for(names, keep, source.fingerprint), tmp_path / "whole")
        ids_BS = tiny.token_ids(0)
        expected = masked_logits(source.load(), keep, ids_BS)
        assert largest_difference(plain_logits(pruned.load(), ids_BS), expected) < EQUAL

    def test_code_of_others_in_a_pruned_checkpoint_is_not_run(
        self, cases: dict[tuple[str, str], Case], tmp_path: Path
    ) -> None:
        for name, change in (("modeling_pruned.py", "\n# changed\n"), ("another.py", "raise SystemExit\n")):
            copy = tmp_path / name
            shutil.copytree(cases["qwen2_moe", "some"].pruned, copy)
            with (copy / name).open("a") as file:
                file.write(change)
            with pytest.raises(InputError):
                Checkpoint(copy).load()


def test_what_the_layout_leaves_out_and_changes(qwen: Path, tmp_path: Path) -> None:
    source = Checkpoint(qwen)
    left_out = {"model.norm.weight": "nobody runs it", "model.layers.0.mlp.experts.0.up_proj.weight": "nor this"}
    changes = {"hidden_act": "relu", "deeper.further": 3}
    plan = tiny.plan_for(list(source.layout.layers), [[0, 1]] * 3, source.fingerprint)
    source.__dict__["layout"] = replace(source.layout, left_out=left_out, config_changes=changes)
    pruned = apply(source, plan, tmp_path / "pruned")
    expected = source.files.entries.keys() - {
        name for name in source.files.entries if re.search(r"experts\.[2-7]\.", name)
    }
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in expected
    assert pruned.files.entries.keys() == expected - {"model.norm.weight"}
    config = json.loads((pruned.directory / "config.json").read_text())
    assert (config["hidden_act"], config["deeper"], config["num_experts"]) == ("relu", {"further": 3}, 2)
    card = (pruned.directory / "README.md").read_text()
    assert "1 tensors of the original (nobody runs it)" in card


def test_rows_past_the_experts_stay(qwen: Path, tmp_path: Path) -> None:
    source = Checkpoint(qwen)
    plan = tiny.plan_for(list(source.layout.layers), [[1, 3]] * 3, source.fingerprint)
    name, layer = next(iter(source.layout.layers.items()))
    router = next(router for router in layer.fused if router.endswith("gate.weight"))
    fewer = replace(layer, experts=6, separate=[names[:6] for names in layer.separate])
    planned = plan.model_copy(
        update={"layers": plan.layers | {name: plan.layers[name].model_copy(update={"experts": 6})}}
    )
    source.__dict__["layout"] = replace(source.layout, layers=source.layout.layers | {name: fewer})
    pruned = apply(source, planned, tmp_path / "pruned")
    assert torch.equal(pruned.files.read([router])[router], source.files.read([router])[router][[1, 3, 6, 7]])


def test_the_config_that_transformers_reads_is_right(cases: dict[tuple[str, str], Case]) -> None:
    for family in tiny.FAMILIES:
        config = AutoConfig.from_pretrained(cases[family, "six-each"].pruned)
        number = getattr(config, "num_local_experts", None) or config.num_experts
        assert number == 6
