"""What both ways of distilling read beside the models: the plan between them, and text, which must fit to both."""

from __future__ import annotations

from pathlib import Path

from moeprune.checkpoint.loading import Checkpoint
from moeprune.distillation.checks import check_pair, check_tokenizers
from moeprune.distillation.text import Text
from moeprune.plan import Plan
from moeprune.texts import read_blocks
from moeprune.tracking import TrackedRun


def read_fitting(
    run: TrackedRun,
    original: Checkpoint,
    pruned: Checkpoint,
    plan: Path,
    data: str,
    *,
    block_tokens: int,
    max_blocks: int,
    text_field: str,
) -> tuple[Plan, Text]:
    """The plan and the text, of which the run is told.

    Raises:
        InputError: plan, models and tokenizers do not fit together, or there is no text, or too little.
    """
    decided = Plan.load(plan)
    check_pair(original, pruned, decided)
    blocks = read_blocks(
        data, original.tokenizer(), block_tokens=block_tokens, max_blocks=max_blocks, text_field=text_field
    )
    check_tokenizers(original, pruned, blocks.ids_BS)
    run.dataset(blocks.name, blocks.address, blocks.fingerprint, "distillation", blocks.tokens)
    return decided, Text.of(blocks.ids_BS)
