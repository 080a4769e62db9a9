"""The modelling file that a checkpoint with different numbers of experts per layer carries.

A transformers config has one number of experts for all layers. Where a plan keeps different numbers, the checkpoint
gets a small file of code (`auto_map`) that makes each layer as a model with that many experts would have it. It imports
transformers only: moeprune need not be installed where the model is served, but the loader must say
`trust_remote_code=True`.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

FILE_NAME = "modeling_pruned.py"
EXPERTS_KEY = "pruned_experts"
PATH_KEY = "pruned_experts_path"

_SOURCE = Template('''\
"""$base whose layers have different numbers of experts: config.pruned_experts says how many."""

import copy

from transformers import $base
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# Transformers converts the names of stored weights for classes of its own, and for those that are registered.
for stock, own in (("$base", "Pruned$base"), ($base.config_class.model_type, $base.config_class.model_type)):
    if conversions := get_checkpoint_conversion_mapping(stock):
        register_checkpoint_conversion_mapping(own, conversions, overwrite=True)


class Pruned$base($base):
    def __init__(self, config):
        if not isinstance(config, $base.config_class):  # of a model with images or sound, of which this is the text's
            whole, config = config, config.get_text_config()
            for key in ("pruned_experts", "pruned_experts_path"):
                setattr(config, key, getattr(whole, key))
        super().__init__(config)
        self._configs_of_layers = []
        layers = config.pruned_experts
        for experts in sorted(set(layers.values())):
            smaller = $base(_with_experts(config, experts))
            for name in [name for name in layers if layers[name] == experts]:
                self._take_layer(_subtree(name, layers), smaller, experts)
        self.post_init()

    def _take_layer(self, layer, smaller, experts):
        """Make a part of this model as it is in a model with fewer experts: its tensors' shapes, its numbers."""
        config = None
        for name, other in smaller.get_submodule(layer).named_modules():
            own = self.get_submodule(layer).get_submodule(name)
            numbers = {key: held for key, held in vars(other).items() if isinstance(held, (int, float, tuple))}
            tensors = {**other._parameters, **other._buffers}
            tensors = {key: held for key, held in tensors.items() if held is not None}
            changed = {key: held for key, held in numbers.items() if getattr(own, key, None) != held}
            changed |= {key: held for key, held in tensors.items() if getattr(own, key).shape != held.shape}
            for key, held in changed.items():
                setattr(own, key, held)
            if changed and hasattr(own, "config"):
                config = config or _with_experts(self.config, experts)
                own.config = _holder(config)
        if config is not None:
            self._configs_of_layers.append(config)

    def set_experts_implementation(self, experts_implementation):
        super().set_experts_implementation(experts_implementation)
        for config in self._configs_of_layers:
            _holder(config)._experts_implementation = _holder(self.config)._experts_implementation


def _holder(config):
    for part in $holder:
        config = getattr(config, part)
    return config


def _with_experts(config, experts):
    config = copy.deepcopy(config)
    _holder(config).$key = experts
    return config


def _subtree(name, layers):
    """The largest part of the model that has this layer's experts and no other's."""
    parts = name.split(".")
    others = [other + "." for other in layers if other != name]
    subtrees = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next(tree for tree in subtrees if not any(other.startswith(tree + ".") for other in others))
''')


def source(base_class: str, config_path: tuple[str, ...]) -> str:
    """The file's text for a stock class such as `Qwen2MoeForCausalLM`."""
    path = list(config_path)
    if path[0] not in getattr(transformers, base_class).config_class.sub_configs:  # the class has the text's config
        path = path[-1:]
    return _SOURCE.substitute(base=base_class, holder=repr(tuple(path[:-1])), key=path[-1])


def describe(
    base_class: str,
    config_path: tuple[str, ...],
    experts_per_layer: dict[str, int],
    quantisation: dict[str, Any] | None,
) -> dict[str, Any]:
    """What `config.json` must say for transformers to use the file.

    Args:
        quantisation: what `config.json` says of it. MXFP4 must be undone when it is loaded: the modules that compute
            with it know one number of experts.
    """
    undone = {**quantisation, "dequantize": True} if quantisation and quantisation["quant_method"] == "mxfp4" else None
    return ({"quantization_config": undone} if undone else {}) | {
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
    stock = getattr(transformers, base_class, None) if base_class.isidentifier() else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        return False
    if not config_path or not all(part.isidentifier() for part in config_path):
        return False
    return (directory / FILE_NAME).read_text() == source(base_class, config_path)
