"""One process's share of a training, from the job to the weights that were learnt."""

from __future__ import annotations

import fcntl
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from moeprune.atomic import write_beside
from moeprune.checkpoint.loading import Checkpoint, default_dtype
from moeprune.distillation.end_to_end.inner import watching
from moeprune.distillation.end_to_end.job import Job
from moeprune.distillation.end_to_end.keeping import Keeping
from moeprune.distillation.end_to_end.lora import add_lora
from moeprune.distillation.end_to_end.modes import learn_as_used
from moeprune.distillation.end_to_end.teacher import Teacher, Top, run
from moeprune.distillation.end_to_end.teacher_cache import ROWS_PER_FILE, TeacherCache
from moeprune.distillation.end_to_end.telling import Event, Listener, Telling
from moeprune.distillation.end_to_end.trainer import (
    HELD_OUT,
    DistillationTrainer,
    DivergedError,
    Rows,
    SaveWhenJudged,
)
from moeprune.distillation.parts import trainable
from moeprune.distillation.text import Text
from moeprune.distillation.zeros import has_zeros
from moeprune.errors import InputError
from moeprune.plan import Plan

_MEASURED_ROWS = 8
_LARGEST_NORM = 1.0
_LOGS = 200  # of a training, so that its curve is one and not a wall
_OUTCOME_NAME = "outcome.json"


class Outcome(BaseModel):
    """What a training came to.

    Attributes:
        before, after: the held-out loss of the pruned model and of the best state; equal where nothing got better.
        curve: step -> training loss.
        held_out: step -> held-out loss.
        tokens_per_second: learnt from.
        reason: why it ended before its last step, in words; empty where it did not.
    """

    before: float
    after: float
    curve: dict[int, float]
    held_out: dict[int, float]
    tokens_per_second: float
    reason: str = ""

    @property
    def better(self) -> bool:
        return self.after < self.before

    @classmethod
    def of(cls, directory: Path) -> Outcome | None:
        """Of the training in a directory; None while it has not ended."""
        path = directory / _OUTCOME_NAME
        return cls.model_validate_json(path.read_text()) if path.is_file() else None


def train(job: Job, listener: Listener) -> Outcome:
    """Do this process's share of a job, going on from the last state that is whole.

    Where there are several processes, they were started by `torchrun`, all with the same job.

    Returns:
        What it came to; the weights are `Keeping.best`, where they got better.

    Raises:
        InputError: it diverged before anything got better, or the job asks for what cannot be.
    """
    text, plan, asks = job.text(), Plan.load(job.plan), job.asks
    original = Checkpoint(job.teacher, job.trust_remote_code)
    args = _arguments(job, text)
    with _alone(job, args):
        if outcome := Outcome.of(job.directory):
            return outcome
        set_seed(job.training.seed)
        compares_layers = bool(asks.experts or asks.block)
        cached = bool(asks.logits) and job.training.teacher_outputs == "cached" and not compares_layers
        cache = TeacherCache(job.teacher_directory, len(text.rows())) if cached else None
        if cache:
            _write_cache(cache, original, job, text, args, listener)
        beside = (
            None if cache or not (asks.logits or compares_layers) else _load(original, default_dtype(args.device), args)
        )
        student = _load(Checkpoint(job.student, job.trust_remote_code), torch.float32, args)
        sparse = choose_what_learns(student, job, plan, original)
        learn_as_used(student)
        keeping = Keeping(job.directory / "states")
        layers = list(plan.layers)
        with watching(student, layers, experts=bool(asks.experts), blocks=bool(asks.block)) as inner:
            teacher = Teacher(beside, asks, plan) if beside is not None else None
            if teacher and compares_layers:
                teacher.measure(text.train_BS[:_MEASURED_ROWS].to(args.device))
            trainer = DistillationTrainer(
                student,
                asks,
                inner,
                teacher,
                Rows(text.train_BS, cache, 0),
                Rows(text.held_out_BS, cache, len(text.train_BS)),
                sparse=sparse,
                keeping=keeping,
                args=args,
                callbacks=[
                    Telling(listener, job.training.batch_blocks * text.train_BS.shape[1]),
                    EarlyStoppingCallback(job.training.patience),
                    SaveWhenJudged(),
                ],
            )
            trainer.remove_callback(PrinterCallback)
            return _run(trainer, job, keeping, args)


def choose_what_learns(student: PreTrainedModel, job: Job, plan: Plan, original: Checkpoint) -> list[str]:
    """Let the job's parts learn and nothing else, LoRA's additions put beside the weights where it asks for them.

    Returns:
        The names of the parameters whose zeros stay.
    """
    student.requires_grad_(False)
    parts = set(job.parts)
    names = [name for name, _ in student.named_parameters()]
    chosen = trainable(parts - {"lora"}, plan, original.layout, names) if parts - {"lora"} else {}
    learning = {name: student.get_parameter(name) for names in chosen.values() for name in names}
    # Where they are sparse, LoRA leaves the experts alone, and so their names.
    sparse = [name for layer, names in chosen.items() for name in names if has_zeros(plan, layer, name, learning[name])]
    if "lora" in parts:
        add_lora(student, job.training.lora_rank, experts=plan.sparsity is None)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    return sparse


def _arguments(job: Job, text: Text) -> TrainingArguments:
    training, rows = job.training, len(text.train_BS)
    passes = job.processes * training.accumulation
    training.refuse_uneven_shares(rows, job.processes)
    steps = rows // training.batch_blocks * training.epochs
    between = max(1, math.ceil(steps / training.evaluations))
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(job.directory / "states"),
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * steps),
        weight_decay=0.0,
        max_grad_norm=_LARGEST_NORM,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_blocks // passes,
        per_device_eval_batch_size=training.batch_blocks // passes,
        gradient_accumulation_steps=training.accumulation,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=training.precision == "bfloat16" or (training.precision == "auto" and on_gpu),
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu or job.processes == 1 else "gloo",
        dataloader_drop_last=True,  # every step is of as many blocks, in however many processes
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        seed=training.seed,
        data_seed=training.seed,
        eval_strategy="steps",
        eval_steps=between,
        eval_on_start=Keeping(job.directory / "states").last is None,
        metric_for_best_model=HELD_OUT,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # how many evaluations were in vain
        save_strategy="no",  # but with every evaluation (`SaveWhenJudged`)
        logging_steps=math.ceil(steps / _LOGS),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )


@contextmanager
def _alone(job: Job, args: TrainingArguments) -> Iterator[None]:
    """Wait until no process of an earlier attempt at this job, of which nobody may know any more, is at it."""
    if args.process_index:
        yield
        return
    with (job.directory / "training.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks, where it is the user who takes care
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(source: Checkpoint, dtype: torch.dtype, args: TrainingArguments) -> PreTrainedModel:
    """In one process the whole model; in several, each loads its shard of it (FSDP2)."""
    if args.world_size == 1:
        return source.load(dtype, args.device)
    half = dtype == torch.float32 and args.bf16
    return source.load(
        dtype,
        args.device,
        DistributedConfig(fsdp_size=args.world_size, fsdp_plan=_gathered(source), fsdp_mixed_precision=half),
    )


def _gathered(source: Checkpoint) -> dict[str, str]:
    """What is gathered at a time, in the words of transformers: a layer, which is let go again after its pass."""
    layers = {re.sub(r"\.\d+\..*", ".*", name) for name in source.experts_per_layer}
    return dict.fromkeys(layers, "free_full_weight")


@torch.no_grad()
def _write_cache(
    cache: TeacherCache, original: Checkpoint, job: Job, text: Text, args: TrainingArguments, listener: Listener
) -> None:
    """Have the teacher run all of the text that it has not run yet; each process takes every so manieth file."""
    asks, ids_BS, size = job.asks, text.rows(), args.per_device_eval_batch_size
    missing = cache.missing
    _wait_for_all(args)
    if not missing:
        return
    cache.refuse_without_room(ids_BS.shape[1], asks.teacher_top)
    teacher = _load(original, default_dtype(args.device), args)
    turns = math.ceil(len(missing) / args.world_size)
    for turn in range(turns):
        mine = missing[turn * args.world_size :][args.process_index : args.process_index + 1]
        # Sharded, the teacher runs in all processes at once, as often in each.
        wanted = torch.tensor([row for rows in mine for row in rows], dtype=torch.int64)
        rows_B = torch.cat([wanted, wanted.new_zeros(ROWS_PER_FILE - len(wanted))])
        tops = [Top.of(run(teacher, ids_BS[some].to(args.device), logits=True), asks) for some in rows_B.split(size)]
        for rows in mine:
            cache.write(rows, tops)
        if not args.process_index:
            listener(Event(doing="teacher", done=turn + 1, total=turns))
    _wait_for_all(args)


def _wait_for_all(args: TrainingArguments) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()


def _run(trainer: DistillationTrainer, job: Job, keeping: Keeping, args: TrainingArguments) -> Outcome:
    last = keeping.last
    if args.should_save:
        keeping.remove_but(last)
    reason = ""
    try:
        if last is not None and (ended := _ended(last, job.training.patience)):
            trainer.state = ended
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.state.global_step < trainer.state.max_steps:
            reason = (
                f"the held-out loss got no better in {job.training.patience} evaluations, the last after step "
                f"{trainer.state.global_step} of {trainer.state.max_steps}"
            )
    except DivergedError as error:
        rate = trainer.lr_scheduler.get_last_lr()[0]
        reason = f"training diverged at step {error.step}, where the learning rate was {rate:.2g}"
    history = trainer.state.log_history
    held_out = {entry["step"]: entry[HELD_OUT] for entry in history if HELD_OUT in entry}
    before, after = held_out.get(0, math.nan), trainer.state.best_metric
    if reason.startswith("training diverged") and not (after is not None and after < before):
        raise InputError(f"{reason}, before anything had got better; lower it")
    speeds = [entry["throughput_tokens_per_second"] for entry in history if "throughput_tokens_per_second" in entry]
    outcome = Outcome(
        before=before,
        after=after,
        curve={entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        held_out=held_out,
        tokens_per_second=speeds[-1] if speeds else 0.0,
        reason=reason,
    )
    if args.should_save:
        with write_beside(job.directory / _OUTCOME_NAME) as beside:
            beside.write_text(outcome.model_dump_json(indent=1))
    return outcome


def _ended(last: Path, patience: int) -> TrainerState | None:
    """The state of a training that was killed between its last step and the word of it; None for any other."""
    state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
    in_vain = state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
    return state if in_vain >= patience or state.global_step >= state.max_steps else None
