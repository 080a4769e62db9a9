"""promote: a measured checkpoint that lost little enough -> a registered version that `champion` points to."""

from __future__ import annotations

from moeprune import places, tracking
from moeprune.checkpoint.files import CheckpointFiles
from moeprune.checkpoint.identity import close_fingerprint
from moeprune.errors import InputError
from moeprune.evaluation.report import Report
from moeprune.promotion import ALIAS, Verdict, judge, register


def promote(
    report: str,
    model: str,
    name: str,
    *,
    candidate: str = "",
    max_loss_increase_nats: float = 0.25,
    alias: str = ALIAS,
) -> Verdict:
    """Register `model` as a new version of `name` and move the alias to it, if the Report says that it lost little
    enough.

    Args:
        report: address of the Report that measured it.
        model: address of the checkpoint.
        name: of the registered model.
        candidate: its name in the Report; by default the one that the run is about.
        max_loss_increase_nats: most that its loss on the pruned-for domain may be above the original's.
        alias: moved to the new version.

    Raises:
        InputError: no MLflow is configured, the Report does not hold the candidate, or the checkpoint is not what was
            measured by that name.
    """
    if not tracking.is_configured():
        raise InputError("promote needs a model registry: set MLFLOW_TRACKING_URI")
    params = {"registered_model": name, "max_loss_increase_nats": max_loss_increase_nats, "alias": alias}
    with tracking.step("promote", params) as run, places.local_file(report) as report_path:
        measured = Report.load(report_path)
        candidate = candidate or measured.headline.name
        verdict = judge(measured, candidate, max_loss_increase_nats)
        if verdict.passed:
            with places.local_model(model) as directory:
                if close_fingerprint(CheckpointFiles(directory)) != measured.candidate(candidate).weights:
                    raise InputError(
                        f"{model} is not what was measured as {candidate!r}: its weights are others; give the "
                        "checkpoint that was evaluated, or evaluate this one"
                    )
                verdict = register(run, verdict, directory, name, alias)
        run.metrics({"loss_increase_nats": verdict.loss_increase_nats, "gate_passed": float(verdict.passed)})
        run.tags({"gate": verdict.sentence})
        run.parent.tags({"gate": verdict.sentence})
        return verdict
