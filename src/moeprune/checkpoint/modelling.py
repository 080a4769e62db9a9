"""The modelling file that a checkpoint with different numbers of experts per layer carries.

A transformers config has one number of experts for all layers. Where a plan keeps different numbers, the checkpoint
gets a small file of code (`auto_map`) that rebuilds each layer's MoE block at its own size. It imports transformers
only: moeprune need not be installed where the model is served, but the loader must say `trust_remote_code=True`.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers import PretrainedConfig

FILE_NAME = "modeling_pruned.py"
EXPERTS_KEY = "pruned_experts"
PATH_KEY = "pruned_experts_path"

_SOURCE = Template('''\
"""$base whose layers have different numbers of experts: config.pruned_experts says how many."""

import copy
import inspect

import torch
from transformers import $base


class Pruned$base($base):
    def __init__(self, config):
        super().__init__(config)
        for name, experts in config.pruned_experts.items():
            block_name = name.rpartition(".")[0]
            parent_name, _, attribute = block_name.rpartition(".")
            setattr(self.get_submodule(parent_name), attribute, self._smaller(block_name, experts))
        self.post_init()

    def _smaller(self, block_name, experts):
        block_class = type(self.get_submodule(block_name))
        config = copy.deepcopy(self.config)
        holder = config
        for part in $holder:
            holder = getattr(holder, part)
        setattr(holder, "$key", experts)
        arguments = {"config": holder}
        if "layer_idx" in inspect.signature(block_class.__init__).parameters:
            arguments["layer_idx"] = next(int(part) for part in block_name.split(".") if part.isdigit())
        block = block_class(**arguments)
        shared = self.config
        for part in $holder:
            shared = getattr(shared, part)
        for module in block.modules():
            if hasattr(module, "config"):
                module.config = shared  # so that settings made on the model reach every layer
        return block
''')


def source(base_class: str, config_path: tuple[str, ...]) -> str:
    """The file's text for a stock class such as `Qwen2MoeForCausalLM`."""
    return _SOURCE.substitute(base=base_class, holder=repr(config_path[:-1]), key=config_path[-1])


def describe(base_class: str, config_path: tuple[str, ...], experts_per_layer: dict[str, int]) -> dict[str, Any]:
    """What `config.json` must say for transformers to use the file."""
    return {
        "architectures": [f"Pruned{base_class}"],
        "auto_map": {"AutoModelForCausalLM": f"{FILE_NAME.removesuffix('.py')}.Pruned{base_class}"},
        EXPERTS_KEY: experts_per_layer,
        PATH_KEY: list(config_path),
    }


def experts_per_layer(config: PretrainedConfig) -> dict[str, int] | None:
    """What the config of a non-uniformly pruned checkpoint says; None for any other."""
    return getattr(config, EXPERTS_KEY, None)


def is_ours(directory: Path) -> bool:
    """Whether all code in the checkpoint is, byte for byte, what we write for a stock class of transformers.

    Such code may run without the user's trust in remote code: nothing in it came from the checkpoint's author.
    """
    if [path.name for path in directory.glob("*.py")] != [FILE_NAME]:
        return False
    config = json.loads((directory / "config.json").read_text())
    base_class = str(config.get("architectures", [""])[0]).removeprefix("Pruned")
    config_path = tuple(str(part) for part in config.get(PATH_KEY, []))
    is_stock = hasattr(transformers, base_class) and all(part.isidentifier() for part in config_path) and config_path
    return bool(is_stock) and (directory / FILE_NAME).read_text() == source(base_class, config_path)
