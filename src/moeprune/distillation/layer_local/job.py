"""What is to be learnt, from what and how; and a name for it, so that work is never continued as another's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from moeprune.checkpoint.identity import close_fingerprint
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.layer_local.settings import Settings
from moeprune.distillation.text import Text
from moeprune.plan import Plan

_VERSION = 1  # another for every change of what a job makes; what another release has begun is then begun anew


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
        digest.update(close_fingerprint(self.student.files).encode())
        digest.update(self.plan.to_json().encode())
        digest.update(json.dumps([self.learning, asdict(self.settings)]).encode())
        digest.update(self.text.fingerprint.encode())
        return digest.hexdigest()[:32]
