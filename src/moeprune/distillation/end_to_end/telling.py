"""What a training says of itself while it runs: how far it is, and its curves.

It is said as events, to whoever listens: the process that started it, which shows a bar and tells MLflow. Where that is
another process, the events lie in a file in between.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moeprune.peak_memory import peak_memory_bytes

_EVENTS_NAME = "events.jsonl"
LAUNCHER_VARIABLE = "MOEPRUNE_LAUNCHER"

_METRICS = {
    "loss": "training_loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "throughput_tokens_per_second": "throughput_tokens_per_second",
    "peak_memory_bytes": "peak_memory_bytes",
}


class Event(BaseModel):
    """Something that happened.

    Attributes:
        doing: `teacher` while its outputs are written, `train` after that.
        done, total: of what is being done; 0 in all where the event is about something else.
        metrics: by the names that MLflow gets, with the step they are of.
        note: a sentence for the user.
    """

    doing: Literal["teacher", "train"] = "train"
    done: int = 0
    total: int = 0
    metrics: dict[str, float] = {}
    step: int = 0
    note: str = ""


Listener = Callable[[Event], None]


class EventFile:
    """Events on their way from one process to another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    @classmethod
    def of(cls, directory: Path) -> EventFile:
        """Of the job in a directory."""
        return cls(directory / _EVENTS_NAME)

    def clear(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")
        self._read = 0

    def write(self, event: Event) -> None:
        with self._path.open("a") as file:
            file.write(event.model_dump_json(exclude_defaults=True) + "\n")

    def new(self) -> Iterator[Event]:
        """Those that were written since it was asked last."""
        with self._path.open() as file:
            file.seek(self._read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):  # it is being written
                    return
                self._read = file.tell()
                yield Event.model_validate(json.loads(line))


class Telling(TrainerCallback):
    """Tells a listener of what Trainer does; ends the process when whoever started it is gone."""

    def __init__(self, listener: Listener, tokens_per_step: int) -> None:
        self._listener, self._tokens = listener, tokens_per_step
        self._started, self._first = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            for logs in state.log_history:
                self._tell(logs, logs["step"])
            if state.global_step:
                self._listener(Event(note=f"going on after step {state.global_step} of {state.max_steps}"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        launcher = os.environ.get(LAUNCHER_VARIABLE)
        if launcher and not _is_alive(int(launcher)):
            os._exit(1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._listener(Event(done=state.global_step, total=state.max_steps))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            if "loss" in logs:
                done = state.global_step - self._first
                measured = {
                    "throughput_tokens_per_second": done * self._tokens / (time.monotonic() - self._started),
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                state.log_history[-1].update(measured)
                logs = logs | measured
            self._tell(logs, state.global_step)

    def _tell(self, logs: dict[str, float], step: int) -> None:
        named = {_METRICS[key]: value for key, value in logs.items() if key in _METRICS}
        named |= {key.replace("eval_", "held_out_", 1): value for key, value in logs.items() if key.startswith("eval_")}
        if named:
            self._listener(Event(metrics=named, step=step))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
