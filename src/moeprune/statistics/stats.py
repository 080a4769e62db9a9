"""Stats: what calibration leaves behind. Sums and counts per layer and expert, in one safetensors file.

Two Stats of the same model add up to the Stats of both data sets, bit for bit where the same blocks stood together in
batches: what a model puts out for a block is rounded differently in another batch, but sums do not depend on their
order.

In the file: the metadata entry `moeprune_stats` holds the header as JSON; the tensors are named `<layer>/<statistic>`.
Counts are int64; sums are the two limbs of an `ExactSum`, so their first axis is 2.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeprune.atomic import write_beside
from moeprune.errors import InputError
from moeprune.router_groups import NO_GROUPS, RouterGroups
from moeprune.statistics.exact import ExactSum

VERSION = 2


@dataclass
class LayerStats:
    """One MoE layer's statistics.

    Attributes:
        experts: routed experts E of the layer.
        top_k: experts that run for a token.
        groups: of experts, among which the router chooses first.
        counts: name -> int64 tensor, for example `routed_tokens` [E].
        sums: name -> ExactSum, for example `gate` [E] or `probe_output` [G, E, H].
    """

    experts: int
    top_k: int
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, ExactSum] = field(default_factory=dict)
    groups: RouterGroups = NO_GROUPS

    def count(self, name: str) -> torch.Tensor:
        """Raises InputError where calibration was not asked to collect it."""
        return self._get(self.counts, name)

    def sum(self, name: str) -> torch.Tensor:
        """The sum as float64. Raises InputError where calibration was not asked to collect it."""
        return self._get(self.sums, name).value()

    def _get(self, table: dict, name: str):  # type: ignore[no-untyped-def]
        if name not in table:
            raise InputError(
                f"these Stats do not hold {name!r} (they hold {', '.join(sorted([*self.counts, *self.sums]))}); "
                "calibrate again, for a method that needs it: `moeprune calibrate --for METHOD`"
            )
        return table[name]


@dataclass
class Stats:
    """The statistics of every MoE layer of one model over one data set.

    Attributes:
        model: fingerprint of the model (`checkpoint.identity`).
        data: fingerprint of the data: the sum of its blocks' hashes, so that it too does not depend on the order.
        block_tokens: tokens per block.
        tokens, blocks: how many were seen.
        blocks_per_group: blocks in each of the G groups that C-Prune votes over.
        layers: name of the experts module -> its statistics, in the order of the model.
        sources: addresses of the data, sorted; for people, the fingerprint is what counts.
    """

    model: str
    data: str
    block_tokens: int
    tokens: int
    blocks: int
    blocks_per_group: list[int]
    layers: dict[str, LayerStats]
    sources: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file beside its place, then rename it."""
        header = asdict(replace(self, layers={}))
        header["version"] = VERSION
        header["layers"] = [
            [name, s.experts, s.top_k, astuple(s.groups)] for name, s in self.layers.items()
        ]  # a list keeps their order
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {f"{name}/{key}": count.cpu().contiguous() for key, count in layer.counts.items()}
            tensors |= {f"{name}/{key}": total.limbs.cpu().contiguous() for key, total in layer.sums.items()}
        kinds = {key: "sum" for layer in self.layers.values() for key in layer.sums}
        kinds |= {key: "count" for layer in self.layers.values() for key in layer.counts}
        header["statistics"] = dict(sorted(kinds.items()))
        with write_beside(path) as beside:
            save_file(
                dict(sorted(tensors.items())), beside, metadata={"moeprune_stats": json.dumps(header, sort_keys=True)}
            )

    def digest(self) -> str:
        """A hash of all the numbers. The fingerprint of the data does not tell in which dtype they were computed."""
        digest = hashlib.sha256()
        for name, layer in self.layers.items():
            tensors = layer.counts | {key: total.limbs for key, total in layer.sums.items()}
            for key, tensor in sorted(tensors.items()):
                digest.update(f"{name}/{key} {list(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Raises InputError: not a Stats file, damaged, or of another version."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["moeprune_stats"])
                if header.pop("version") != VERSION:
                    raise InputError(f"{path} holds Stats of another version of moeprune; calibrate again")
                kinds = header.pop("statistics")
                layers = {
                    name: LayerStats(experts, top_k, groups=RouterGroups(*groups))
                    for name, experts, top_k, groups in header.pop("layers")
                }
                for key in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                    name, statistic = key.rsplit("/", 1)
                    if kinds[statistic] == "sum":
                        layers[name].sums[statistic] = ExactSum(file.get_tensor(key))
                    else:
                        layers[name].counts[statistic] = file.get_tensor(key)
                return cls(layers=layers, **header)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a readable Stats file ({error}); make one with `moeprune calibrate`"
            ) from error


def data_fingerprint(block_hashes: list[bytes]) -> str:
    """An order-independent fingerprint of a set of blocks: the sum of their hashes, modulo 2^128."""
    return _as_hex(sum(int.from_bytes(digest, "big") for digest in block_hashes))


def block_hash(token_ids: torch.Tensor) -> bytes:
    """The 128-bit hash of one block's token ids."""
    return hashlib.blake2b(token_ids.to(torch.int64).numpy().tobytes(), digest_size=16).digest()


def _as_hex(number: int) -> str:
    return f"{number % (1 << 128):032x}"


def merge(parts: list[Stats]) -> Stats:
    """Add the Stats of several data sets, or shards of one, on the same model.

    Raises:
        InputError: no parts, or parts of different models, block lengths, groups or statistics.
    """
    if not parts:
        raise InputError("there are no Stats to merge")
    first = parts[0]
    total = Stats(
        model=first.model,
        data=_as_hex(sum(int(part.data, 16) for part in parts)),
        block_tokens=first.block_tokens,
        tokens=sum(part.tokens for part in parts),
        blocks=sum(part.blocks for part in parts),
        blocks_per_group=[sum(counts) for counts in zip(*(part.blocks_per_group for part in parts), strict=False)],
        layers={},
        sources=sorted({source for part in parts for source in part.sources}),
    )
    for index, part in enumerate(parts[1:], start=2):
        for what in ("model", "block_tokens"):
            if getattr(part, what) != getattr(first, what):
                raise InputError(f"Stats {index} cannot be added to the first: they differ in {what}")
        if len(part.blocks_per_group) != len(first.blocks_per_group) or _shapes(part) != _shapes(first):
            raise InputError(f"Stats {index} cannot be added to the first: they hold other statistics or groups")
    for name, layer in first.layers.items():
        siblings = [part.layers[name] for part in parts]
        summed = LayerStats(layer.experts, layer.top_k, groups=layer.groups)
        for key, count in layer.counts.items():
            summed.counts[key] = torch.stack([s.counts[key] for s in siblings]).sum(0).to(count.dtype)
        for key, limbs in layer.sums.items():
            summed.sums[key] = ExactSum(torch.zeros_like(limbs.limbs))
            for sibling in siblings:
                summed.sums[key].merge_(sibling.sums[key])
        total.layers[name] = summed
    return total


def _shapes(stats: Stats) -> dict[tuple[str, str], torch.Size]:
    return {
        (name, key): shape
        for name, layer in stats.layers.items()
        for key, shape in [
            *((key, count.shape) for key, count in layer.counts.items()),
            *((key, total.shape) for key, total in layer.sums.items()),
        ]
    }
