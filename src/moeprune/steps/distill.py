"""distill: teacher and pruned student -> recovered student."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moeprune import places, tracking
from moeprune.atomic import build_beside, refuse_to_overwrite, work_towards
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.layer_local import learnt
from moeprune.distillation.layer_local.job import Job
from moeprune.distillation.layer_local.layers import Trained, train_layers
from moeprune.distillation.layer_local.learn import rate_at, steps_of
from moeprune.distillation.layer_local.learnt import LayerLearnt
from moeprune.distillation.layer_local.part import Part, layers_of_part, write
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.objective import DEFAULT, Objective
from moeprune.distillation.parts import default_parts, parse_parts_of_a_layer, trainable
from moeprune.peak_memory import peak_memory_bytes
from moeprune.progress import note, progress
from moeprune.s3_work import S3Work
from moeprune.steps import machine
from moeprune.steps.distillation_inputs import read_fitting
from moeprune.streaming.room import parse_bytes
from moeprune.tracking import TrackedRun


@dataclass(frozen=True)
class Distilled:
    """What layer-local distillation did.

    Attributes:
        layers: how each layer's training went, those of earlier calls that were interrupted included.
    """

    layers: list[LayerLearnt]

    @property
    def steps(self) -> int:
        """Of the optimizer, over all of them."""
        return sum(len(layer.curve) for layer in self.layers)

    @property
    def error_before(self) -> float:
        """Mean over layers, on text held out."""
        return sum(layer.before for layer in self.layers) / max(1, len(self.layers))

    @property
    def error_after(self) -> float:
        return sum(layer.after for layer in self.layers) / max(1, len(self.layers))


def distill(
    teacher: str,
    student: str,
    plan: str,
    data: str,
    out: str,
    *,
    objective: str = str(DEFAULT),
    train: str = "",
    text_field: str = "text",
    block_tokens: int = 256,
    max_blocks: int = 384,
    batch_blocks: int = Settings.batch_blocks,
    learning_rate: float = Settings.learning_rate,
    epochs: int = Settings.epochs,
    seed: int = Settings.seed,
    part: int = 0,
    parts: int = 0,
    memory_limit: str | None = None,
    work: str | None = None,
    trust_remote_code: bool = False,
) -> Distilled:
    """Win back what pruning lost, layer by layer, and put the recovered checkpoint at `out`. See `distillation`.

    Interrupted in whatever way, the same call goes on after the last layer that was finished.

    Args:
        objective: what the student is asked for (`Objective.parse`).
        train: what learns (`parts.parse_parts`); by default what the plan left of experts and routers.
        learning_rate, epochs, batch_blocks, seed: see `Settings`.
        part, parts: train every `parts`-th layer, from the `part`-th on, and put what they have learnt at `out`, for
            `merge_distilled`. With 0 parts, all layers are trained and the checkpoint is written.
        memory_limit: a size such as `2GiB` that the process keeps to.
        work: directory or s3:// address below which finished layers are kept on the way; by default beside `out`.

    Raises:
        InputError: plan, teacher, student and tokenizers do not fit together, or nothing can be learnt as asked for.
    """
    machine.quieten()
    settings = Settings(Objective.parse(objective), learning_rate, epochs, batch_blocks, seed)
    chosen = parse_parts_of_a_layer(train) if train else None
    limit = parse_bytes(memory_limit) if memory_limit else None
    params = {
        "teacher": places.origin(teacher),
        "data": data,
        "block_tokens": block_tokens,
        "max_blocks": max_blocks,
        "train": train or "default",
        "memory_limit": memory_limit or "none",
        **({"layers": f"{part}/{parts}"} if parts else {}),
        **asdict(settings),
        "objective": str(settings.objective),
    }
    with (
        tracking.step("distill", params | machine.describe()) as run,
        places.output(out) as path,
        places.local_file(plan) as plan_path,
        _pair(teacher, student, trust_remote_code) as (original, pruned),
    ):
        refuse_to_overwrite(path)
        decided, text = read_fitting(
            run,
            original,
            pruned,
            plan_path,
            data,
            block_tokens=block_tokens,
            max_blocks=max_blocks,
            text_field=text_field,
        )
        names = [name for name, _ in pruned.without_weights().named_parameters()]
        learning = trainable(chosen or default_parts(decided), decided, original.layout, names)
        job = Job(original, pruned, decided, learning, text, settings)
        mine = layers_of_part(list(learning), part, parts) if parts else list(learning)
        name = job.name() + (f"-{part}-of-{parts}" if parts else "")
        remote = S3Work(f"{work}/{name}") if work and places.is_remote(work) else None
        with work_towards(path, name, Path(work) if work and not remote else None) as kept:
            if remote:
                remote.fetch(kept)
            made = _train(run, replace(job, learning={layer: learning[layer] for layer in mine}), kept, limit, remote)
            with build_beside(path) as beside:
                if parts:
                    Part.of(job).save(beside)
                    learnt.copy_all(kept, beside)
                else:
                    write(pruned, dict.fromkeys(mine, kept), beside)
        _warn(made, path, whole=not parts)
    if remote:
        remote.forget()  # not before the outcome is where it belongs
    return Distilled(made)


@contextmanager
def _pair(teacher: str, student: str, trust_remote_code: bool) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Teacher, whose weights stay where they are until a layer is brought in, and student."""
    with places.streamed_model(teacher) as (directory, weights), places.local_model(student) as student_directory:
        yield Checkpoint(directory, trust_remote_code, weights), Checkpoint(student_directory, trust_remote_code)


def _train(
    run: TrackedRun, job: Job, directory: Path, memory_limit: int | None, remote: S3Work | None
) -> list[LayerLearnt]:
    """Train what has not been trained, and tell the run of all."""
    numbers = {layer: number for number, layer in enumerate(job.learning)}
    before = [found for layer in job.learning if (found := learnt.load(directory, layer))]
    if before:
        note(f"{len(before)} of {len(job.learning)} layers were trained by an earlier call, and are kept")
    for layer in before:
        _tell_of_layer(run, numbers[layer.layer], layer)
    steps = steps_of(job.settings, len(job.text.train_BS))
    run.curve("learning_rate", [job.settings.learning_rate * rate_at(step, steps) for step in range(steps)])
    started = time.monotonic()

    def tell(trained: Trained) -> None:
        if remote:
            remote.keep(directory)
        number = numbers[trained.learnt.layer]
        _tell_of_layer(run, number, trained.learnt)
        speed = trained.tokens / trained.seconds
        run.metrics({"layer_tokens_per_second": speed, "memory_peak_mb": peak_memory_bytes() / 1e6}, number)

    with progress("distill") as on_step:
        train_layers(job, directory, memory_limit=memory_limit, on_step=on_step, on_layer=tell)
    run.metrics({"seconds": time.monotonic() - started})
    made = [found for layer in job.learning if (found := learnt.load(directory, layer))]
    result = Distilled(made)
    run.metrics({"error_before_share": result.error_before, "error_after_share": result.error_after})
    return made


def _tell_of_layer(run: TrackedRun, number: int, layer: LayerLearnt) -> None:
    run.curve(f"training_error_share/{layer.layer}", layer.curve)
    run.metrics({"layer_error_before_share": layer.before, "layer_error_after_share": layer.after}, number)


def _warn(made: list[LayerLearnt], path: Path, *, whole: bool) -> None:
    """Say which layers got no better, and why."""
    worse: dict[str, list[str]] = defaultdict(list)
    for layer in made:
        if layer.reason:
            worse[layer.reason].append(layer.layer)
    for reason, layers in worse.items():
        named = layers[0] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
        note(f"{named} got no better and {'are' if len(layers) > 1 else 'is'} left as pruning left it: {reason}")
    if whole and not any(layer.parameters for layer in made):
        note(f"no layer got better; {path} is the pruned model, unchanged")
