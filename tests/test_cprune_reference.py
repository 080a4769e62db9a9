"""C-Prune's selection rule reproduces the selections that its authors published.

The data are not in this repository. The environment variable MOEPRUNE_CPRUNE_REFERENCE names a directory, and every
pair of files below it is a case:

    .../DATA_unsupervised.json.gz     labels and distances; in the layer-wise stage
                                      {layer: [batch: [expert: [label, distance]]]}, in the global stage
                                      [batch: [expert that is left, layer after layer: [label, distance]]]
    .../rate_R/DATA_prune.json.gz     what was pruned at that rate: {layer: experts}

A global stage below `rate_R1/` goes on from what that layer-wise stage left; any other prunes all experts of all
layers. Nothing about a model is assumed: layers and experts are those of the files.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeprune.methods.voting import ascending, count_votes, fewest_votes_across_layers

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = Path(os.environ.get("MOEPRUNE_CPRUNE_REFERENCE") or REPOSITORY.parent / "shared" / "reference" / "cprune")
STATED, RESULT = "_unsupervised.json", "_prune.json"

Layers = dict[str, int]  # name -> experts it has


@lru_cache(maxsize=16)
def read(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return json.load(file)


def rate_of(directory: Path) -> float | None:
    found = re.fullmatch(r"rate_(0?\.\d+|[01](?:\.\d+)?)", directory.name)
    return float(found[1]) if found else None


def sibling(directory: Path, stem: str) -> Path | None:
    """The file of that name, compressed or not."""
    return next((path for path in (directory / f"{stem}.gz", directory / stem) if path.is_file()), None)


def find_pairs() -> list[tuple[Path, Path]]:
    """Each published selection with the labels and distances that it was made from."""
    pairs = []
    for result in sorted(ROOT.rglob(f"*{RESULT}*")) if ROOT.is_dir() else []:
        data = result.name.partition(RESULT)[0]
        stated = sibling(result.parent.parent, data + STATED)
        if stated and rate_of(result.parent) is not None:
            pairs.append((stated, result))
    return pairs


PAIRS = find_pairs()


def arrays(batches: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances, `[batches, experts]` each."""
    both = np.array(batches, dtype=np.float64)
    return both[..., 0].astype(np.int64), both[..., 1]


def layers_stated_above(stated: Path, data: str) -> Iterator[Layers]:
    """Layers and their experts as the layer-wise files around state them: the nearest, and of the same data, first."""
    for above in stated.parents:
        files = sorted(above.rglob(f"*{STATED}*"), key=lambda path: (not path.name.startswith(data + STATED), path))
        for content in map(read, files):
            if isinstance(content, dict):
                yield {layer: len(content[layer][0]) for layer in in_order(content)}
        if above == ROOT:
            return


def in_order(layers: Iterable[str]) -> list[str]:
    return sorted(layers, key=lambda layer: [int(number) for number in re.findall(r"\d+", layer)])


def remaining(layers: Layers, gone: dict[str, set[int]]) -> list[tuple[str, int]]:
    return [(layer, expert) for layer, E in layers.items() for expert in range(E) if expert not in gone.get(layer, ())]


def select_layer_wise(stated: dict[str, Any], rate: float) -> dict[str, set[int]]:
    selected = {}
    for layer, batches in stated.items():
        labels, distances = arrays(batches)
        experts = labels.shape[1]
        votes = count_votes(labels, distances, rate, experts)
        selected[layer] = set(ascending(votes)[: int(rate * experts)])
    return selected


def select_globally(stated: Path, rate: float, data: str) -> dict[str, set[int]]:
    labels, distances = arrays(read(stated))
    stage_one = stated.parents[2]  # .../rate_R1/cluster_K2/METHOD/DATA_unsupervised.json
    gone: dict[str, set[int]] = {}
    if rate_of(stage_one) is not None:
        published = sibling(stage_one, data + RESULT)
        assert published, f"{stage_one} lacks what the layer-wise stage pruned for {data}"
        gone = {layer: set(experts) for layer, experts in read(published).items()}

    fitting = (
        layers for layers in layers_stated_above(stated, data) if len(remaining(layers, gone)) == labels.shape[1]
    )
    layers = next(fitting, None)
    assert layers, f"no layer-wise file near {stated} has the layers and experts that its {labels.shape[1]} are of"
    left = remaining(layers, gone)
    votes = count_votes(labels, distances, rate, max(layers.values()))
    room = dict.fromkeys(layers, len(left))  # the published selections know no limit to what a layer loses
    chosen = fewest_votes_across_layers(votes, [layer for layer, _ in left], room, int(rate * len(left)))
    selected = {layer: set(gone.get(layer, ())) for layer in layers}
    for place in chosen:
        layer, expert = left[place]
        selected[layer].add(expert)
    return selected


@pytest.mark.skipif(
    not PAIRS,
    reason=f"no published selections below {ROOT}; MOEPRUNE_CPRUNE_REFERENCE names the directory that holds them",
)
@pytest.mark.parametrize(
    ("stated", "result"), PAIRS, ids=[str(result.relative_to(ROOT)).partition(RESULT)[0] for _, result in PAIRS]
)
def test_the_published_selection_is_reproduced(stated: Path, result: Path) -> None:
    data, rate = result.name.partition(RESULT)[0], rate_of(result.parent)
    assert rate is not None
    content = read(stated)
    layer_wise = isinstance(content, dict)
    selected = select_layer_wise(content, rate) if layer_wise else select_globally(stated, rate, data)
    published = {layer: set(experts) for layer, experts in read(result).items()}
    assert published.keys() <= selected.keys()
    assert {layer: experts for layer, experts in selected.items() if experts} == {
        layer: experts for layer, experts in published.items() if experts
    }
