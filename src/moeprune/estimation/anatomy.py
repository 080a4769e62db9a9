"""What a model is made of: how many parameters are where, from its config and its headers.

Axes: E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from moeprune.checkpoint.files import INDEX_NAME
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.other_files import other_files
from moeprune.checkpoint.surgery import foresee
from moeprune.moe_blocks import block_of
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics.inside import down_weight
from moeprune.streaming.paging import PagedModel
from moeprune.streaming.streamed import USUAL_TOP_K

_COUNTED_AS = torch.float32  # parts are told in bytes of it


@dataclass(frozen=True)
class MoeLayer:
    """One layer's routed experts and what is beside them in its block, in parameters.

    Attributes:
        experts: E.
        top_k: of them run for a token.
        per_expert: of one.
        beside: the router, and an expert that all tokens take.
        width: I.
    """

    experts: int
    top_k: int
    per_expert: int
    beside: int
    width: int

    @property
    def routed(self) -> int:
        return self.experts * self.per_expert

    @property
    def active(self) -> int:
        """Those of the block that a token is multiplied with."""
        return min(self.top_k, self.experts) * self.per_expert + self.beside


@dataclass(frozen=True)
class Anatomy:
    """A model, in parameters.

    Attributes:
        embedding: of the embedding.
        head: of what turns hidden states into logits.
        ties: whether that is the embedding again.
        body: of all that is neither of these nor a routed expert.
        largest_part: of the largest part that is brought in as one when the model is streamed, without routed experts.
        hidden: H.
        attention: what all heads of a layer are wide together.
        vocabulary: tokens that there are.
        blocks: transformer layers, those without experts, too.
        layers: by the names of their experts modules.
        bytes_on_disk: of its safetensors files and all that belongs to them, but the card.
    """

    embedding: int
    head: int
    ties: bool
    body: int
    largest_part: int
    hidden: int
    attention: int
    vocabulary: int
    blocks: int
    layers: dict[str, MoeLayer]
    bytes_on_disk: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, elsewhere: int = 0) -> Anatomy:
        """Raises InputError where the model is none that moeprune can prune.

        Args:
            elsewhere: bytes of small files that belong to it and are not in its directory.
        """
        paged = PagedModel(checkpoint, _COUNTED_AS, torch.device("meta"))
        model, config = paged.model, checkpoint.config.get_text_config()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        layers = _layers(checkpoint, model)
        ties = head is not None and head.weight is embedding.weight
        own_head = _count(head) if head is not None and not ties else 0
        routed = sum(layer.routed for layer in layers.values())
        hidden = embedding.weight.shape[-1]
        heads = getattr(config, "num_attention_heads", None) or 1
        beside = sum(path.stat().st_size for path in other_files(checkpoint.directory))
        index = checkpoint.files.source.sizes().get(INDEX_NAME, 0)
        return cls(
            embedding=_count(embedding),
            head=_count(head) if head is not None else 0,
            ties=ties,
            body=_count(model) - _count(embedding) - own_head - routed,
            largest_part=max(map(paged.bytes_of, paged.parts)) // _COUNTED_AS.itemsize,
            hidden=hidden,
            attention=heads * (getattr(config, "head_dim", None) or hidden // heads),
            vocabulary=embedding.weight.shape[0],
            blocks=config.num_hidden_layers,
            layers=layers,
            bytes_on_disk=checkpoint.files.bytes_on_disk + index + beside + elsewhere,
        )

    def pruned(self, plan: Plan, checkpoint: Checkpoint, elsewhere: int = 0) -> Anatomy:
        """What a Plan makes of it. Raises InputError where it cannot be carried out."""
        made = foresee(checkpoint, plan)
        layers = {name: _pruned(layer, plan.layers[name]) for name, layer in self.layers.items()}
        routed = sum(layer.routed for layer in layers.values())
        gone = checkpoint.files.parameters - made.parameters
        return replace(
            self,
            body=self.body + self.routed - gone - routed,
            layers=layers,
            bytes_on_disk=made.bytes + elsewhere,
        )

    @property
    def routed(self) -> int:
        """Parameters of all routed experts."""
        return sum(layer.routed for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        """Of the model in memory: what two parts share is there once."""
        return self.embedding + (0 if self.ties else self.head) + self.body + self.routed

    @property
    def active(self) -> int:
        """Parameters that each token is multiplied with on its way to the head."""
        return self.body + sum(layer.active - layer.beside for layer in self.layers.values())

    @property
    def largest(self) -> MoeLayer:
        """The layer of the most routed parameters."""
        return max(self.layers.values(), key=lambda layer: (layer.routed, layer.beside))


def _layers(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, MoeLayer]:
    usual = getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None) or USUAL_TOP_K
    layers = {}
    for name, layer in checkpoint.layout.layers.items():
        module = model.get_submodule(name)
        routed, whole = _count(module), _count(model.get_submodule(block_of(name)))
        width = down_weight(module, 0).shape[-1]
        layers[name] = MoeLayer(layer.experts, layer.top_k or usual, routed // layer.experts, whole - routed, width)
    return layers


def _pruned(layer: MoeLayer, planned: LayerPlan) -> MoeLayer:
    if planned.condensed is None:
        return replace(layer, experts=len(planned.keep))
    return replace(layer, experts=0, beside=layer.beside + len(planned.keep) * layer.per_expert)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
