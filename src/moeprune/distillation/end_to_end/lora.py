"""LoRA (arXiv 2106.09685) by peft: low-rank additions learn, and are merged into the weights at the end.

Added are they to every dense projection and, by expert, to the experts' own weights. Weights that must stay zero take
no addition: of a sparse plan, the experts stay as they are.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.errors import InputError

_WEIGHTS = 2  # axes of a dense projection
_EXPERTS_WEIGHTS = 3
_WRAPPED = ".base_layer"


def refuse_without_peft() -> None:
    """Raise InputError where the library is not installed."""
    if find_spec("peft") is None:
        raise InputError("LoRA needs the library peft: pip install 'moeprune[lora]'")


def add_lora(model: PreTrainedModel, rank: int, *, experts: bool) -> None:
    """Put additions, which change nothing yet, beside the weights; torch's random numbers decide their beginning.

    Args:
        rank: of each; they are scaled by 2.
        experts: whether the experts get some, too.

    Raises:
        InputError: peft is not installed, or the model has nothing to add to.
    """
    refuse_without_peft()
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module.weight.dim() == _WEIGHTS
    ]
    own = [
        f"{name}.{parameter}"
        for name, module in experts_modules(model).items()
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.dim() == _EXPERTS_WEIGHTS
    ]
    if not dense and not (experts and own):
        raise InputError(f"{model.config.model_type} has no projections that LoRA could add to; train other parts")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=dense, target_parameters=own if experts else None)
    inject_adapter_in_model(config, model)


def merge_lora(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Add what was learnt to the weights and take the additions out again.

    Returns:
        The weights that have changed, by the model's own names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed: dict[str, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            base = module.get_base_layer()
            weight = getattr(module, "parameter_name", "weight")
            changed[f"{plain_name(name)}.{weight}"] = getattr(base, weight).detach()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.endswith(_WRAPPED):
            model.set_submodule(name, module.get_base_layer())
    return changed


def plain_name(name: str) -> str:
    """What a module or parameter is called without LoRA around it."""
    return name.replace(_WRAPPED, "")
