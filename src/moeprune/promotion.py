"""The gate before the model registry, and the registration behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moeprune.errors import InputError, ServiceError
from moeprune.evaluation.report import Report
from moeprune.tracking import TrackedRun

ALIAS = "champion"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may be promoted, and, once registered, as what.

    Attributes:
        passed: whether the gate let it through.
        loss_increase_nats: its loss above the original's on the pruned-for domain.
        sentence: the outcome for people.
        version: of the registered model; empty where nothing was registered.
    """

    passed: bool
    loss_increase_nats: float
    sentence: str
    version: str = ""


def judge(report: Report, candidate: str, max_loss_increase_nats: float) -> Verdict:
    """Compare a candidate with the original.

    Raises:
        InputError: the Report does not hold the candidate, or holds it as the original.
    """
    measured = report.candidate(candidate)
    if measured is report.original:
        raise InputError(f"{candidate!r} is the original; there is nothing to promote")
    increase = report.loss_increase(measured)
    passed = increase <= max_loss_increase_nats
    comparison = "at most" if passed else "more than"
    sentence = (
        f"gate {'passed' if passed else 'failed'}: {candidate} loses {increase:+.3f} nats on {report.domain}, "
        f"{comparison} the {max_loss_increase_nats:g} allowed" + ("" if passed else "; nothing was registered")
    )
    return Verdict(passed, increase, sentence)


def register(run: TrackedRun, verdict: Verdict, checkpoint: Path, name: str, alias: str) -> Verdict:
    """Store the checkpoint with the run, register it as a new version of `name`, and point the alias to it.

    Raises:
        ServiceError: the registry refuses.
    """
    from mlflow.exceptions import MlflowException

    assert run.client is not None
    run.artifact(checkpoint, "model")
    try:
        try:
            run.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{run.client.get_run(run.run_id).info.artifact_uri}/model"
        made = run.client.create_model_version(name, source, run.run_id, description=verdict.sentence)
        run.client.set_registered_model_alias(name, alias, made.version)
    except MlflowException as error:
        raise ServiceError(f"the model registry refuses {name}: {error}") from error
    return replace(
        verdict, version=str(made.version), sentence=f"{verdict.sentence}; registered as {name} version {made.version}"
    )
