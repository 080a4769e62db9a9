"""Layer-local distillation: each pruned MoE block learns to give what the original block gives for the same input.

The teacher's activations are the inputs of every block, so no gradient crosses a layer, the student never runs as a
whole, and all blocks learn from one forward pass of the teacher. What trains are the experts that stayed and the
router's rows; the rest of the model stays as it is, bit for bit.

Axes: B blocks of text in a batch, S tokens in each, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moeprune.errors import InputError

HELD_OUT_SHARE = 1 / 8
_EXPERTS_AXES = 3


@dataclass(frozen=True)
class Distilled:
    """What distillation did.

    Attributes:
        error_before, error_after: layer name -> relative squared error of the pruned block's output on held-out tokens,
            before and after. A block that did not get better has been put back to what it was, and both are equal.
        curve: mean training error over layers, one number per step.
        parameters: the trained parameters, by the student's own names.
    """

    error_before: dict[str, float]
    error_after: dict[str, float]
    curve: list[float]
    parameters: dict[str, torch.Tensor]


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    trainable: dict[str, list[str]],
    ids_BS: torch.Tensor,
    *,
    learning_rate: float = 1e-3,
    batch_blocks: int = 8,
    epochs: int = 1,
    keep_zeros: bool = False,
    on_step: Callable[[int, int, float], None] = lambda done, total, error: None,
) -> Distilled:
    """Train the student's MoE blocks, in place.

    The loss of a layer is the squared error of its output relative to the variance of the teacher's, so that layers
    weigh alike. AdamW, the learning rate falling from its peak to zero as a cosine.

    Args:
        teacher, student: on the same device; the student in float32.
        trainable: name of the experts module -> the student's parameters that learn there.
        ids_BS: token ids; an eighth of the blocks is held out to tell whether a layer got better.
        learning_rate: peak.
        batch_blocks: blocks per step.
        epochs: times that every block is seen.
        keep_zeros: whether weights of the experts that are zero stay so.
        on_step: called with steps done, steps in all, and the mean training error.

    Raises:
        InputError: too little data to hold something out, or training diverged.
    """
    held = max(1, int(len(ids_BS) * HELD_OUT_SHARE))
    if len(ids_BS) <= held:
        raise InputError(f"distillation needs at least 2 blocks of text, not {len(ids_BS)}")
    train_BS, held_BS = ids_BS[:-held], ids_BS[-held:]
    layers = list(trainable)
    blocks = {name: student.get_submodule(_block_of(name)) for name in layers}
    student.requires_grad_(False)
    learning = {name: [student.get_parameter(parameter) for parameter in trainable[name]] for name in layers}
    original = {name: [parameter.detach().clone() for parameter in learning[name]] for name in layers}
    for parameters in learning.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
            if keep_zeros and parameter.dim() == _EXPERTS_AXES:
                parameter.register_hook(partial(torch.Tensor.masked_fill, mask=parameter.detach() == 0, value=0))

    error_before = _held_out_error(teacher, blocks, held_BS, batch_blocks)
    curve = _train(teacher, blocks, learning, train_BS, learning_rate, batch_blocks, epochs, on_step)
    error_after = _held_out_error(teacher, blocks, held_BS, batch_blocks)
    for name in layers:
        if not error_after[name] < error_before[name]:
            error_after[name] = error_before[name]
            with torch.no_grad():
                for parameter, value in zip(learning[name], original[name], strict=True):
                    parameter.copy_(value)
    trained = {name: student.get_parameter(name).detach() for names in trainable.values() for name in names}
    return Distilled(error_before, error_after, curve, trained)


def _train(
    teacher: PreTrainedModel,
    blocks: dict[str, torch.nn.Module],
    learning: dict[str, list[torch.nn.Parameter]],
    ids_BS: torch.Tensor,
    learning_rate: float,
    batch_blocks: int,
    epochs: int,
    on_step: Callable[[int, int, float], None],
) -> list[float]:
    parameters = [parameter for in_layer in learning.values() for parameter in in_layer]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = [batch for _ in range(epochs) for batch in ids_BS.split(batch_blocks)]
    curve: list[float] = []
    for step, batch_BS in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / len(batches)))
        errors = []
        for name, error in _errors(teacher, blocks, batch_BS):
            if not torch.isfinite(error):
                raise InputError(
                    f"distillation diverged in {name} at step {step}; lower the learning rate (now {learning_rate:g})"
                )
            error.backward()  # layer by layer: only one block's graph is ever in memory
            errors.append(error.item())
        for in_layer in learning.values():
            torch.nn.utils.clip_grad_norm_(in_layer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append(sum(errors) / len(errors))
        on_step(step, len(batches), curve[-1])
    return curve


@torch.no_grad()
def _held_out_error(
    teacher: PreTrainedModel, blocks: dict[str, torch.nn.Module], ids_BS: torch.Tensor, batch_blocks: int
) -> dict[str, float]:
    batches = ids_BS.split(batch_blocks)
    total = dict.fromkeys(blocks, 0.0)
    for batch_BS in batches:
        for name, error in _errors(teacher, blocks, batch_BS):
            total[name] += error.item() * len(batch_BS) / len(ids_BS)
    return total


def _errors(
    teacher: PreTrainedModel, blocks: dict[str, torch.nn.Module], ids_BS: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each layer's relative squared error on one batch."""
    seen: dict[str, _BlockCall] = {}
    with torch.no_grad(), _capture(teacher, list(blocks), seen):
        teacher(input_ids=ids_BS.to(teacher.device), use_cache=False)
    for name, block in blocks.items():
        call = seen.pop(name)  # frees the activations as the layers are done
        args, kwargs = call.as_dtype(next(block.parameters()).dtype)
        output = _first(block(*args, **kwargs)).float()
        target = call.output.float()
        yield name, torch.nn.functional.mse_loss(output, target) / target.var().clamp_min(1e-12)


@dataclass(frozen=True)
class _BlockCall:
    args: tuple
    kwargs: dict
    output: torch.Tensor

    def as_dtype(self, dtype: torch.dtype) -> tuple[tuple, dict]:
        """The arguments for a student of another precision than the teacher's."""

        def convert(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tuple(map(convert, self.args)), {key: convert(value) for key, value in self.kwargs.items()}


@contextmanager
def _capture(model: PreTrainedModel, layers: list[str], into: dict[str, _BlockCall]) -> Iterator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> None:
            into[name] = _BlockCall(args, kwargs, _first(output))

        return hook

    handles = [
        model.get_submodule(_block_of(name)).register_forward_hook(hook_for(name), with_kwargs=True) for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block_of(experts_module: str) -> str:
    return experts_module.rpartition(".")[0]


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    """A block's hidden states; some families' blocks give the router's logits beside them."""
    return output[0] if isinstance(output, tuple) else output
