"""The compiled pipelines that are in the repository, and the page of their launch forms: up to date, and what Kubeflow
can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes
from kfp.pipeline_spec import pipeline_spec_pb2 as specs

from moeprune.pipelines.compile import PIPELINES, compiled
from moeprune.pipelines.launch_form import page

ROOT = Path(__file__).parent.parent
LOOKS_AT_PARAMETERS = {"prepare", "combine", "spread"}  # says the same, however often it is asked
POOLED = {"calibrate", "global-prune", "distill", "evaluate"}


@pytest.fixture(scope="module", params=PIPELINES)
def documents(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(compiled(request.param))
    return spec, platform


@pytest.fixture
def spec(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture
def pods(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    executors: dict[str, Any] = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor for name, executor in executors.items()}


def dags(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every graph of tasks in a pipeline: its own, and those of its groups."""
    for name, component in [("root", spec["root"]), *spec["components"].items()]:
        if "dag" in component:
            yield name, component


def steps(spec: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Step -> its task, and the graph that this is in."""
    containers = {name for name, it in spec["deploymentSpec"]["executors"].items() if "container" in it}
    found = {}
    for _, component in dags(spec):
        for name, task in component["dag"]["tasks"].items():
            if spec["components"][task["componentRef"]["name"]].get("executorLabel") in containers:
                found[name] = task, component
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_those_in_the_repository_are_up_to_date(name: str) -> None:
    assert (ROOT / f"pipelines/compiled/{name}.yaml").read_text() == compiled(name), "write them with `make compile`"


def test_the_page_of_the_forms_is_up_to_date() -> None:
    assert (ROOT / "docs/launch_form.md").read_text() == page(), "write it with `make launch-form`"


def test_kubeflow_can_read_all_of_it(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A field that its messages do not know is an error here; a cluster would not know it either."""
    spec, platform = documents
    json_format.ParseDict(spec, specs.PipelineSpec())
    json_format.ParseDict(spec["deploymentSpec"], specs.PipelineDeploymentConfig())
    json_format.ParseDict(platform, specs.PlatformSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes.KubernetesExecutorConfig())


def test_every_value_that_a_task_is_to_have_reaches_the_graph_it_is_in(
    spec: dict[str, Any], pods: dict[str, Any]
) -> None:
    for name, component in dags(spec):
        known = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task_name, task in component["dag"]["tasks"].items():
            wanted = {
                given["componentInputParameter"]
                for given in task.get("inputs", {}).get("parameters", {}).values()
                if "componentInputParameter" in given
            }
            wanted |= set(_inputs_of_a_pod(pods.get(task_name, {})))
            assert wanted <= known, f"{task_name} in {name}"


def test_an_importer_s_address_is_an_input_of_its_graph(spec: dict[str, Any]) -> None:
    """Kubeflow's importer looks for it there, and nowhere else."""
    importers = {name for name, it in spec["deploymentSpec"]["executors"].items() if "importer" in it}
    for name, component in dags(spec):
        for task_name, task in component["dag"]["tasks"].items():
            if spec["components"][task["componentRef"]["name"]].get("executorLabel") in importers:
                assert task["inputs"]["parameters"].keys() == {"uri"}, f"{task_name} in {name}"
                assert "componentInputParameter" in task["inputs"]["parameters"]["uri"], f"{task_name} in {name}"


def _inputs_of_a_pod(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "componentInputParameter":
                yield value
            else:
                yield from _inputs_of_a_pod(value)
    elif isinstance(config, list):
        for item in config:
            yield from _inputs_of_a_pod(item)


def test_what_pods_ask_for_is_text(spec: dict[str, Any]) -> None:
    """Kubeflow's driver takes a number in the place of a quantity for an empty text."""
    for executor in spec["deploymentSpec"]["executors"].values():
        for value in _texts(executor.get("container", {}).get("resources", {})):
            if value.startswith("{{$.inputs"):
                name = value.split("'")[1].removeprefix("pipelinechannel--")
                assert spec["root"]["inputDefinitions"]["parameters"][name]["parameterType"] == "STRING"


def _texts(value: Any) -> Iterator[str]:
    for item in value.values():
        if isinstance(item, dict):
            yield from _texts(item)
        elif isinstance(item, str):
            yield item


def test_every_pod_says_what_it_needs_whose_it_is_and_when_it_ends(spec: dict[str, Any], pods: dict[str, Any]) -> None:
    for name in steps(spec):
        resources = spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["resources"]
        assert resources["resourceCpuRequest"]
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"]
        assert pods[name]["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1000"}
        labels = pods[name]["podMetadata"]["labels"]
        assert labels == {"app.kubernetes.io/part-of": "moeprune", "app.kubernetes.io/component": name}
        assert ("activeDeadlineSeconds" in pods[name]) == (name != "distill-on-nodes")


def test_only_steps_that_may_need_a_gpu_hold_one_and_only_they_go_to_its_nodes(
    spec: dict[str, Any], pods: dict[str, Any]
) -> None:
    executors = spec["deploymentSpec"]["executors"]
    with_gpus = {name for name in steps(spec) if "accelerator" in executors[f"exec-{name}"]["container"]["resources"]}
    assert with_gpus == POOLED & steps(spec).keys()
    for name, pod in pods.items():
        assert ("nodeSelector" in pod) == ("tolerations" in pod) == (name in POOLED), name


def test_what_can_be_lost_is_tried_again_later_and_what_cannot_is_not(spec: dict[str, Any]) -> None:
    for name, (task, _) in steps(spec).items():
        policy = task.get("retryPolicy")
        if name in LOOKS_AT_PARAMETERS:
            assert policy is None
        else:
            assert policy is not None, name
            assert policy["maxRetryCount"] > 0, name
            assert policy["backoffFactor"] > 1
            assert policy["backoffDuration"] != "0s"


def test_the_run_in_mlflow_is_ended_whatever_happens(spec: dict[str, Any]) -> None:
    (closing,) = (task for name, task in spec["root"]["dag"]["tasks"].items() if name == "close-run")
    assert closing["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    others = spec["root"]["dag"]["tasks"].keys() - {"close-run"}
    assert set(closing["dependentTasks"]) == others == {"exit-handler-1"}
    assert closing["inputs"]["parameters"]["status"]["taskFinalStatus"]["producerTask"] == "exit-handler-1"
