"""Clusters are scikit-learn's, of what the experts put out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.cluster import AgglomerativeClustering, KMeans
from transformers import PreTrainedModel

from moeprune.checkpoint import weight_similarity
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.weight_similarity import cosines_of_weights
from moeprune.clustering import ALGORITHMS, SIMILARITIES, assign, best_count, embedded, make_clusters
from moeprune.clusters import Clusters
from moeprune.errors import InputError
from moeprune.statistics import Stats

BLOBS = np.array([0, 1, 2, 0, 1, 2, 2, 0])  # which blob each of 8 experts is in


def blobs(seed: int = 0, spread: float = 0.01, hidden: int = 6) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = 10 * np.eye(hidden)[: BLOBS.max() + 1]
    return centres[BLOBS] + spread * random.normal(size=(len(BLOBS), hidden))


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(((one[:, None] == one) == (other[:, None] == other)).all())


def stats_of(points_GEH: np.ndarray, blocks_per_group: list[int] | None = None) -> Stats:
    """Stats whose experts have these embeddings."""
    blocks = blocks_per_group or [2] * len(points_GEH)
    sums = torch.tensor(points_GEH) * torch.tensor(blocks)[:, None, None]
    return tiny.make_stats([[1] * points_GEH.shape[1]], sums[None], blocks_per_group=blocks)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_known_blobs_are_found(algorithm: str) -> None:
    points = np.stack([blobs(seed) for seed in range(3)])
    (layer,) = make_clusters(stats_of(points), algorithm=algorithm, clusters_per_layer=3).layers.values()
    assert all(same_partition(labels, BLOBS) for labels in [*layer.label_GE, layer.overall_E])
    for points_EH, distance_E in zip(points, layer.distance_GE, strict=True):
        centres = np.stack([points_EH[blob == BLOBS].mean(axis=0) for blob in range(3)])
        assert distance_E == pytest.approx(np.linalg.norm(points_EH - centres[BLOBS], axis=1), abs=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), clusters=st.integers(1, 12))
def test_it_is_what_scikit_learn_says(algorithm: str, seed: int, clusters: int) -> None:
    points = np.random.default_rng(seed).normal(size=(12, 5))
    labels, distances = assign(points, clusters, algorithm)
    theirs: Any = (
        KMeans(clusters, n_init=4, random_state=0)
        if algorithm == "k-means"
        else AgglomerativeClustering(clusters, linkage=algorithm)
    )
    assert same_partition(labels, theirs.fit_predict(points))
    assert len(np.unique(labels)) == clusters
    for label in range(clusters):
        members = points[labels == label]
        assert distances[labels == label] == pytest.approx(np.linalg.norm(members - members.mean(axis=0), axis=1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_experts_that_are_all_alike_are_clustered_without_complaint(algorithm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, distances = assign(np.ones((6, 4)), 3, algorithm)
    assert distances.tolist() == [0.0] * 6


def test_groups_without_blocks_do_not_vote() -> None:
    points = np.stack([blobs(0), np.zeros((8, 6)), blobs(2)])
    (layer,) = make_clusters(stats_of(points, [2, 0, 5]), clusters_per_layer=3).layers.values()
    assert layer.label_GE.shape == (2, 8)
    assert all(same_partition(labels, BLOBS) for labels in layer.label_GE)


def test_similarity_is_the_cosine_of_mean_outputs() -> None:
    points = np.random.default_rng(0).normal(size=(1, 8, 6))
    (layer,) = make_clusters(stats_of(points)).layers.values()
    by_hand = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in points[0]] for a in points[0]]
    assert layer.similarity_EE == pytest.approx(np.array(by_hand), abs=1e-9)


@pytest.mark.parametrize(("experts", "clusters"), [(64, 12), (128, 24), (16, 3), (8, 2), (4, 2)])
def test_the_number_of_clusters_follows_the_authors_setting(experts: int, clusters: int) -> None:
    points = np.random.default_rng(0).normal(size=(1, experts, 6))
    made = make_clusters(stats_of(points))
    assert made.counts == str(clusters)
    (layer,) = made.layers.values()
    assert len(np.unique(layer.label_GE)) == clusters


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_stats_same_bytes(algorithm: str, tmp_path: Path) -> None:
    points = np.random.default_rng(3).normal(size=(4, 16, 8))
    for name in ("one", "other"):
        made = make_clusters(stats_of(points), algorithm=algorithm)
        made.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    made = make_clusters(tiny.make_stats([[1] * 8] * 12), algorithm="average")
    made.save(tmp_path / "clusters")
    loaded = Clusters.load(tmp_path / "clusters")
    assert list(loaded.layers) == list(made.layers)
    for field in ("model", "data", "similarity", "algorithm", "counts"):
        assert getattr(loaded, field) == getattr(made, field)
    for name, layer in loaded.layers.items():
        for field, value in vars(layer).items():
            assert np.array_equal(value, getattr(made.layers[name], field)), field


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "astrology"}, "unknown clustering algorithm 'astrology'; known: ward, average, k-means"),
        ({"clusters_per_layer": 9}, "9 clusters were asked for, but .* has 8 experts"),
        ({"clusters_per_layer": -1}, "-1 clusters were asked for"),
        ({"clusters_per_layer": "many"}, "'many' clusters per layer: give a number, published or auto"),
        ({"similarity": "looks"}, "unknown similarity 'looks'; known: outputs, parameters, both"),
        ({"similarity": "parameters"}, "give it, `--model M`"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_clusters(stats_of(blobs()[None]), **options)


def test_stats_without_probes_are_refused() -> None:
    stats = stats_of(blobs()[None])
    for layer in stats.layers.values():
        layer.sums = {"gate": layer.sums["gate"]}
    with pytest.raises(InputError, match="calibrate again"):
        make_clusters(stats)


class TestTheNumberIsChosen:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_as_many_as_there_are_blobs(self, algorithm: str) -> None:
        (layer,) = make_clusters(
            stats_of(blobs()[None]), algorithm=algorithm, clusters_per_layer="auto"
        ).layers.values()
        assert layer.count == 3
        assert same_partition(layer.overall_E, BLOBS)

    def test_for_each_layer_its_own(self) -> None:
        two = 10 * np.eye(6)[[0, 1, 0, 1, 0, 1, 0, 1]] + 0.01 * np.random.default_rng(0).normal(size=(8, 6))
        points = torch.tensor(np.stack([blobs(), two]))[:, None]
        made = make_clusters(tiny.make_stats([[1] * 8] * 2, points), clusters_per_layer="auto")
        assert [layer.count for layer in made.layers.values()] == [3, 2]
        assert made.counts == "2 to 3"
        assert made.mean_count == 2.5

    @pytest.mark.parametrize("experts", [1, 2, 3, 4])
    def test_of_few_experts(self, experts: int) -> None:
        points = np.random.default_rng(0).normal(size=(1, experts, 4))
        (layer,) = make_clusters(stats_of(points), clusters_per_layer="auto").layers.values()
        assert 1 <= layer.count <= min(2, experts)

    def test_all_alike_are_two_at_most(self) -> None:
        assert best_count(np.ones((8, 3)), "ward") == 2


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])  # stored one by one, and fused
class TestParameters:
    @pytest.fixture
    def source(self, family: str, checkpoint_of: Callable[[str], Path]) -> Checkpoint:
        return Checkpoint(checkpoint_of(family))

    @pytest.fixture
    def stats(self, source: Checkpoint) -> Stats:
        layers = list(source.layout.layers)
        stats = tiny.make_stats([[1] * 8] * len(layers), model=source.fingerprint)
        stats.layers = dict(zip(layers, stats.layers.values(), strict=True))
        return stats

    def test_cosines_are_those_of_the_models_weights(
        self,
        source: Checkpoint,
        family: str,
        model_of: Callable[[str], PreTrainedModel],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(weight_similarity, "_PART_BYTES", 1 << 12)  # several parts
        for name in source.layout.layers:
            experts = model_of(family).get_submodule(name)
            weights = [getattr(experts, part).detach().flatten(1).double() for part in ("gate_up_proj", "down_proj")]
            unit = torch.nn.functional.normalize(torch.cat(weights, dim=1), dim=1)
            assert cosines_of_weights(source, name) == pytest.approx((unit @ unit.T).numpy(), abs=1e-5)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_points_stand_for_the_weights(
        self, source: Checkpoint, family: str, model_of: Callable[[str], PreTrainedModel], algorithm: str
    ) -> None:
        name = next(iter(source.layout.layers))
        experts = model_of(family).get_submodule(name)
        weights = torch.cat([getattr(experts, part).detach().flatten(1) for part in ("gate_up_proj", "down_proj")], 1)
        unit = torch.nn.functional.normalize(weights.double(), dim=1).numpy()
        labels, distances = assign(embedded(cosines_of_weights(source, name)), 3, algorithm)
        expected_labels, expected_distances = assign(unit, 3, algorithm)
        assert same_partition(labels, expected_labels)
        assert distances == pytest.approx(expected_distances, abs=1e-4)

    def test_similar_weights_or_outputs_or_both(self, source: Checkpoint, stats: Stats) -> None:
        made = {
            similarity: make_clusters(stats, similarity=similarity, clusters_per_layer=3, model=source)
            for similarity in SIMILARITIES
        }
        for name in stats.layers:
            outputs, parameters, both = (made[similarity].layers[name] for similarity in SIMILARITIES)
            assert both.similarity_EE == pytest.approx((outputs.similarity_EE + parameters.similarity_EE) / 2)
            assert len(parameters.label_GE) == 1
            assert both.label_GE.shape == outputs.label_GE.shape

    def test_another_model(self, source: Checkpoint) -> None:
        with pytest.raises(InputError, match="not made from"):
            make_clusters(stats_of(blobs()[None]), similarity="both", model=source)


class TestWhatCannotBeLoaded:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        make_clusters(stats_of(blobs()[None])).save(tmp_path / "clusters")
        return tmp_path / "clusters"

    def test_another_version(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["moeprune_clusters"])
        metadata = {"moeprune_clusters": json.dumps(header | {"version": 1})}
        save_file(load_file(path), path, metadata=metadata)
        with pytest.raises(InputError, match=r"another version.*cluster again"):
            Clusters.load(path)

    def test_a_layer_that_is_not_there(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {name: value for name, value in load_file(path).items() if not name.endswith("label_GE")}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(InputError, match="not a readable Clusters file"):
            Clusters.load(path)

    def test_part_of_a_file_another_file_and_no_file(self, path: Path, qwen: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])
        for each in (path, qwen / "model.safetensors", path.parent / "nothing", path.parent):
            with pytest.raises(InputError, match="not a readable Clusters file"):
                Clusters.load(each)
