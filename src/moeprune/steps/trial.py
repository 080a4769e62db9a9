"""The model and some text, brought here and loaded when a method that tries asks for them, and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from moeprune import places
from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError
from moeprune.methods.base import Trial
from moeprune.statistics import Stats
from moeprune.steps import machine
from moeprune.texts import read_blocks

BLOCKS = 8  # a trial is of a few thousand tokens: what it decides, it decides on outputs, not on rare counts

LoadTrial = Callable[[Stats], Trial]


@contextmanager
def trials(
    model: str, data: str, *, text_field: str, block_tokens: int, max_blocks: int, trust_remote_code: bool
) -> Iterator[LoadTrial]:
    """Yield what loads the Trial for a decision that is made from Stats; it is loaded once, and let go after the block.

    Called, it raises InputError where the Stats are of another model, the model cannot be loaded, or the text not read.
    """
    loaded: list[Trial] = []
    with ExitStack() as stack:

        def load(stats: Stats) -> Trial:
            if not loaded:
                machine.quieten()
                checkpoint = Checkpoint(stack.enter_context(places.local_model(model)), trust_remote_code)
                if checkpoint.fingerprint != stats.model:
                    raise InputError(f"the Stats are of another model than {model}; name the one that was calibrated")
                blocks = read_blocks(
                    data,
                    checkpoint.tokenizer(),
                    block_tokens=block_tokens,
                    max_blocks=max_blocks,
                    text_field=text_field,
                )
                loaded.append(Trial(checkpoint.load(), blocks.ids_BS))
            return loaded[0]

        yield load
        loaded.clear()
