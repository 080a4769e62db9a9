"""The text of the table: each domain's held-out blocks, and what calibration draws from its training text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from moeprune.builtin import corpus
from moeprune.errors import InputError
from moeprune.evaluation.drawing import spread
from moeprune.sources import Source, shares
from moeprune.statistics.stats import block_hash, data_fingerprint
from moeprune.texts import Blocks, read_blocks

MIXTURE = "mixture"
POOL_BLOCKS = 4096  # of each training text at most, from which draws are made


@dataclass(frozen=True)
class Domain:
    """A domain's name, and the addresses of its training and held-out text (`moeprune.texts`)."""

    name: str
    train: str
    held: str

    @classmethod
    def parse(cls, text: str) -> Domain:
        """`name=train,held`. Raises InputError for anything else."""
        name, _, addresses = text.partition("=")
        train, _, held = addresses.partition(",")
        if not (name and train and held) or "," in held or name == MIXTURE:
            raise InputError(
                f"{text!r} is not a domain: write name=train.jsonl,held.jsonl, with a name other than {MIXTURE}"
            )
        return cls(name, train, held)


BUILTIN = [Domain(name, f"builtin://{name}", f"builtin://{name}/held-out") for name in corpus.DOMAINS]


@dataclass(frozen=True)
class Drawn:
    """What one calibration reads.

    Attributes:
        on: the domain it is of, or `MIXTURE` for equal parts of all.
        seed: of the draw.
        ids_BS: int64 token ids, `[blocks, tokens per block]`.
        address: of the texts.
    """

    on: str
    seed: int
    ids_BS: torch.Tensor
    address: str

    @cached_property
    def fingerprint(self) -> str:
        """As the Stats that are made from it carry it."""
        return data_fingerprint(list(map(block_hash, self.ids_BS)))

    def some(self, count: int) -> torch.Tensor:
        """At most so many of the blocks, evenly spaced, so that each domain has its part."""
        return self.ids_BS[spread(len(self.ids_BS), count)]


class Texts:
    """Reads each text once, when it is first asked for.

    Args:
        blocks: of a calibration, whatever it is on.
        held_blocks: of each held-out text at most.
    """

    def __init__(
        self,
        domains: list[Domain],
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_tokens: int,
        blocks: int,
        held_blocks: int,
        text_field: str,
    ) -> None:
        self.domains = domains
        self.blocks = blocks
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._held_blocks = held_blocks
        self._text_field = text_field
        self._pools: dict[str, torch.Tensor] = {}

    @cached_property
    def held(self) -> dict[str, Blocks]:
        """The held-out blocks by domain. Raises as `read_blocks` does."""
        return {
            domain.name: replace(self._read(domain.held, self._held_blocks), name=domain.name)
            for domain in self.domains
        }

    def judged(self, on: str) -> list[Blocks]:
        """What a calibration is judged on: its own domain, or for the mixture all."""
        return list(self.held.values()) if on == MIXTURE else [self.held[on]]

    def draw(self, on: str, seed: int) -> Drawn:
        """Blocks of the training text, other ones for another seed, the same of each domain where there are several.

        Raises:
            InputError: a training text is shorter than its share; and as `read_blocks` does.
        """
        domains = [domain for domain in self.domains if on in (MIXTURE, domain.name)]
        parts = shares([Source(domain.train) for domain in domains], self.blocks)
        rows = [self._some(domain, part, seed) for domain, part in zip(domains, parts, strict=True)]
        return Drawn(on, seed, torch.cat(rows), ",".join(domain.train for domain in domains))

    def _some(self, domain: Domain, count: int, seed: int) -> torch.Tensor:
        if domain.name not in self._pools:
            self._pools[domain.name] = self._read(domain.train, POOL_BLOCKS).ids_BS
        pool_BS = self._pools[domain.name]
        if len(pool_BS) < count:
            raise InputError(
                f"{domain.train} holds {len(pool_BS)} blocks of {self._block_tokens} tokens, and {count} are to be "
                "drawn from it; give more text, or fewer or shorter blocks"
            )
        order = torch.randperm(len(pool_BS), generator=torch.Generator().manual_seed(seed))
        return pool_BS[order[:count]]

    def _read(self, address: str, blocks: int) -> Blocks:
        return read_blocks(
            address,
            self._tokenizer,
            block_tokens=self._block_tokens,
            max_blocks=blocks,
            text_field=self._text_field,
        )
