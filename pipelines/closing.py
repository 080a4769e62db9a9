"""A pipeline within an exit handler, which tells MLflow how the run ended, whatever happened to its steps."""

from __future__ import annotations

import inspect
from typing import Any

from kfp import dsl

from moeprune.components.close_run import close_run

from . import placement
from .on_a_cluster import use_services
from .workspace import Workspace, bring_model

LONGEST_HOURS = 7 * 24


def closed(pipeline: Any, name: str, display_name: str, workspace: Workspace | None = None) -> Any:
    """What a cluster gets: the same parameters, the same steps, and the exit handler around them. With a workspace, the
    model is brought there before all else.

    A pipeline of its own, since Kubeflow lets none put out what was made within an exit handler, and a local run, which
    wants the outputs, ends its run in MLflow itself.
    """
    inner = pipeline.pipeline_func
    signature = inspect.signature(inner).replace(return_annotation=inspect.Signature.empty)

    def whole(*arguments: Any) -> None:
        closing = close_run()
        placement.light(closing)
        placement.retry(closing)
        use_services(closing)
        closing.set_caching_options(enable_caching=False)
        with dsl.ExitHandler(closing, name="the steps"):
            given = dict(zip(signature.parameters, arguments, strict=True))
            if workspace:
                given["model"] = bring_model(given["model"])
            steps = pipeline(**given)
            steps.set_caching_options(enable_caching=False)

    whole.__signature__ = signature  # type: ignore[attr-defined]
    whole.__doc__ = (inner.__doc__ or "").split("Returns:")[0]
    config = dsl.PipelineConfig(
        workspace=workspace.config() if workspace else None, active_deadline_seconds=LONGEST_HOURS * placement.HOUR
    )
    return dsl.pipeline(whole, name=name, display_name=display_name, pipeline_config=config)
