"""A family pruned in one way, and the page of the docs that tells what came of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from masking import largest_difference, masked_logits, plain_logits
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import LayerLayout, Layout
from moeprune.statistics.observer import ExpertsCall

EQUAL = 1e-5  # of the largest logit
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
VERSION_LINE = f"transformers {transformers.__version__}"

_PAGE = """# Families

Every causal-LM family of {version} that dispatches its experts through `ExpertsInterface`, as the tests found
it: a tiny random model of the family is observed, pruned with the same number of experts in each layer (even) and with
different ones (uneven), and loaded where moeprune is not installed. *Yes* says that its logits are those of the
original with the dropped experts masked before the router chooses, to 1e-5 of the largest (float32), that it generates,
and that it saves and loads again with the same logits. Where a table from token to expert takes the router's place, a
token whose expert goes gets another one that stays.

An uneven checkpoint brings a small modelling file and wants `trust_remote_code=True`; an even one loads like any other.

| family | what it has | even | uneven |
| --- | --- | --- | --- |
{rows}

What cannot be pruned, whatever the family, is in `src/moeprune/checkpoint/unsupported.py`, each with the reason
that the command line says.

`make families` writes this page.
"""


@dataclass
class Case:
    """A family pruned in one way: the original, what was observed, and what the pruned one computed elsewhere."""

    original: PreTrainedModel
    calls: list[ExpertsCall]
    layout: Layout
    keep: list[list[int]]
    ids_BS: torch.Tensor
    directory: Path
    result: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """Of the original, by its own name."""
        return self.original.state_dict()[name]

    def kept_beside(self, name: str) -> list[int]:
        """The experts that stay in the layer whose block a tensor is in."""
        blocks = [call.layer.removesuffix("experts") for call in self.calls]
        return next(kept for block, kept in zip(blocks, self.keep, strict=True) if name.startswith(block))

    @cached_property
    def masked_logits(self) -> torch.Tensor:
        """The original's without the dropped experts; where a table chooses experts, it is the pruned model's."""
        before = {name: self.tensor(name).clone() for name in self.result["tables"]}
        for name, table_VK in self.result["tables"].items():
            self.tensor(name).copy_(torch.tensor(self.kept_beside(name))[table_VK])
        logits = masked_logits(self.original, self.keep, self.ids_BS)
        for name, table_VK in before.items():
            self.tensor(name).copy_(table_VK)
        return logits

    @property
    def difference(self) -> float:
        """Of the pruned model's logits to the masked original's, as a part of the largest."""
        return largest_difference(self.result["logits"], self.masked_logits) / self.masked_logits.abs().max().item()

    @property
    def difference_unmasked(self) -> float:
        logits = plain_logits(self.original, self.ids_BS)
        return largest_difference(logits, self.masked_logits) / self.masked_logits.abs().max().item()


def page(cases: dict[tuple[str, str], Case | Exception]) -> str:
    """The page of the docs, from the cases by family and kind."""
    rows = []
    for family in dict.fromkeys(family for family, _ in cases):
        even, uneven = cases[family, "uniform"], cases[family, "uneven"]
        has = ", ".join(_features(even)) if isinstance(even, Case) else ""
        rows.append(f"| `{family}` | {has} | {_verdict(even)} | {_verdict(uneven)} |")
    return _PAGE.format(version=VERSION_LINE, rows="\n".join(rows))


def _verdict(case: Case | Exception) -> str:
    if isinstance(case, Exception):
        return f"no: {case}"
    if "error" in case.result:
        return "no: " + case.result["error"].strip().splitlines()[-1]
    return "yes" if case.difference < EQUAL else f"no: logits differ by {case.difference:.1e}"


def _features(case: Case) -> list[str]:
    """What this family has that others have not, told from its tiny model."""
    layer = list(case.layout.layers.values())[-1]
    config = case.original.config.get_text_config()
    module = case.calls[-1].module
    names = "\n".join(case.original.state_dict())
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"moe", "mlp"})
    told = {
        "a tensor per expert": bool(layer.separate),
        "fused experts": not layer.separate,
        "transposed": module.is_transposed,
        "interleaved": not module.is_concatenated,
        "no gate in the experts": not module.has_gate,
        "biases in the experts": module.has_bias,
        "bias of the choice": any(part in names for part in ("correction_bias", "balancing_bias", "expert_bias")),
        "groups": (getattr(config, "n_group", None) or 1) > 1,
        "shared experts": any(part in names for part in ("shared_expert", "shared_mlp")),
        "gate of the shared expert": "shared_expert_gate" in names,
        "layers without experts": len(case.calls) < config.num_hidden_layers,
        "router has rows past the experts": _has_rows_past_the_experts(case, layer),
        "table from token to expert": any(layer.tables for layer in case.layout.layers.values()),
        "tied embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "text model of a larger one": len(case.layout.config_path) > 1,
        f"layers: {', '.join(kinds)}": len(kinds) > 1,
    }
    return [feature for feature, has in told.items() if has]


def _has_rows_past_the_experts(case: Case, layer: LayerLayout) -> bool:
    return any(case.tensor(name).shape[axis] > layer.experts for name, axis in layer.parameters.items())
