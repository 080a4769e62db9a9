"""The modelling file that a checkpoint with different numbers of experts per layer, or with constants, carries.

A transformers config has one number of experts for all layers. Where a plan keeps different numbers, the checkpoint
gets a small file of code (`auto_map`) that makes each layer as a model with that many experts would have it. Where it
puts constants in experts' places, the file adds those to what the experts put out; where it condenses a layer, the file
puts a dense MLP in its place. It imports transformers and torch only: moeprune need not be installed where the model is
served, but the loader must say `trust_remote_code=True`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

FILE_NAME = "modeling_pruned.py"
EXPERTS_KEY = "pruned_experts"
PATH_KEY = "pruned_experts_path"
CONSTANTS_KEY = "pruned_constants"
CONSTANTS_NAME = "constant_CH"
CONDENSED_KEY = "pruned_condensed"
DENSE_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_SOURCE = Template('''\
"""$base whose layers have different numbers of experts: config.pruned_experts says how many."""

import copy

${import_torch}from transformers import $base
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# Transformers converts the names of stored weights for classes of its own, and for those that are registered.
for stock, own in (("$base", "Pruned$base"), ($base.config_class.model_type, $base.config_class.model_type)):
    if conversions := get_checkpoint_conversion_mapping(stock):
        register_checkpoint_conversion_mapping(own, conversions, overwrite=True)


class Pruned$base($base):
    def __init__(self, config):
        if not isinstance(config, $base.config_class):  # of a model with images or sound, of which this is the text's
            whole, config = config, config.get_text_config()
            for key in [key for key in vars(whole) if key.startswith("pruned_")]:
                setattr(config, key, getattr(whole, key))
        super().__init__(config)
        self._configs_of_layers = []
        layers = config.pruned_experts
        self._take({_subtree(name, layers): experts for name, experts in layers.items()})
$constants_in_place$condensed_in_place        self.post_init()

    def _take(self, parts):
        """Make each part of this model as it is in a model with so many experts."""
        for experts in sorted(set(parts.values())):
            smaller = $base(_with_experts(self.config, experts))
            for part in [part for part in parts if parts[part] == experts]:
                self._take_layer(part, smaller, experts)

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

_CONSTANTS_IN_PLACE = """\
        rows = {name: layers[name] + len(constants) for name, constants in config.pruned_constants.items()}
        self._take({_subtree(name, layers): choosable for name, choosable in rows.items()})
        self._take({name: layers[name] for name in rows})
        for name, constants in config.pruned_constants.items():
            _put_constants(self.get_submodule(name), constants, rows[name])
"""

_CONSTANTS = '''

class _WithConstants:
    """Experts, some of which are constants: what the router gives them is multiplied with their mean outputs."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        constants = len(self.constant_CH)
        # What is past the last expert runs nothing; but some families' own code does not know of such choices.
        nobody = 0 if self.config._experts_implementation == "eager" else self.num_experts
        number_R = torch.tensor(self.number_of_row, device=top_k_index.device)
        index_TK = top_k_index.to(torch.int64)
        past_TK = index_TK - constants  # what some routers choose past the last expert stays past the last
        number_TK = torch.where(index_TK < len(number_R), number_R[index_TK.clamp(max=len(number_R) - 1)], past_TK)
        constant_TK = number_TK < 0
        weight_TK = top_k_weights.masked_fill(~constant_TK, 0)
        gate_TC = weight_TK.new_zeros(len(weight_TK), constants)
        gate_TC.scatter_add_(1, (-1 - number_TK).clamp(min=0), weight_TK)
        out_TH = super().forward(
            hidden_states,
            number_TK.masked_fill(constant_TK, nobody).to(top_k_index.dtype),
            top_k_weights.masked_fill(constant_TK, 0),
        )
        return out_TH + (gate_TC.to(self.constant_CH.dtype) @ self.constant_CH).to(out_TH.dtype)


def _put_constants(experts, constants, rows):
    """Make some rows of the router choose constants; the others choose the experts, in their order."""
    down = experts.down_proj
    hidden = down.shape[-1] if experts.is_transposed else down.shape[-2]
    experts.constant_CH = torch.nn.Parameter(down.new_zeros(len(constants), hidden))
    left = [row for row in range(rows) if row not in constants]
    experts.number_of_row = [left.index(row) if row in left else -1 - constants.index(row) for row in range(rows)]
    experts._is_expert_parallel = True  # so transformers runs nothing for choices past the last expert
    experts.__class__ = type(type(experts).__name__, (_WithConstants, type(experts)), {})
'''

_CONDENSED_IN_PLACE = """\
        for name, width in config.pruned_condensed.items():
            self.set_submodule(name.rpartition(".")[0], _Condensed(self.get_submodule(name), width))
"""

_CONDENSED = '''

class _Condensed(torch.nn.Module):
    """A dense MLP in place of a router and its experts: all tokens go through all that is left of them."""

    def __init__(self, experts, width):
        super().__init__()
        down = experts.down_proj
        hidden = down.shape[-1] if experts.is_transposed else down.shape[-2]
        self.gate_proj = torch.nn.Linear(hidden, width, bias=False)
        self.up_proj = torch.nn.Linear(hidden, width, bias=False)
        self.down_proj = torch.nn.Linear(width, hidden, bias=False)
        self.act_fn = experts.act_fn

    def forward(self, hidden_states, *args, **kwargs):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
'''


def source(base_class: str, config_path: tuple[str, ...], *, constants: bool = False, condensed: bool = False) -> str:
    """The file's text for a stock class such as `Qwen2MoeForCausalLM`.

    Args:
        constants: whether any layer has constants.
        condensed: whether any layer is condensed.
    """
    path = list(config_path)
    if path[0] not in getattr(transformers, base_class).config_class.sub_configs:  # the class has the text's config
        path = path[-1:]
    text = _SOURCE.substitute(
        base=base_class,
        holder=repr(tuple(path[:-1])),
        key=path[-1],
        import_torch="import torch\n" if constants or condensed else "",
        constants_in_place=_CONSTANTS_IN_PLACE if constants else "",
        condensed_in_place=_CONDENSED_IN_PLACE if condensed else "",
    )
    return text + (_CONSTANTS if constants else "") + (_CONDENSED if condensed else "")


def describe(
    base_class: str,
    config_path: tuple[str, ...],
    experts_per_layer: dict[str, int],
    quantisation: dict[str, Any] | None,
    constants: dict[str, list[int]] | None = None,
    condensed: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What `config.json` must say for transformers to use the file.

    Args:
        constants: experts module -> the rows of its router that choose constants, where it has any.
        condensed: experts module -> how wide the dense MLP in its place is, where the layer is condensed.
        quantisation: what `config.json` says of it. MXFP4 must be undone when it is loaded: the modules that compute
            with it know one number of experts.
    """
    undone = {**quantisation, "dequantize": True} if quantisation and quantisation["quant_method"] == "mxfp4" else None
    return ({"quantization_config": undone} if undone else {}) | {
        "architectures": [f"Pruned{base_class}"],
        "auto_map": {"AutoModelForCausalLM": f"{FILE_NAME.removesuffix('.py')}.Pruned{base_class}"},
        EXPERTS_KEY: experts_per_layer,
        PATH_KEY: list(config_path),
        **({CONSTANTS_KEY: constants} if constants else {}),
        **({CONDENSED_KEY: condensed} if condensed else {}),
    }


def experts_per_layer(config: PretrainedConfig) -> dict[str, int] | None:
    """What the config of a non-uniformly pruned checkpoint says; None for any other."""
    return getattr(config, EXPERTS_KEY, None)


def condensed_widths(config: PretrainedConfig) -> dict[str, int]:
    """How wide the dense layers are that the checkpoint's own file makes; nothing for any other."""
    return getattr(config, CONDENSED_KEY, {})


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
    expected = source(
        base_class,
        config_path,
        constants=bool(config.get(CONSTANTS_KEY)),
        condensed=bool(config.get(CONDENSED_KEY)),
    )
    return (directory / FILE_NAME).read_text() == expected
