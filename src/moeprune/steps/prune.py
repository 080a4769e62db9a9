"""plan and apply: Stats (and Clusters) -> Plan; Plan and checkpoint -> pruned checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moeprune import places, tracking
from moeprune.atomic import build_beside
from moeprune.checkpoint import surgery
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.shards import SHARD_BYTES
from moeprune.clusters import Clusters
from moeprune.methods import check_ratio, find, make_plan, parse_options
from moeprune.plan import Plan
from moeprune.progress import progress
from moeprune.sources import mixture_name
from moeprune.statistics import Stats
from moeprune.tracking import TrackedRun


@dataclass(frozen=True)
class Applied:
    """What a Plan made of a model, wherever that lies now."""

    plan: Plan
    parameters: int
    bytes_on_disk: int


def plan(
    method: str,
    ratio: float,
    stats: str,
    out: str,
    *,
    clusters: str | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Decide which experts stay and put the Plan at `out`. See `methods.make_plan`."""
    with tracking.step("plan", _params(method, ratio, options)) as run:
        return _plan(run, method, ratio, stats, out, clusters, options)


def apply(
    model: str, plan: str, out: str, *, shard_bytes: int = SHARD_BYTES, trust_remote_code: bool = False
) -> Applied:
    """Carry out a Plan on a model and put the pruned checkpoint at `out`. See `checkpoint.surgery.cut`."""
    with tracking.step("apply", {"model": model}) as run, _streamed(model, trust_remote_code) as source:
        return _apply(run, source, plan, out, shard_bytes)


def prune(
    model: str,
    method: str,
    ratio: float,
    stats: str,
    plan_out: str,
    model_out: str,
    *,
    clusters: str | None = None,
    options: dict[str, Any] | None = None,
    baselines: Sequence[str] = (),
    baselines_out: str | None = None,
    trust_remote_code: bool = False,
) -> Applied:
    """`plan` and `apply` as one tracked step, and the same by other methods, to hold the result against.

    Args:
        baselines: methods, each with its default options and at the same ratio.
        baselines_out: a directory with a Plan and a checkpoint per baseline, named by its method; made for none, too.
    """
    params = {"model": model} | _params(method, ratio, options) | {"baselines": ", ".join(baselines)}
    for baseline in baselines:
        find(baseline)
    with tracking.step("prune", params) as run, _streamed(model, trust_remote_code) as source:
        _plan(run, method, ratio, stats, plan_out, clusters, options)
        made = _apply(run, source, plan_out, model_out, SHARD_BYTES)
        if baselines_out:
            with places.output(baselines_out) as path, build_beside(path) as beside:
                for baseline in dict.fromkeys(baselines):
                    plan_path = beside / f"{baseline}.json"
                    _plan(TrackedRun(), baseline, ratio, stats, str(plan_path), clusters, None)
                    run.text(plan_path.read_text(), f"baselines/{baseline}.json")
                    _apply(TrackedRun(), source, str(plan_path), str(beside / baseline), SHARD_BYTES, baseline)
        return made


def _params(method: str, ratio: float, options: dict[str, Any] | None) -> dict[str, Any]:
    check_ratio(ratio)
    return {"method": method, "ratio": ratio} | parse_options(find(method), options or {}).model_dump()


def _plan(
    run: TrackedRun,
    method: str,
    ratio: float,
    stats: str,
    out: str,
    clusters: str | None,
    options: dict[str, Any] | None,
) -> Plan:
    with places.output(out) as path, places.local_file(stats) as stats_path:
        loaded_clusters = None
        if clusters:
            with places.local_file(clusters) as clusters_path:
                loaded_clusters = Clusters.load(clusters_path)
        evidence = Stats.load(stats_path)
        decided = make_plan(method, ratio, evidence, loaded_clusters, options)
        decided.save(path)
        for tracked in _own_and_pipelines(run):
            tracked.text(decided.to_json(), "plan.json")
        _log_calibration_data(run, evidence)
        run.metrics({"removed_experts_share": decided.removed})
        return decided


def _own_and_pipelines(run: TrackedRun) -> list[TrackedRun]:
    return [run, run.parent] if run.parent_id else [run]


def _log_calibration_data(run: TrackedRun, stats: Stats) -> None:
    """Also to the pipeline's run: where calibration was reused from an earlier one, nobody else would."""
    name = "+".join(map(mixture_name, stats.sources))
    for tracked in _own_and_pipelines(run):
        tracked.dataset(name, ",".join(stats.sources), stats.data, "calibration", stats.tokens)


def _say(label: str, text: str) -> None:
    sys.stderr.write(f"{label}: {text}\n")
    sys.stderr.flush()


@contextmanager
def _streamed(model: str, trust_remote_code: bool) -> Iterator[Checkpoint]:
    with places.streamed_model(model) as (directory, weights):
        yield Checkpoint(directory, trust_remote_code, weights)


def _apply(run: TrackedRun, source: Checkpoint, plan: str, out: str, shard_bytes: int, label: str = "apply") -> Applied:
    with places.local_file(plan) as plan_path:
        decided = Plan.load(plan_path)
    target = places.checkpoint_target(out)
    with progress(label) as on_tensor:
        written = surgery.cut(
            source,
            decided,
            target,
            shard_bytes=shard_bytes,
            on_tensor=on_tensor,
            say=lambda text: _say(label, text),
        )
    run.metrics(
        {
            "size_on_disk_mb": written.bytes_on_disk / 1e6,
            "original_size_on_disk_mb": source.files.bytes_on_disk / 1e6,
            "parameters": written.parameters,
        }
    )
    return Applied(decided, written.parameters, written.bytes_on_disk)
