"""A plan is edited by hand and applied as edited; an edit that the model cannot follow is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from masking import masked_logits, plain_logits
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import check_fits
from moeprune.errors import InputError
from moeprune.plan import Plan

Run = Callable[..., tuple[int, str, str]]
Edit = Callable[[dict[str, Any]], Any]
LAYERS = [f"model.layers.{place}.mlp.experts" for place in range(3)]


@pytest.fixture
def made(qwen: Path, tmp_path: Path, run_cli: Run) -> Path:
    """A plan as `plan make` writes it."""
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    tiny.make_stats([[1, 2, 3, 4, 5, 6, 7, 8]] * 3, model=Checkpoint(qwen).fingerprint).save(stats)
    run_cli("plan", "make", "--method", "frequency", "--ratio", 0.5, "--stats", stats, "--out", plan)
    return plan


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content["layers"])
    path.write_text(json.dumps(content))


def test_what_was_edited_is_what_is_applied(
    made: Path, qwen: Path, tmp_path: Path, run_cli: Run, model_of: Callable[[str], PreTrainedModel]
) -> None:
    keep = {LAYERS[0]: [4, 5, 6, 7], LAYERS[1]: [0, 1, 5], LAYERS[2]: [0, 3, 4, 5, 6, 7]}

    def by_hand(layers: dict[str, Any]) -> None:
        assert layers[LAYERS[1]]["keep"] == [4, 5, 6, 7]
        layers[LAYERS[1]]["keep"] = keep[LAYERS[1]]
        layers[LAYERS[2]] |= {"keep": keep[LAYERS[2]]}

    edit(made, by_hand)
    code, _, err = run_cli("apply", "--model", qwen, "--plan", made, "--out", tmp_path / "pruned")
    assert code == 0, err
    pruned = Checkpoint(tmp_path / "pruned")
    assert pruned.experts_per_layer == {name: len(kept) for name, kept in keep.items()}
    ids_BS = tiny.token_ids(3)
    expected = masked_logits(model_of("qwen2_moe"), list(keep.values()), ids_BS)
    torch.testing.assert_close(plain_logits(pruned.load(), ids_BS), expected, rtol=1e-4, atol=1e-5)
    # What the checkpoint carries is the plan as edited, not as made.
    assert Plan.load(tmp_path / "pruned" / "pruning_plan.json").keep == keep


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layers: layers[LAYERS[1]].update(top_k=1), rf"1 experts of {LAYERS[1]} run .* 2 do"),
        (
            lambda layers: layers[LAYERS[1]].update(experts=16, scores=[0] * 16),
            rf"{LAYERS[1]} has 16 `experts`, but .* has 8",
        ),
        (lambda layers: layers.pop(LAYERS[1]), f"does not say what becomes of {LAYERS[1]}"),
        (lambda layers: layers.update(extra=layers[LAYERS[1]]), "names the layer extra, which .* does not have"),
        (lambda layers: layers[LAYERS[1]].update(kept=[1]), rf"layers\.{LAYERS[1]}\.kept: not known"),
        (
            lambda layers: layers[LAYERS[1]].update(keep=[0, 8]),
            rf"layers\.{LAYERS[1]}: `keep` must be .* 0 and 7",
        ),
        (lambda layers: layers[LAYERS[1]].update(constant=[7]), rf"layers\.{LAYERS[1]}: `constant` names experts that"),
        (lambda layers: layers[LAYERS[1]].update(keep="all"), rf"layers\.{LAYERS[1]}\.keep: Input should be"),
    ],
    ids=["top_k", "experts", "missing", "unknown", "unknown field", "unknown expert", "not gone", "no list"],
)
def test_an_edit_that_cannot_be_followed_is_refused(change: Edit, said: str, made: Path, qwen: Path) -> None:
    edit(made, change)
    with pytest.raises(InputError, match=said):
        check_fits(Checkpoint(qwen), Plan.load(made))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_how_many_run_for_a_token_is_found(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    layout = Checkpoint(checkpoint_of(family)).layout
    assert {layer.top_k for layer in layout.layers.values()} == {tiny.TOP_K}


def test_a_plan_of_another_version_says_so(made: Path) -> None:
    made.write_text(made.read_text().replace('"moeprune_plan": 2', '"moeprune_plan": 1'))
    with pytest.raises(InputError, match="another version of moeprune; make it again"):
        Plan.load(made)


def test_what_is_no_plan_at_all_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "stats").write_bytes(b"\xc0\xff")
    with pytest.raises(InputError, match="make one with `moeprune plan make`"):
        Plan.load(tmp_path / "stats")
