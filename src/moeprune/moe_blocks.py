"""What an MoE block is made of, found by experiment: routed experts, and perhaps a shared one that all tokens take.

A block is the module that holds a layer's routed experts. Which of its other modules is the shared expert, and which
weight of an MLP does what, is not read from names: the module is run on a few small random numbers in place of its
weights, and is a gated MLP where it computes what one does.

Axes: B sequences, S tokens of a sequence, T tokens, H hidden size, I expert width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import PreTrainedModel

from moeprune.checkpoint.layout import experts_modules
from moeprune.errors import InputError
from moeprune.statistics.observer import ExpertsCall, intercept

Activation = Callable[[torch.Tensor], torch.Tensor]

_TINY_HIDDEN, _TINY_WIDTH, _TINY_TOKENS = 6, 4, 5
_GATED_MLP_WEIGHTS, _WEIGHT_AXES = 3, 2
_CLOSE = 1e-3  # of the output's norm: what rounding makes of it, in bfloat16 too when summed over many


@dataclass(frozen=True)
class GatedMlp:
    """The weights of a module that computes `down(act(gate x) * up x)`, by their names in it."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class MoeBlock:
    """One layer's block.

    Attributes:
        experts: name of the experts module in the model.
        shared: name of the shared expert's module in the block; None where there is none.
        shared_mlp: its weights.
    """

    experts: str
    shared: str | None
    shared_mlp: GatedMlp | None

    @property
    def name(self) -> str:
        return block_of(self.experts)


@dataclass(frozen=True)
class Parts:
    """What a block adds up to for some tokens.

    Attributes:
        shared_TH: what the shared expert puts out, as the block scales it; None where there is none.
        scale_T: by what it scales it, which may differ from token to token.
    """

    shared_TH: torch.Tensor | None
    scale_T: torch.Tensor | None


def block_of(experts: str) -> str:
    """The name of the block that holds an experts module."""
    return experts.rpartition(".")[0]


def hidden_states(output: torch.Tensor | Sequence[Any]) -> torch.Tensor:
    """What a block puts out, `[..., H]`; some families' blocks give the router's logits beside it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def find_block(model: torch.nn.Module, experts: str) -> MoeBlock:
    """The block of an experts module, in a model with or without weights.

    Raises:
        InputError: the experts are none that a dense gated MLP could stand for.
    """
    module = experts_modules(model)[experts]
    if reason := _not_gated_mlps(module):
        raise InputError(f"{experts} cannot be condensed into a dense layer: {reason}")
    block = model.get_submodule(block_of(experts))
    found = {
        name: mlp
        for name, child in block.named_children()
        if child is not module and (mlp := as_gated_mlp(child, cast(Activation, module.act_fn))) is not None
    }
    if len(found) > 1:
        raise InputError(
            f"{experts} cannot be condensed into a dense layer: beside it are several dense ones ({', '.join(found)})"
        )
    shared, mlp = next(iter(found.items()), (None, None))
    return MoeBlock(experts, shared, mlp)


def as_gated_mlp(module: torch.nn.Module, act: Activation) -> GatedMlp | None:
    """The weights of a gated MLP with this activation, by what they do; None where the module is something else."""
    names = [name for name, _ in module.named_parameters()]
    if len(names) != _GATED_MLP_WEIGHTS or any(parameter.dim() != _WEIGHT_AXES for parameter in module.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(_TINY_TOKENS, _TINY_HIDDEN, generator=generator)
    gate_IH, up_IH = torch.randn(2, _TINY_WIDTH, _TINY_HIDDEN, generator=generator)
    down_HI = torch.randn(_TINY_HIDDEN, _TINY_WIDTH, generator=generator)
    expected_TH = linear(act(linear(x_TH, gate_IH)) * linear(x_TH, up_IH), down_HI)
    for gate, up, down in permutations(names):
        try:
            out_TH = functional_call(module, {gate: gate_IH, up: up_IH, down: down_HI}, (x_TH,))
        except Exception:  # weights in each other's places, or no MLP at all: it may fail in any way it likes
            continue
        if isinstance(out_TH, torch.Tensor) and torch.allclose(out_TH, expected_TH, rtol=1e-4, atol=1e-5):
            return GatedMlp(gate, up, down)
    return None


def _not_gated_mlps(module: torch.nn.Module) -> str | None:
    """Why an experts module's experts are not gated MLPs, if they are not."""
    if not module.has_gate:
        return "its experts have no gate"
    if module.has_bias:
        return "its experts have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    up_TI, gate_TI = torch.randn(2, _TINY_TOKENS, _TINY_WIDTH, generator=torch.Generator().manual_seed(0))
    both = [gate_TI, up_TI]
    gate_up = torch.cat(both, dim=-1) if module.is_concatenated else torch.stack(both, dim=-1).flatten(-2)
    try:
        found_TI = cast(Activation, module._apply_gate)(gate_up)
        is_product = torch.allclose(found_TI, cast(Activation, module.act_fn)(gate_TI) * up_TI, rtol=1e-4, atol=1e-5)
    except (AttributeError, TypeError, RuntimeError):  # its activation is not a function of the gate alone
        is_product = False
    return None if is_product else "its experts do more to gate and up than to multiply them"


@torch.inference_mode()
def take_apart(model: PreTrainedModel, block: MoeBlock, x_TH: torch.Tensor) -> Parts:
    """Run a block without its routed experts, and see that it only adds to what they put out.

    Args:
        model: the block's weights are in memory; those of its experts need not be.
        x_TH: inputs of the block.

    Raises:
        InputError: the block is not a sum of routed and shared experts on its own input.
    """
    module = model.get_submodule(block.name)
    routed_TH = torch.randn(x_TH.shape, generator=torch.Generator().manual_seed(0)).to(x_TH) * x_TH.std()
    seen, unscaled = [], []

    def run(answer_TH: torch.Tensor) -> torch.Tensor:
        def answer(call: ExpertsCall) -> torch.Tensor:
            seen.append(call.x_TH)
            return answer_TH.to(call.x_TH.dtype).view_as(call.x_TH)

        with intercept(model, answer):
            out = module(x_TH[None])
        if not isinstance(out, torch.Tensor):
            raise _refusal(block, "its block gives more than hidden states")
        return out.view_as(x_TH)

    shared = module.get_submodule(block.shared) if block.shared else None
    hook = shared.register_forward_hook(lambda _, __, out: unscaled.append(out.view_as(x_TH))) if shared else None
    try:
        alone_TH, with_routed_TH = run(torch.zeros_like(x_TH)), run(routed_TH)
    except InputError:
        raise
    except Exception as error:  # it misses what it is not given in any way it likes
        raise _refusal(block, "its block takes more than hidden states") from error
    finally:
        if hook:
            hook.remove()
    if not all(_is_close(x, x_TH) for x in seen):
        raise _refusal(block, "its experts are given something else than the input of their block")
    if not _is_close(with_routed_TH.float() - alone_TH.float(), routed_TH.float(), beside=with_routed_TH):
        raise _refusal(block, "its block does more to their output than to add to it")
    if shared is None:
        if alone_TH.any():
            raise _refusal(block, "its block adds something to their output that is no gated MLP")
        return Parts(None, None)
    output_TH = unscaled[0].float()
    scale_T = (alone_TH.float() * output_TH).sum(-1) / output_TH.square().sum(-1).clamp_min(1e-30)
    if not _is_close(scale_T[:, None] * output_TH, alone_TH.float()):
        raise _refusal(block, "its block does more to its shared expert's output than to scale it")
    return Parts(alone_TH, scale_T)


def _is_close(found: torch.Tensor, expected: torch.Tensor, beside: torch.Tensor | None = None) -> bool:
    """Whether they are equal but for rounding, which is as large as what was `beside` them in a sum."""
    size = (expected if beside is None else beside).float().norm()
    rounding = max(_CLOSE, 4 * torch.finfo(expected.dtype if beside is None else beside.dtype).eps)
    return bool((found.float().reshape(expected.shape) - expected.float()).norm() <= rounding * size)


def _refusal(block: MoeBlock, reason: str) -> InputError:
    return InputError(f"{block.experts} cannot be condensed into a dense layer: {reason}")
