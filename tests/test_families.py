"""Every family that transformers dispatches through its experts interface can be pruned, evenly and unevenly.

Each goes the whole way: observed, planned, cut, loaded in a process that cannot import moeprune, compared with the
original whose dropped experts are masked before its router chooses, generated with, saved and loaded again.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import families
import families_table
import pytest
import tiny
import torch
from elsewhere import run_elsewhere
from families_table import EQUAL, Case
from masking import CHOICE_BIAS, experts_modules, largest_difference, plain_logits
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply, check_fits
from moeprune.methods import make_plan
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.collectors import OUTSIDE
from moeprune.statistics.observer import ExpertsCall, observe
from moeprune.statistics.passes import InMemoryPass
from moeprune.streaming.streamed import StreamedPass

KINDS = {"uniform": [6], "uneven": [6, 4, 8]}  # experts that stay in each layer, and over again
CASES = [(family, kind) for family in families.discovered() for kind in KINDS]


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A random model in which whatever there is of each expert differs from expert to expert."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if CHOICE_BIAS.search(name):
                tensor.uniform_(0, 0.5)
            elif tensor.dim() == 2 and not tensor.is_floating_point():  # a table of each token's experts
                tensor.copy_(torch.rand(len(tensor), families.EXPERTS).argsort()[:, : tensor.shape[1]])
            elif tensor.dim() and tensor.shape[0] in (families.EXPERTS, families.EXPERTS + 1) and tensor.std() == 0:
                tensor.add_(torch.rand_like(tensor) / 2)
    return model


def most_used(call: ExpertsCall, count: int, groups: int) -> list[int]:
    """So many experts, the same number from each group."""
    used_GE = torch.bincount(call.index_TK.flatten(), minlength=families.EXPERTS).view(groups, -1)
    chosen_GE = used_GE.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return sorted((chosen_GE + torch.arange(groups)[:, None] * used_GE.shape[1]).flatten().tolist())


def prune(family: str, kind: str, model: PreTrainedModel, source: Path, out: Path) -> Case:
    ids_BS = tiny.token_ids(len(family))
    calls: list[ExpertsCall] = []
    with observe(model, calls.append):
        plain_logits(model, ids_BS)
    groups = getattr(model.config.get_text_config(), "n_group", None) or 1
    keep = [most_used(call, count, groups) for call, count in zip(calls, cycle(KINDS[kind]), strict=False)]
    checkpoint = Checkpoint(source)
    if kind == "uniform":
        keep = decided(checkpoint, model, ids_BS)
    layers = {
        call.layer: LayerPlan(experts=families.EXPERTS, top_k=call.index_TK.shape[1], keep=kept)
        for call, kept in zip(calls, keep, strict=True)
    }
    plan = Plan(method="use", options={}, ratio=0.25, model=checkpoint.fingerprint, data="0" * 32, layers=layers)
    apply(checkpoint, plan, out)
    return Case(model, calls, checkpoint.layout, keep, ids_BS, out)


def decided(checkpoint: Checkpoint, model: PreTrainedModel, ids_BS: torch.Tensor) -> list[list[int]]:
    """What stays, as calibration and a method say, with the model in memory and brought in part by part alike."""
    settings: dict[str, Any] = {"groups": 2, "router_groups": checkpoint.layout.groups}
    stats = calibrate(InMemoryPass(model), checkpoint.fingerprint, ids_BS, **settings)
    # Seen inside: then the layers' outputs are mixed by us, and what later layers do shows whether that is right.
    settings["statistics"] = [*OUTSIDE, "gated_norm"]
    streamed = calibrate(StreamedPass(checkpoint), checkpoint.fingerprint, ids_BS, **settings)
    assert stats.layers.keys() == streamed.layers.keys() == checkpoint.layout.layers.keys()
    for name, layer in stats.layers.items():
        same = streamed.layers[name]
        assert torch.equal(layer.count("routed_tokens"), same.count("routed_tokens"))
        for key in layer.sums:
            torch.testing.assert_close(layer.sum(key), same.sum(key), rtol=1e-4, atol=1e-4)
    uneven = make_plan("c-prune", 0.4, stats, options={"layerwise_share": 0.5})
    check_fits(checkpoint, uneven)
    assert uneven.removed > 0
    return list(make_plan("frequency", 0.25, stats).keep.values())


def run_all(cases: dict[tuple[str, str], Case], root: Path) -> None:
    """Load and run all of them in one process that cannot import moeprune."""
    described = [
        {
            "name": f"{family}-{kind}",
            "directory": str(case.directory),
            "trust": kind == "uneven",
            "ids": case.ids_BS.tolist(),
            "new_tokens": 2,
        }
        for (family, kind), case in cases.items()
    ]
    results = run_elsewhere(described, root)
    for (family, kind), case in cases.items():
        case.result = results[f"{family}-{kind}"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case | Exception]:
    """All families, pruned and run; what could not be is the error that it ended with."""
    root = tmp_path_factory.mktemp("families")
    made: dict[tuple[str, str], Case | Exception] = {}
    for family in families.discovered():
        for kind in KINDS:
            try:
                source = root / family / "source"
                if not source.is_dir():
                    model = build(families.tiny_config(family))
                    model.save_pretrained(source)
                made[family, kind] = prune(family, kind, model, source, root / family / kind)
            except Exception as error:  # one family's trouble is that family's failing test
                made[family, kind] = error
    run_all({key: case for key, case in made.items() if isinstance(case, Case)}, root)
    return made


@pytest.fixture
def case(cases: dict[tuple[str, str], Case | Exception], family: str, kind: str) -> Case:
    found = cases[family, kind]
    if isinstance(found, Exception):
        raise found
    assert "error" not in found.result, found.result["error"]
    return found


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_pruned_model_is_the_masked_original(case: Case) -> None:
    assert case.result["experts"] == [len(kept) for kept in case.keep]
    assert case.difference < EQUAL
    assert torch.equal(case.result["again"], case.result["logits"])
    assert case.result["generated"].shape == (len(case.ids_BS), tiny.BLOCK_TOKENS + 2)
    # The comparison means something: masking changes the logits by far more.
    assert case.difference_unmasked > 100 * EQUAL


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if families.has_table(case[0])])
def test_a_table_goes_on_choosing_the_experts_that_stay(case: Case) -> None:
    assert case.result["tables"]
    for name, table_VK in case.result["tables"].items():
        before_VK, kept = case.tensor(name), torch.tensor(case.kept_beside(name))
        stays_VK = torch.isin(before_VK, kept)
        assert torch.equal(kept[table_VK][stays_VK], before_VK[stays_VK])
        assert (table_VK.sort().values.diff() > 0).all(), "an expert is chosen twice"
        use_E = torch.bincount(table_VK[~stays_VK], minlength=len(kept))
        assert use_E.max() < 1.5 * use_E.float().mean(), "one expert stands in for more than the others"


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[1] == "uniform"])
def test_the_observer_sees_each_token_in_its_order(case: Case) -> None:
    """What each layer's experts are called with are its tokens, one block after another: seen one by one, the same."""
    seen: dict[str, torch.Tensor] = {}
    block_S = case.ids_BS[-1:]
    with observe(case.original, lambda call: seen.update({call.layer: call.x_TH})):
        plain_logits(case.original, block_S)
    assert list(seen) == [call.layer for call in case.calls] == list(experts_modules(case.original))
    for call in case.calls:
        assert len(call.x_TH) == case.ids_BS.numel()
        assert largest_difference(call.x_TH[-block_S.numel() :], seen[call.layer]) < 1e-4 * call.x_TH.abs().max()


def test_the_table_in_the_docs_is_of_this_run(
    cases: dict[tuple[str, str], Case | Exception], pytestconfig: pytest.Config
) -> None:
    table = families_table.page(cases)
    if pytestconfig.getoption("--write-families"):
        families_table.DOCUMENT.write_text(table)
    committed = families_table.DOCUMENT.read_text()
    if families_table.VERSION_LINE in committed:  # another release of transformers has other families
        assert committed == table, "the table is not of this run; write it again with `make families`"
