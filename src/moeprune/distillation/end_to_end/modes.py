"""A student learns in the mode in which it will be used: no dropout, no noise in routers, no losses of its own."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def learn_as_used(model: PreTrainedModel) -> None:
    """Have `model.train()` leave everything in evaluation mode but what decides on gradient checkpointing."""

    def train(mode: bool = True) -> PreTrainedModel:
        torch.nn.Module.train(model, False)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return model

    model.train = train
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
