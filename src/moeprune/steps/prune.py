"""plan and apply: Stats (and Clusters) -> Plan; Plan and checkpoint -> pruned checkpoint."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeprune import places, tracking
from moeprune.atomic import build_beside
from moeprune.budget import Budget, plan_for
from moeprune.checkpoint import surgery
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.shards import SHARD_BYTES
from moeprune.clusters import Clusters
from moeprune.errors import InputError
from moeprune.methods import find, make_plan, parse_options
from moeprune.plan import Plan
from moeprune.plan import Recovery as RecoveryPlan
from moeprune.progress import progress
from moeprune.sources import mixture_name
from moeprune.statistics import Stats
from moeprune.steps.recover import BLOCKS as RECOVERY_BLOCKS
from moeprune.steps.recover import Recovery, recovering
from moeprune.steps.trial import BLOCKS, LoadTrial, trials
from moeprune.tracking import TrackedRun


@dataclass(frozen=True)
class Applied:
    """What a Plan made of a model, wherever that lies now: its parameters, and those that were made zero."""

    plan: Plan
    parameters: int
    zeros: int
    bytes_on_disk: int
    needs_code: bool


def plan(
    method: str,
    ratio: float | None,
    stats: str,
    out: str,
    *,
    parameters_ratio: float | None = None,
    size: str | None = None,
    model: str | None = None,
    data: str | None = None,
    text_field: str = "text",
    block_tokens: int = 256,
    trial_blocks: int = BLOCKS,
    clusters: str | None = None,
    options: dict[str, Any] | None = None,
    recover: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Decide which experts stay and put the Plan at `out`. See `methods.make_plan`.

    Args:
        recover: have the plan ask for recovery, whichever method made it.
        ratio, parameters_ratio, size: how much goes, by one of them (`budget.Budget`).
        model: the original; by its headers, all but a ratio of experts become such a ratio. A method that tries what it
            decides loads it.
        data, text_field, block_tokens, trial_blocks: the text that such a method tries it on (`texts.read_blocks`).

    Raises:
        InputError: text is given to a method that does not try what it decides; and as `methods.make_plan` does.
    """
    budget = Budget.of(ratio, parameters_ratio, size)
    if data and not find(method).tries:
        raise InputError(f"{method} decides by the Stats alone and reads no text; leave --data out")
    with tracking.step("plan", _params(method, budget, options)) as run, ExitStack() as stack:
        source = stack.enter_context(_streamed(model, trust_remote_code)) if model else None
        trial = None
        if model and data:
            trial = stack.enter_context(
                trials(
                    model,
                    data,
                    text_field=text_field,
                    block_tokens=block_tokens,
                    max_blocks=trial_blocks,
                    trust_remote_code=trust_remote_code,
                )
            )
        return _plan(run, method, budget, stats, out, clusters, options, source, trial, recover=recover)


def apply(
    model: str,
    plan: str,
    out: str,
    *,
    stats: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Applied:
    """Carry out a Plan on a model and put the pruned checkpoint at `out`. See `checkpoint.surgery.cut`."""
    with tracking.step("apply", {"model": places.origin(model)}) as run, _streamed(model, trust_remote_code) as source:
        return _apply(run, source, plan, stats, out, shard_bytes)


def prune(
    model: str,
    method: str,
    ratio: float | None,
    stats: str,
    plan_out: str,
    model_out: str,
    *,
    data: str,
    text_field: str = "text",
    block_tokens: int = 256,
    trial_blocks: int = BLOCKS,
    recovery_blocks: int = RECOVERY_BLOCKS,
    parameters_ratio: float | None = None,
    size: str | None = None,
    clusters: str | None = None,
    options: dict[str, Any] | None = None,
    baselines: Sequence[str] = (),
    baselines_out: str | None = None,
    trust_remote_code: bool = False,
) -> Applied:
    """`plan`, `apply` and, where the plan asks for it, `recover` as one tracked step, and the same by other methods, to
    hold the result against.

    Args:
        data, text_field, block_tokens: the text that a method that tries what it decides tries it on, and that what
            stays is fitted on.
        trial_blocks, recovery_blocks: how much of it, at most.
        ratio, parameters_ratio, size: how much goes, by one of them (`budget.Budget`).
        baselines: methods, each with its default options and asked for the same.
        baselines_out: a directory with a Plan and a checkpoint per baseline, named by its method; made for none, too.
    """
    budget = Budget.of(ratio, parameters_ratio, size)
    params = {"model": places.origin(model)} | _params(method, budget, options) | {"baselines": ", ".join(baselines)}
    for baseline in baselines:
        find(baseline)
    with (
        tracking.step("prune", params) as run,
        _streamed(model, trust_remote_code) as source,
        trials(
            model,
            data,
            text_field=text_field,
            block_tokens=block_tokens,
            max_blocks=trial_blocks,
            trust_remote_code=trust_remote_code,
        ) as trial,
        recovering(
            model,
            data,
            text_field=text_field,
            block_tokens=block_tokens,
            max_blocks=recovery_blocks,
            trust_remote_code=trust_remote_code,
        ) as recovery,
    ):
        _plan(run, method, budget, stats, plan_out, clusters, options, source, trial)
        made = _carry_out(run, source, plan_out, stats, model_out, recovery)
        if baselines_out:
            with places.output(baselines_out) as path, build_beside(path) as beside:
                for baseline in dict.fromkeys(baselines):
                    plan_path = beside / f"{baseline}.json"
                    _plan(TrackedRun(), baseline, budget, stats, str(plan_path), clusters, None, source, trial)
                    run.text(plan_path.read_text(), f"baselines/{baseline}.json")
                    _carry_out(TrackedRun(), source, str(plan_path), stats, str(beside / baseline), recovery, baseline)
        return made


def _params(method: str, budget: Budget, options: dict[str, Any] | None) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(budget).items() if value is not None}
    return {"method": method} | asked | parse_options(find(method), options or {}).model_dump()


def _plan(
    run: TrackedRun,
    method: str,
    budget: Budget,
    stats: str,
    out: str,
    clusters: str | None,
    options: dict[str, Any] | None,
    source: Checkpoint | None,
    trial: LoadTrial | None,
    *,
    recover: bool = False,
) -> Plan:
    with places.output(out) as path, places.local_file(stats) as stats_path:
        loaded_clusters = None
        if clusters:
            with places.local_file(clusters) as clusters_path:
                loaded_clusters = Clusters.load(clusters_path)
        evidence = Stats.load(stats_path)

        def decide(ratio: float) -> Plan:
            return make_plan(
                method, ratio, evidence, loaded_clusters, options, (lambda: trial(evidence)) if trial else None
            )

        decided = plan_for(budget, decide, method, evidence, source)
        if recover and decided.recovery is None:
            decided = decided.model_copy(update={"recovery": RecoveryPlan(router=False)})
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


def _carry_out(
    run: TrackedRun,
    source: Checkpoint,
    plan: str,
    stats: str,
    out: str,
    recovery: Recovery,
    label: str | None = None,
) -> Applied:
    """All that a plan says, recovery too."""
    with places.local_file(plan) as plan_path:
        decided = Plan.load(plan_path)
    if not decided.recovery:
        return _apply(run, source, plan, stats, out, SHARD_BYTES, label or "apply")
    with places.output(out) as path, tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        cut = Path(scratch) / "cut"
        made = _apply(run, source, plan, stats, str(cut), SHARD_BYTES, label or "apply")
        recovery(run, Checkpoint(cut), decided, path, label or "recover")
    return made


def _apply(
    run: TrackedRun,
    source: Checkpoint,
    plan: str,
    stats: str | None,
    out: str,
    shard_bytes: int,
    label: str = "apply",
) -> Applied:
    with places.local_file(plan) as plan_path:
        decided = Plan.load(plan_path)
    evidence = None
    if stats:
        with places.local_file(stats) as stats_path:
            evidence = Stats.load(stats_path)
    target = places.checkpoint_target(out)
    with progress(label) as on_tensor:
        written = surgery.cut(
            source,
            decided,
            target,
            stats=evidence,
            shard_bytes=shard_bytes,
            on_tensor=on_tensor,
            say=lambda text: _say(label, text),
        )
    run.metrics(
        {
            "size_on_disk_mb": written.bytes_on_disk / 1e6,
            "original_size_on_disk_mb": source.files.bytes_on_disk / 1e6,
            "parameters": written.parameters,
            "zero_parameters": written.zeros,
        }
    )
    return Applied(decided, written.parameters, written.zeros, written.bytes_on_disk, written.needs_code)
