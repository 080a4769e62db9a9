"""Layers that were trained apart, and the checkpoint that all of them make.

A part is a directory: a file for each of its layers (`learnt`), and `part.json`, which tells of which job they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moeprune.atomic import write_beside
from moeprune.checkpoint.identity import close_fingerprint
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.rewriting import rewrite_by_group
from moeprune.distillation.layer_local import learnt
from moeprune.distillation.layer_local.job import Job
from moeprune.distillation.layer_local.learnt import LayerLearnt
from moeprune.errors import InputError

_NAME = "part.json"


class Part(BaseModel):
    """What a part tells of itself.

    Attributes:
        job: of which its layers are (`Job.name`).
        student: the pruned checkpoint that they are layers of (`close_fingerprint`).
        layers: all layers of the job that learn, those of other parts, too.
    """

    model_config = ConfigDict(extra="forbid")

    moeprune_distilled_part: Literal[1] = 1
    job: str
    student: str
    layers: list[str]

    @classmethod
    def of(cls, job: Job) -> Part:
        return cls(job=job.name(), student=close_fingerprint(job.student.files), layers=list(job.learning))

    def save(self, directory: Path) -> None:
        with write_beside(directory / _NAME) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Part:
        """Raises InputError where there is none."""
        try:
            return cls.model_validate_json((directory / _NAME).read_text())
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise InputError(
                f"{directory} is no part of a distillation by layers; make one with `moeprune distill --layers I/N`"
            ) from error


def layers_of_part(layers: Sequence[str], number: int, parts: int) -> list[str]:
    """Every so manieth of some layers. Raises InputError where there is no such part, or nothing in it."""
    if not 0 <= number < parts:
        raise InputError(f"part {number} of {parts} does not exist; parts are counted from 0")
    if not (taken := list(layers[number::parts])):
        raise InputError(f"{len(layers)} layers learn, and {parts} parts are too many for them; use at most that many")
    return taken


def merge(student: Checkpoint, directories: Sequence[Path], out: Path) -> list[LayerLearnt]:
    """Write the checkpoint that parts make into the directory `out`; how each layer's training went.

    Raises:
        InputError: parts of different jobs or of another student, or layers that none has.
    """
    parts = [Part.load(directory) for directory in directories]
    if not parts:
        raise InputError("there are no parts to merge; give all of one distillation")
    if any(part != parts[0] for part in parts):
        raise InputError(
            "the parts are not of one distillation: they differ in what was learnt from, in what or how; give those of "
            "one command that differ in nothing but `--layers`"
        )
    if parts[0].student != close_fingerprint(student.files):
        raise InputError(f"the parts are of another pruned model than {student.files.address}; give that one")
    place = {layer: directory for directory in directories for layer in parts[0].layers if _has(directory, layer)}
    if absent := [layer for layer in parts[0].layers if layer not in place]:
        raise InputError(f"no part holds {absent[0]}; give all parts of the distillation")
    return write(student, {layer: place[layer] for layer in parts[0].layers}, out)


def write(student: Checkpoint, place: dict[str, Path], out: Path) -> list[LayerLearnt]:
    """The student with what its layers have learnt, whose files are in these directories."""
    found = [learnt.load(directory, layer) for layer, directory in place.items()]
    made = {one.layer: one for one in found if one is not None}
    rewrite_by_group(
        student,
        student.without_weights(),
        {layer: one.parameters for layer, one in made.items() if one.parameters},
        lambda layer: learnt.tensors(place[layer], layer, made[layer].parameters),
        out,
    )
    return list(made.values())


def _has(directory: Path, layer: str) -> bool:
    return learnt.load(directory, layer) is not None
