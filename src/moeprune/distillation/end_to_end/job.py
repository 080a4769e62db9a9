"""What a training is told: enough for every process of it, on whatever machine, to do its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from moeprune.atomic import write_beside
from moeprune.distillation.objective import Objective
from moeprune.distillation.text import Text
from moeprune.errors import InputError
from moeprune.validation import complaint

_JOB_NAME = "job.json"
_TEXT_NAME = "text.safetensors"


class Training(BaseModel):
    """How it is trained. Every description is the option's help.

    Raises:
        ValidationError: a number that makes no sense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-4, gt=0, description="its peak, from which it falls to 0 as a cosine")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    epochs: int = Field(1, ge=1, description="times that each block is seen, at most")
    batch_blocks: int = Field(8, ge=1, description="blocks per step of the optimizer, over all processes")
    accumulation: int = Field(1, ge=1, description="passes that a process's share of a step is done in")
    evaluations: int = Field(10, ge=1, description="times that the held-out loss is measured, and a state kept")
    patience: int = Field(3, ge=1, description="evaluations without improvement after which training stops")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again for the backward pass instead of keeping them"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the passes; weights learn in float32. auto: bfloat16 on a GPU, float32 on a CPU"
    )
    teacher_outputs: Literal["computed", "cached"] = Field(
        "computed",
        description="computed: the teacher runs beside the student; cached: its most probable tokens are written to "
        "disk first, and it is not in memory while the student learns",
    )
    lora_rank: int = Field(16, ge=1, description="of what LoRA adds to a weight")
    seed: int = Field(0, description="of the order of the blocks and of LoRA's beginning")
    processes: int = Field(1, ge=1, description="processes that share the model and the work on this machine (FSDP2)")

    def refuse_uneven_shares(self, rows: int, processes: int) -> None:
        """Raise InputError where a step's blocks cannot be divided, or there are not so many."""
        passes = processes * self.accumulation
        if self.batch_blocks % passes:
            raise InputError(
                f"{self.batch_blocks} blocks per step cannot be shared by {processes} processes in {self.accumulation} "
                f"passes each; give a multiple of {passes}"
            )
        if self.batch_blocks > rows:
            raise InputError(
                f"a step takes {self.batch_blocks} blocks, and there are {rows} to learn from; give more text or "
                "smaller steps"
            )

    @classmethod
    def of(cls, **options: Any) -> Training:
        """Raises InputError, with the option's name, for one that makes no sense."""
        try:
            return cls(**options)
        except ValidationError as error:
            where, wrong = complaint(error)
            raise InputError(f"{where or 'the training'}: {wrong}") from error


class Job(BaseModel):
    """One training.

    Attributes:
        teacher, student: checkpoint directories.
        plan: file of the Plan that made the student.
        directory: where everything that the training writes lies; all processes can read it.
        objective: as `Objective.parse` reads it.
        parts: what learns (`distillation.parts`).
        processes: how many there are in all, over all machines.
    """

    model_config = ConfigDict(extra="forbid")

    teacher: Path
    student: Path
    plan: Path
    directory: Path
    objective: str
    parts: list[str]
    training: Training
    processes: int
    trust_remote_code: bool = False

    @property
    def asks(self) -> Objective:
        return Objective.parse(self.objective)

    @property
    def teacher_directory(self) -> Path:
        """Where the teacher's outputs are kept."""
        return self.directory / "teacher"

    def save(self, text: Text) -> None:
        """Write down the job and its text for the processes to find in its directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with write_beside(self.directory / _TEXT_NAME) as beside:
            save_file({"train": text.train_BS.contiguous(), "held_out": text.held_out_BS.contiguous()}, beside)
        with write_beside(self.directory / _JOB_NAME) as beside:
            beside.write_text(self.model_dump_json(indent=1))

    @classmethod
    def load(cls, directory: Path) -> Job:
        """Raises InputError where there is none."""
        try:
            return cls.model_validate_json((directory / _JOB_NAME).read_text())
        except (OSError, ValidationError) as error:
            raise InputError(f"{directory} holds no training that could be run: {error}") from error

    def text(self) -> Text:
        stored = load_file(self.directory / _TEXT_NAME)
        return Text(stored["train"], stored["held_out"])
