"""merge_distilled: what layers have learnt in several calls -> recovered student."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from moeprune import places
from moeprune.atomic import build_beside
from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.layer_local.part import merge
from moeprune.steps.distill import Distilled


def merge_distilled(parts: Sequence[str], student: str, out: str, *, trust_remote_code: bool = False) -> Distilled:
    """Put the recovered checkpoint at `out`: the same as one call over all layers would have made.

    Args:
        parts: all parts of a distillation, as `distill` wrote them.
        student: the pruned model that they were made from.

    Raises:
        InputError: they are not all parts of one distillation of that model.
    """
    with (
        places.output(out) as path,
        places.local_model(student) as student_directory,
        ExitStack() as stack,
        build_beside(path) as beside,
    ):
        directories = [stack.enter_context(places.local_model(part)) for part in parts]
        return Distilled(merge(Checkpoint(student_directory, trust_remote_code), directories, beside))
