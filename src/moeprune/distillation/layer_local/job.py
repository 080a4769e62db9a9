"""What is to be learnt, from what and how; and a name for it, so that work is never continued as another's.

Axes: B sequences, S tokens of each.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import torch

from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.layer_local.settings import Settings
from moeprune.errors import InputError
from moeprune.plan import Plan
from moeprune.statistics.stats import block_hash

HELD_OUT = 8  # one sequence of so many, and at least one
_VERSION = 1  # another for every change of what a job makes; what another release has begun is then begun anew
_WITNESSES = 256  # values of each tensor by which a student is known


@dataclass(frozen=True)
class Text:
    """What is learnt from.

    Attributes:
        ids_BS: sequences of one length, without padding.
        train, held_out: their numbers. Which are held out is told by what they are, wherever they stand.
    """

    ids_BS: torch.Tensor
    train: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def of(cls, ids_BS: torch.Tensor) -> Text:
        """Raises InputError where there is nothing to hold out, or nothing besides."""
        if len(ids_BS) < 2:
            raise InputError(
                f"the text makes {len(ids_BS)} block of {ids_BS.shape[1]} tokens, and distillation needs at least 2, "
                "one of them to hold out; give more text or shorter blocks"
            )
        by_content = sorted(range(len(ids_BS)), key=lambda row: block_hash(ids_BS[row]))
        held = max(1, len(ids_BS) // HELD_OUT)
        return cls(ids_BS, torch.tensor(by_content[held:]), torch.tensor(by_content[:held]))

    @property
    def train_tokens(self) -> int:
        return len(self.train) * self.ids_BS.shape[1]


@dataclass(frozen=True)
class Job:
    """Layers to train.

    Attributes:
        teacher, student: the original, and what the plan made of it.
        learning: name of the teacher's experts module -> what learns there (`parts.trainable`).
    """

    teacher: Checkpoint
    student: Checkpoint
    plan: Plan
    learning: dict[str, list[str]]
    text: Text
    settings: Settings

    def name(self) -> str:
        """A digest of all that the outcome depends on but the machine."""
        digest = hashlib.sha256(f"{_VERSION} {self.teacher.fingerprint}".encode())
        digest.update(witnesses(self.student.files).encode())
        digest.update(self.plan.to_json().encode())
        digest.update(json.dumps([self.learning, asdict(self.settings)]).encode())
        digest.update(self.text.ids_BS.numpy().tobytes())
        return digest.hexdigest()[:32]


def witnesses(files: CheckpointFiles) -> str:
    """The shapes of all tensors and the first values of each: no two students that differ are alike in all of these."""
    digest = hashlib.sha256()
    for name, entry in sorted(files.entries.items()):
        digest.update(json.dumps([name, entry.shape, entry.dtype]).encode())
        values = files.read_values(name, 0, min(_WITNESSES, math.prod(entry.shape)))
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
