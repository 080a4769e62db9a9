"""Layers that predict further tokens (MTP): some checkpoints hold them, with experts of their own.

Transformers does not run them with the model, so nothing is known of what their experts do, and the config has one
number of experts for them and the others: a pruned checkpoint goes without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PretrainedConfig

REASON = "a layer that predicts further tokens, with experts that transformers does not run"

_NAMED = re.compile(r"(^|\.)(mtp|nextn)[^.]*\.")
_NUMBERED = re.compile(r"(^|\.)layers\.(\d+)\.")
_COUNTS = re.compile(r"^(num_)?(nextn_predict|mtp|mtp_hidden)_(layers|modules)$|^mtp_num_(hidden_)?layers$")


def stored(names: Iterable[str], of_experts: Iterable[str], depth: int) -> dict[str, str]:
    """The stored tensors of such layers -> why they are left out. Empty where none of these has experts.

    Args:
        names: of all stored tensors.
        of_experts: of those that belong to the experts of the model's own layers.
        depth: how many layers the model has; what is stored as a layer after its last is such a layer.
    """
    prefixes = {name[: numbered.start(2)] for name in of_experts if (numbered := _NUMBERED.search(name))}
    found = [name for name in names if _NAMED.search(name) or _is_beyond(name, prefixes, depth)]
    return dict.fromkeys(found, REASON) if any(".experts." in name for name in found) else {}


def _is_beyond(name: str, prefixes: set[str], depth: int) -> bool:
    numbered = _NUMBERED.search(name)
    return numbered is not None and name[: numbered.start(2)] in prefixes and int(numbered[2]) >= depth


def config_changes(config: PretrainedConfig) -> dict[str, Any]:
    """Dotted path in `config.json` -> 0, for each count of such layers."""
    return dict.fromkeys(_counts(config), 0)


def _counts(config: PretrainedConfig, prefix: str = "") -> Iterator[str]:
    for key, held in vars(config).items():
        if isinstance(held, PretrainedConfig):
            yield from _counts(held, f"{prefix}{key}.")
        elif type(held) is int and held > 0:
            names = [key, *(alias for alias, own in config.attribute_map.items() if own == key)]
            yield from (prefix + name for name in names if any(map(_COUNTS.search, names)))
