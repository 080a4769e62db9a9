"""A package becomes a version of a pipeline, once, and a version a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api import (
    ApiClient,
    V2beta1Experiment,
    V2beta1Filter,
    V2beta1Pipeline,
    V2beta1PipelineVersion,
    V2beta1PipelineVersionReference,
    V2beta1Predicate,
    V2beta1PredicateOperation,
    V2beta1Run,
    V2beta1RuntimeConfig,
)

import moeprune
from moeprune.errors import InputError, ServiceError

from .package import Package
from .server import ConflictError, NotFoundError, Server

_PAGE = 100


@dataclass(frozen=True)
class Version:
    """Of a pipeline, as the server has it; `is_new`: uploaded just now."""

    pipeline_id: str
    version_id: str
    name: str
    is_new: bool


def check_namespace(server: Server, namespace: str) -> None:
    """Raises InputError where the server needs a namespace, or knows none."""
    multi_user = bool(server.read(lambda api: api.healthzs.healthz_service_get_healthz()).multi_user)
    if multi_user and not namespace:
        raise InputError("this Kubeflow Pipelines has many users: say whose namespace with --namespace")
    if namespace and not multi_user:
        raise InputError("this Kubeflow Pipelines has one user and knows no namespaces: leave --namespace out")


def upload(server: Server, package: Package, pipeline_name: str, namespace: str) -> Version:
    """The version of the pipeline that has the package's bytes, uploaded if there is none.

    A version is named by its bytes, so whoever else uploads the same at the same time makes the same.

    Raises:
        ServiceError: the server refuses, or does not answer.
    """
    pipeline = _found_or_made(
        lambda: _pipeline(server, pipeline_name, namespace),
        lambda: server.write(
            lambda api: api.pipelines.pipeline_service_create_pipeline(
                V2beta1Pipeline(
                    name=pipeline_name,
                    display_name=pipeline_name,
                    description=package.description,
                    namespace=namespace or None,
                )
            )
        ),
    )
    name = f"{moeprune.__version__}-{package.digest[:12]}"
    if found := _version(server, pipeline.pipeline_id, name):
        return Version(pipeline.pipeline_id, found.pipeline_version_id, name, is_new=False)
    try:
        made = _upload(server, package, pipeline.pipeline_id, name)
    except ConflictError:
        found = _version(server, pipeline.pipeline_id, name)
        if found is None:
            raise
        return Version(pipeline.pipeline_id, found.pipeline_version_id, name, is_new=False)
    return Version(pipeline.pipeline_id, made.pipeline_version_id, name, is_new=True)


def start(
    server: Server,
    version: Version,
    parameters: Mapping[str, Any],
    *,
    run_name: str,
    experiment: str,
    namespace: str = "",
    service_account: str = "",
    pipeline_root: str = "",
) -> V2beta1Run:
    """Start a run of a version in an experiment, which is made if it is not there. Raises ServiceError."""
    belongs_to = _found_or_made(
        lambda: _experiment(server, experiment, namespace),
        lambda: server.write(
            lambda api: api.experiments.experiment_service_create_experiment(
                V2beta1Experiment(display_name=experiment, namespace=namespace or None)
            )
        ),
    )
    run = V2beta1Run(
        experiment_id=belongs_to.experiment_id,
        display_name=run_name,
        pipeline_version_reference=V2beta1PipelineVersionReference(version.pipeline_id, version.version_id),
        runtime_config=V2beta1RuntimeConfig(parameters=dict(parameters), pipeline_root=pipeline_root or None),
        service_account=service_account or None,
    )
    return server.write(lambda api: api.runs.run_service_create_run(run))


def _found_or_made(find: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """What is there, else what we make, else what another made while we tried."""
    if found := find():
        return found
    try:
        return make()
    except ConflictError:
        if found := find():
            return found
        raise


def _pipeline(server: Server, name: str, namespace: str) -> V2beta1Pipeline | None:
    where = {"namespace": namespace} if namespace else {}
    try:
        return server.read(lambda api: api.pipelines.pipeline_service_get_pipeline_by_name(name, **where))
    except NotFoundError:
        return None


def _version(server: Server, pipeline_id: str, name: str) -> V2beta1PipelineVersion | None:
    page = ""

    def list_page(api: Any) -> Any:
        return api.pipelines.pipeline_service_list_pipeline_versions(
            pipeline_id, page_token=page, page_size=_PAGE, sort_by="created_at desc"
        )

    while True:
        listed = server.read(list_page)
        for version in listed.pipeline_versions or []:
            if version.name == name:
                return version
        page = listed.next_page_token
        if not page:
            return None


def _upload(server: Server, package: Package, pipeline_id: str, name: str) -> V2beta1PipelineVersion:
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch:
        file = Path(scratch) / f"{package.name}.yaml"
        file.write_text(package.text, encoding="utf-8")
        return server.write(
            lambda api: api.pipeline_uploads.upload_pipeline_version(
                str(file), name=name, display_name=name, pipelineid=pipeline_id
            )
        )


def _experiment(server: Server, name: str, namespace: str) -> V2beta1Experiment | None:
    by_name = V2beta1Predicate(operation=V2beta1PredicateOperation.EQUALS, key="display_name", string_value=name)
    wanted = json.dumps(ApiClient().sanitize_for_serialization(V2beta1Filter(predicates=[by_name])))
    where = {"namespace": namespace} if namespace else {}
    try:
        listed = server.read(lambda api: api.experiments.experiment_service_list_experiments(filter=wanted, **where))
    except NotFoundError as error:
        raise ServiceError(f"{error}; is there a namespace {namespace}?") from error
    found = listed.experiments or []
    for experiment in found:
        if experiment.storage_state == "ARCHIVED":
            raise InputError(f"the experiment {name} is archived: restore it, or name another with --experiment")
    return found[0] if found else None
