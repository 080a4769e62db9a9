"""Transformers' Trainer with our loss, our held-out loss, and states that hold only what learns.

Axes: B sequences of S tokens; K of the teacher's most probable tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from moeprune.distillation.end_to_end.inner import Inner
from moeprune.distillation.end_to_end.keeping import LEARNT_NAME, Keeping, put_back, whole
from moeprune.distillation.end_to_end.teacher import Teacher, run
from moeprune.distillation.end_to_end.teacher_cache import TeacherCache
from moeprune.distillation.losses import cross_entropy, divergence
from moeprune.distillation.objective import Objective
from moeprune.distillation.zeros import Zeros

_SHARDS = "optimizer"
HELD_OUT = "eval_loss"  # as Trainer and its callbacks call it
Batch = dict[str, torch.Tensor]


class DivergedError(Exception):
    """The gradient or the held-out loss is no number any more. The weights have not heard of such a gradient.

    Attributes:
        step: of the optimizer, at which that was found.
    """

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Rows(Dataset):
    """Some rows of the text, with what the teacher was found to say of them."""

    def __init__(self, ids_BS: torch.Tensor, cache: TeacherCache | None, first: int) -> None:
        self._ids_BS, self._cache, self._first = ids_BS, cache, first

    def __len__(self) -> int:
        return len(self._ids_BS)

    def __getitem__(self, row: int) -> Batch:
        item = {"input_ids": self._ids_BS[row]}
        if self._cache:
            item["top"], item["log_share"] = self._cache[self._first + row]
        return item


def stack(items: list[Batch]) -> Batch:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class DistillationTrainer(Trainer):
    """Trains a student on a weighted sum of errors.

    Every error is a mean over tokens, or rows of as many tokens each, so that neither accumulation nor the number of
    processes changes what is trained.

    Args:
        student: what learns requires gradients, nothing else does.
        inner: what its layers put out (`inner.watching`).
        teacher: the original in memory, where the objective needs more of it than `train` and `held_out` hold.
        sparse: the parameters whose zeros stay.
        keeping: where states go.
    """

    control: TrainerControl

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        inner: Inner,
        teacher: Teacher | None,
        train: Rows,
        held_out: Rows,
        *,
        sparse: list[str],
        keeping: Keeping,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            student, args, train_dataset=train, eval_dataset=held_out, data_collator=stack, callbacks=callbacks
        )
        self.teacher = teacher
        self._objective, self._inner, self._keeping, self._sparse = objective, inner, keeping, sparse
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the rows of one pass
        self.loss_is_scaled_for_ga = False

    # The loss

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._sum(self.errors(model, inputs))

    def errors(self, model: torch.nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """Of one batch, by their names in the objective; they have gradients wherever they are asked for."""
        objective, ids_BS = self._objective, inputs["input_ids"]
        self._inner.forget()
        logits_BSV = run(model, ids_BS, logits=bool(objective.logits or objective.text))
        errors: dict[str, torch.Tensor] = {}
        if self.teacher:
            taught = self.teacher.teach(ids_BS, self._inner)
            errors |= taught.errors
            if taught.top:
                inputs = inputs | {"top": taught.top.index_BSK, "log_share": taught.top.log_share_BSK}
        self._inner.forget()
        if objective.logits:
            errors["logits"] = divergence(
                logits_BSV.flatten(0, 1),
                inputs["top"].flatten(0, 1).long(),
                inputs["log_share"].flatten(0, 1),
                objective.temperature,
            )
        if objective.text:
            errors["text"] = cross_entropy(logits_BSV, ids_BS)
        if objective.layer_local:
            # Sharded layers gather their weights for the backward pass when it comes by their outputs, the last's too.
            errors["anchor"] = logits_BSV.float().mean() * 0
        return errors

    def _sum(self, errors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([getattr(self._objective, name, 1.0) * error for name, error in errors.items()]).sum()

    # Judging

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss and its parts: the mean over all rows, whichever process has them."""
        assert isinstance(self.eval_dataset, Rows)
        model = self.model_wrapped
        model.eval()
        processes, own = self.args.world_size, self.args.process_index
        size, rows = self.args.per_device_eval_batch_size, len(self.eval_dataset)
        mine = list(range(own, rows, processes))
        total: dict[str, torch.Tensor] = {}
        for place in range(0, math.ceil(rows / processes), size):
            some = mine[place : place + size]
            # Sharded, a model runs in all processes at once: who has no rows left runs one that does not count.
            batch = self._prepare_inputs(stack([self.eval_dataset[row] for row in some or [0]]))
            with self.compute_loss_context_manager():
                for name, error in self.errors(model, batch).items():
                    total[name] = total.get(name, torch.zeros((), device=error.device)) + error.float() * len(some)
        if processes > 1:
            total = {name: self.accelerator.reduce(value) for name, value in total.items()}
            # A pass without a backward one leaves some weights gathered, in which no optimizer knows its own again.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        errors = {name: value / rows for name, value in total.items()}
        metrics = {HELD_OUT: self._sum(errors).item()}
        metrics |= {f"eval_{name}": value.item() for name, value in errors.items() if name != "anchor"}
        if not math.isfinite(metrics[HELD_OUT]):
            raise DivergedError(self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.global_step == 0:  # what is to be bettered; no evaluation in vain, as a callback would count it
            self.state.best_metric = metrics[HELD_OUT]
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            learnt = whole(self.model.named_parameters())
            if self.args.should_save:
                self._keeping.keep_best(learnt)
        return is_best

    # The step

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):  # the same in all processes, and before the weights have heard of it
            raise DivergedError(self.state.global_step + 1)
        return norm

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._sparse:
            named = dict(self.model.named_parameters())  # sharded by now
            Zeros(named[name] for name in self._sparse).keep(self.optimizer.optimizer)
        return prepared

    # States

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._keeping.make_whole(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        learnt = whole(self.model.named_parameters())
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_file(learnt, directory / LEARNT_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        put_back(self.model.named_parameters(), load_file(Path(resume_from_checkpoint) / LEARNT_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer)}
        checkpoint.save(state, checkpoint_id=Path(output_dir) / _SHARDS)  # each process its own
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint_dir)
            return
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer)}
        checkpoint.load(state, checkpoint_id=Path(checkpoint_dir) / _SHARDS)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint_dir) / SCHEDULER_NAME, weights_only=True))


class SaveWhenJudged(TrainerCallback):
    """Has a state saved after each evaluation, but for the first, before anything was learnt.

    Trainer itself saves no models that were sharded when they were loaded.
    """

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = state.global_step > 0
