"""Our REAP keeps, layer by layer, what `llmcompressor` keeps on the same model and tokens.

What that library says is stored as numbers; `make reap-reference` makes them anew.
"""

from __future__ import annotations

import json

import pytest
import reap_models as reference

from moeprune.checkpoint.loading import Checkpoint
from moeprune.methods import make_plan, statistics_for
from moeprune.statistics import Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass

CLEAR = 1e-4  # of a score: far more than two ways to compute it differ by

told = json.loads(reference.FILE.read_text())


@pytest.fixture(scope="module", params=reference.FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Stats]:
    source = Checkpoint(reference.write(tmp_path_factory.mktemp("reap") / request.param, request.param))
    run = InMemoryPass(source.load())
    return request.param, calibrate(
        run, source.fingerprint, reference.token_ids(), statistics=statistics_for(["reap"]), batch_blocks=3
    )


def test_the_same_experts_stay(case: tuple[str, Stats]) -> None:
    family, stats = case
    assert set(told["kept"][family]) == {str(ratio) for ratio in reference.RATIOS}
    for ratio, kept in told["kept"][family].items():
        plan = make_plan("reap", float(ratio), stats)
        for layer, expected in zip(plan.layers.values(), kept, strict=True):
            assert layer.scores
            score = layer.scores
            last_kept, first_gone = min(score[one] for one in layer.keep), max(score[one] for one in layer.drop)
            assert last_kept - first_gone > CLEAR * last_kept, "too close to tell: take another seed"
            assert layer.keep == expected
