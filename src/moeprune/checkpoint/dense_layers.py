"""How a config says that some layers are dense, found by experiment and not from a table of fields.

A family may have a list of such layers, a kind for each layer, or a number of dense ones that come first. Each place in
the config that could be one of these is changed, and the model built without memory: the change is right where exactly
these layers lose their experts, become gated MLPs of the wanted width, and nothing else is different.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.layout import build_without_weights, experts_modules
from moeprune.moe_blocks import Activation, as_gated_mlp, block_of

_DENSE = "dense"  # what a kind of layer is called where no layer is of that kind yet
_PLAIN = (bool, int, float, str, tuple)

Changes = dict[str, Any]  # dotted path in `config.json` -> value


class DenseLayers:
    """A model some of whose MoE layers are to be dense.

    Args:
        config: of the model as it is.
        stated: what its `config.json` says.
        model: the same, built without weights.
        widths: experts module -> how wide the dense layer in its place is.
    """

    def __init__(
        self, config: PretrainedConfig, stated: Mapping[str, Any], model: PreTrainedModel, widths: Mapping[str, int]
    ) -> None:
        self._config = config
        self._stated = stated
        self._model = model
        self._widths = widths
        self._blocks = tuple(block_of(name) + "." for name in widths)

    def find(self) -> tuple[Changes, PreTrainedModel] | None:
        """The changes of the config, and the model that it then describes; None where it cannot say so."""
        if len(set(self._widths.values())) > 1:
            return None
        width = next(iter(self._widths.values()))
        for path, value in self._ways():
            changes = {path: value}
            built = self._built(changes)
            if built is None:
                continue
            found = self._width_of_dense(built)
            if found == width:
                return changes, built
            for of_width in _paths_of(self._config, found):
                changes = {path: value, of_width: width}
                built = self._built(changes)
                if built is not None and self._width_of_dense(built) == width:
                    return changes, built
        return None

    def _ways(self) -> Iterator[tuple[str, Any]]:
        """Every place that could say which layers are dense, with what it would say."""
        layers = {name: _number_of(name) for name in experts_modules(self._model)}
        sparse = {number for name, number in layers.items() if name not in self._widths}
        dense = sorted(layers[name] for name in self._widths)
        depth = self._config.get_text_config().num_hidden_layers
        first = dense[-1] + 1
        for path, held in _fields(self._config):
            if isinstance(held, list | tuple):
                if all(type(one) is int for one in held):
                    yield path, sorted({*held, *dense})
                if len(held) == depth:
                    for other in sorted({*(one for one in held if isinstance(one, str)), _DENSE}):
                        yield path, [other if number in dense else one for number, one in enumerate(held)]
            elif type(held) is int and held < first and not any(number < first for number in sparse):
                yield path, first

    def _built(self, changes: Changes) -> PreTrainedModel | None:
        """The model with a changed config, if these layers are dense in it and all else is as it was."""
        stated = copy.deepcopy(dict(self._stated))
        for path, value in changes.items():
            put(stated, path, value)
        try:
            built = build_without_weights(type(self._config).from_dict(stated))
        except Exception:  # a value that means something else: the model may refuse it in any way it likes
            return None
        if experts_modules(built).keys() != experts_modules(self._model).keys() - self._widths.keys():
            return None
        return built if self._is_otherwise_the_same(built) and self._width_of_dense(built) else None

    def _is_otherwise_the_same(self, built: PreTrainedModel) -> bool:
        one, other = self._outside(self._model), self._outside(built)
        return one == other

    def _outside(self, model: PreTrainedModel) -> dict[str, Any]:
        """Shapes of tensors, and numbers of modules, that have nothing to do with the layers in question."""
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not self._is_inside(name)}
        numbers = {
            name: (type(module), {key: held for key, held in vars(module).items() if isinstance(held, _PLAIN)})
            for name, module in model.named_modules()
            if not self._is_inside(name + ".") and not self._holds_one(name)
        }
        return shapes | numbers

    def _holds_one(self, name: str) -> bool:
        return not name or any(block.startswith(name + ".") for block in self._blocks)

    def _is_inside(self, name: str) -> bool:
        return name.startswith(self._blocks)

    def _width_of_dense(self, built: PreTrainedModel) -> int:
        """How wide the dense layers are; 0 where they are no gated MLPs, or not all the same."""
        widths = set()
        for name in self._widths:
            act = cast(Activation, experts_modules(self._model)[name].act_fn)
            block = built.get_submodule(block_of(name))
            mlp = as_gated_mlp(block, act)
            if mlp is None:
                return 0
            widths.add(block.get_parameter(mlp.gate).shape[0])
        return widths.pop() if len(widths) == 1 else 0


def put(stated: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path."""
    *parents, last = path.split(".")
    for part in parents:
        stated = stated.setdefault(part, {})
    stated[last] = value


def _fields(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, held in vars(config).items():
        if isinstance(held, PretrainedConfig):
            yield from _fields(held, f"{prefix}{key}.")
        else:
            yield prefix + key, held


def _paths_of(config: PretrainedConfig, value: int) -> Iterable[str]:
    return [path for path, held in _fields(config) if type(held) is int and held == value]


def _number_of(name: str) -> int:
    """The number of a layer, from the name of something in it."""
    return int(re.findall(r"\.(\d+)\.", name)[0])
