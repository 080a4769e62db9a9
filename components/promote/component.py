from typing import NamedTuple

from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote(
    report: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    registered_model: str,
    candidate: str = "distilled",
    max_loss_increase_nats: float = 0.25,
    alias: str = "champion",
) -> NamedTuple("Promotion", [("promoted", bool), ("version", str), ("verdict", str)]):  # type: ignore[valid-type]
    """Register the model in MLflow if it lost little enough, and point the alias to it.

    Args:
        report: What was measured, from evaluate.
        model: The model to register.
        registered_model: Its name in the registry.
        candidate: Its name in the report.
        max_loss_increase_nats: The most that its loss on the pruned-for domain may be above the original's, per token.
        alias: Moved to the new version.

    Returns:
        promoted: Whether it was registered.
        version: Of the registered model; empty where nothing was registered.
        verdict: The outcome in a sentence.
    """
    from moeprune.steps import promote as step

    verdict = step.promote(
        report.path,
        model.path,
        registered_model,
        candidate=candidate,
        max_loss_increase_nats=max_loss_increase_nats,
        alias=alias,
    )
    return verdict.passed, verdict.version, verdict.sentence
