"""A model on the meta device, whose parts are brought in from the checkpoint's files and dropped again.

A part is what the forward pass enters as one: a layer, or a module outside the layers that has weights of its own (the
embedding, the last norm). The routed experts are not among a layer's weights: they are brought in as so many at a time
as there is room for. How stored tensors become parameters (names, fusing, transposing, dequantising) is transformers'
own conversion, asked for a few tensors at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer

from moeprune.checkpoint.layout import build_without_weights, experts_modules, with_experts
from moeprune.checkpoint.loading import Checkpoint, one_after_another, undoing_quantisation
from moeprune.errors import InputError


class PagedModel:
    """A model of which only what is asked for is in memory.

    Attributes:
        model: in evaluation mode; what is not in memory is on the meta device.
        dtype: of its weights.
        layers: names of the experts modules, in the order of the model.
        parts: names of the parts. None of them is in memory at first.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Raises InputError where the checkpoint lacks something that the model needs."""
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._device = device
        self._config, self._quantizer = _dequantising(checkpoint.config, device)
        self.model = self._prepared(self._config)
        self.layers = list(experts_modules(self.model))
        self._of_fewer_experts: dict[int, PreTrainedModel] = {}
        self._parameters_of = self._find_parts()
        self.parts = list(self._parameters_of)
        self._part_of = {name: part for part, names in self._parameters_of.items() for name in names}
        self._on_meta = {name: self._get(name) for names in self._parameters_of.values() for name in names}
        self._name_of = self._find_stored()
        self._stored_of, self._stored_experts_of = self._sort_stored()
        self._in_memory: list[str] = []

    def bytes_of(self, part: str) -> int:
        """What the part takes in memory."""
        return sum(self._on_meta[name].nbytes for name in self._parameters_of[part])

    def bytes_per_expert(self, layer: str) -> int:
        experts = self.model.get_submodule(layer)
        return sum(p.nbytes for p in experts.parameters()) // self.experts_of(layer)

    def experts_of(self, layer: str) -> int:
        """How many routed experts the layer has."""
        return self._checkpoint.layout.layers[layer].experts

    def enter(self, part: str) -> None:
        """Bring a part into memory, in place of all that the pass has left behind; what it is inside of stays."""
        for other in list(self._in_memory):
            if other != part and not _is_inside(part, other):
                self.drop(other)
        if part not in self._in_memory:
            self._load(self.model, self._stored_of[part])
            self._in_memory.append(part)
            self._tie(part)

    def drop(self, part: str) -> None:
        for name in self._parameters_of[part]:
            self._set(name, self._on_meta[name])
        self._in_memory.remove(part)

    def drop_all(self) -> None:
        for part in list(self._in_memory):
            self.drop(part)

    @contextmanager
    def experts(self, layer: str, which: range) -> Iterator[torch.nn.Module]:
        """An experts module of the layer's kind that holds only these experts, in memory inside the block."""
        model = self.model if len(which) == self.experts_of(layer) else self._with_experts(len(which))
        with self._in_place(model, layer, self._renumbered(layer, which)) as module:
            yield module

    @contextmanager
    def whole(self, name: str) -> Iterator[torch.nn.Module]:
        """A module inside a layer with all that it holds, routed experts too, in memory inside the block."""
        stored = {one: self._lazy(one) for one, own in self._name_of.items() if _is_inside(own, name)}
        with self._in_place(self.model, name, stored) as module:
            yield module

    @contextmanager
    def _in_place(self, model: PreTrainedModel, name: str, stored: dict[str, _Lazy]) -> Iterator[torch.nn.Module]:
        module = model.get_submodule(name)
        before = dict(module.state_dict(keep_vars=True))
        self._load(model, stored)
        self._check_complete(name, module)
        try:
            yield module
        finally:
            for own, tensor in before.items():
                _put(module, own, tensor)

    def _with_experts(self, count: int) -> PreTrainedModel:
        """The same model with fewer experts in each layer, on the meta device."""
        if count not in self._of_fewer_experts:
            config_path = self._checkpoint.layout.config_path
            self._of_fewer_experts[count] = self._prepared(with_experts(self._config, config_path, count))
        return self._of_fewer_experts[count]

    def _renumbered(self, layer: str, which: range) -> dict[str, _Lazy]:
        """The stored tensors of these experts, as if there were no others."""
        stored = self._stored_experts_of[layer]
        layout = self._checkpoint.layout.layers[layer]
        numbered = {*layout.fused, *chain(*layout.separate)}
        tensors = {name: lazy for name, lazy in stored.items() if name not in numbered}
        for name, axis in layout.fused.items():
            if name in stored:
                tensors[name] = self._lazy(name, axis, which)
        for names in layout.separate:
            tensors |= {names[new]: stored[names[old]] for new, old in enumerate(which) if names[old] in stored}
        return tensors

    def _prepared(self, config: PretrainedConfig) -> PreTrainedModel:
        """A model on the meta device, but for the buffers that are computed and not stored: those as after loading."""
        model = build_without_weights(config, dtype=self.dtype, trust_remote_code=self._checkpoint.may_run_code)
        if self._quantizer is not None:
            self._quantizer.preprocess_model(model=model, dtype=self.dtype, device_map={"": self._device})
        for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
            model.get_parameter_or_buffer(name)._is_hf_initialized = True
        for name, buffer in model.named_non_persistent_buffers():
            _put(model, name, torch.empty_like(buffer, device=self._device))
        model.initialize_weights()
        return model.eval()

    def _find_parts(self) -> dict[str, list[str]]:
        """The parts, each with the parameters and stored buffers that it owns, in the order of the model."""
        lists = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.ModuleList)]
        outermost = [name for name in lists if not any(_is_inside(name, other) for other in lists if other != name)]
        head = self.model.get_output_embeddings()
        parts: dict[str, list[str]] = {}
        for name in self.model.state_dict():
            if any(_is_inside(name, layer) for layer in self.layers):
                continue
            owner, _, _ = name.rpartition(".")
            if head is not None and self.model.get_submodule(owner) is head:
                continue  # a pass ends before it
            inside = [one for one in outermost if _is_inside(owner, one)]
            if inside:
                owner = ".".join(owner.split(".")[: inside[0].count(".") + 2])
            parts.setdefault(owner, []).append(name)
        return parts

    def _find_stored(self) -> dict[str, str]:
        """Stored tensor -> the parameter or buffer that it is, or is a part of."""
        conversions = get_model_conversion_mapping(self.model, None, self._quantizer)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        state = self.model.state_dict()
        found = {}
        for stored in self._checkpoint.files.entries:
            name, _ = rename_source_key(stored, renamings, converters, self.model.base_model_prefix, state)
            found[stored] = stored if name not in state and stored in state else name
        return found

    def _sort_stored(self) -> tuple[dict[str, dict[str, _Lazy]], dict[str, dict[str, _Lazy]]]:
        """Which stored tensors make up each part, and each layer's experts."""
        of_part: dict[str, dict[str, _Lazy]] = {part: {} for part in self.parts}
        of_experts: dict[str, dict[str, _Lazy]] = {layer: {} for layer in self.layers}
        for stored, name in self._name_of.items():
            if name in self._part_of:
                of_part[self._part_of[name]][stored] = self._lazy(stored)
            else:
                for layer in self.layers:
                    if _is_inside(name, layer):
                        of_experts[layer][stored] = self._lazy(stored)
        return of_part, of_experts

    def _lazy(self, stored: str, axis: int = 0, which: range | None = None) -> _Lazy:
        files = self._checkpoint.files
        dtype = files.entries[stored].dtype
        if which is None:
            return _Lazy(dtype, lambda: files.read([stored])[stored])
        return _Lazy(dtype, lambda: files.read_slice(stored, axis, which.start, which.stop))

    def _load(self, model: PreTrainedModel, tensors: dict[str, _Lazy]) -> None:
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=model._get_dtype_plan(self.dtype),
            device_map={"": self._device},
            weight_mapping=get_model_conversion_mapping(model, None, self._quantizer),
            hf_quantizer=self._quantizer,
        )
        with one_after_another():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise InputError(
                f"{self._checkpoint.directory} does not fit its architecture; misshapen: {sorted(map(str, wrong))[0]}"
            )

    def _tie(self, part: str) -> None:
        """Give the part what it shares with another."""
        ties = getattr(self.model, "all_tied_weights_keys", {})
        for name in self._parameters_of[part]:
            if not self._get(name).is_meta:
                continue
            source = ties.get(name)
            if source is None or source not in self._part_of:
                raise InputError(f"{self._checkpoint.directory} does not hold {name}, which its architecture needs")
            other = self._part_of[source]
            was_there = other in self._in_memory
            if not was_there:
                self._load(self.model, self._stored_of[other])
                self._in_memory.append(other)
            self._set(name, self._get(source))
            if not was_there:
                self.drop(other)

    def _check_complete(self, layer: str, module: torch.nn.Module) -> None:
        absent = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if absent:
            raise InputError(f"{self._checkpoint.directory} does not hold {layer}.{absent[0]}")

    def _get(self, name: str) -> torch.Tensor:
        return self.model.get_parameter_or_buffer(name)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        _put(self.model, name, tensor)


class _Lazy:
    """A stored tensor that is read when transformers indexes it, as it does with those of the safetensors library."""

    def __init__(self, dtype: str, read: Callable[[], torch.Tensor]) -> None:
        self._dtype = dtype
        self._read = read

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]


def _dequantising(config: PretrainedConfig, device: torch.device) -> tuple[PretrainedConfig, Any]:
    """The config, and where its weights are stored quantised, what undoes that as they are brought in."""
    undoing = undoing_quantisation(config)
    if undoing is None:
        return config, None
    config = copy.deepcopy(config)
    config.quantization_config = undoing.to_dict()
    quantizer, config, _ = get_hf_quantizer(config, None, {"": device}, True, {})
    return config, quantizer


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(tensor, torch.nn.Parameter):
        module._parameters[key] = tensor
    else:
        module._buffers[key] = tensor
