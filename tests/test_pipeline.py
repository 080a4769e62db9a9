"""The pipeline as Kubeflow gets it: what the launch form shows, and what is in the YAML."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from kfp import components

from moeprune.cli.run import RATIO
from moeprune.cli.run import run as run_command
from moeprune.components.image import IMAGE
from moeprune.pipelines.compile import compiled
from moeprune.pipelines.on_a_cluster import SECRET, VARIABLES
from moeprune.pipelines.prune import prune
from moeprune.train_job.pod import POD_VARIABLE

REUSABLE = {"prepare", "calibrate", "merge-stats", "cluster"}
STEPS = REUSABLE | {
    "global-prune",
    "spread",
    "distill",
    "merge-distilled",
    "distill-on-nodes",
    "evaluate",
    "promote",
    "close-run",
}
GROUPS = {  # the compiler makes components of them
    "exit-handler-1": {"prune"},
    "prune": {
        "prepare",
        "for-loop-1",
        "merge-stats",
        "cluster",
        "global-prune",
        "condition-branches-2",
        "model-at",
        "evaluate",
        "promote",
    },
    "for-loop-1": {"calibrate"},
    "condition-branches-2": {"condition-4", "condition-5"},
    "condition-4": {"spread", "for-loop-3", "merge-distilled"},
    "for-loop-3": {"distill"},
    "condition-5": {"distill-on-nodes"},
    "model-at": {"importer"},
}
IMPORTER = "importer"  # Kubeflow's own
SIZES = ("cpus", "memory", "gpus")
CLUSTER_ONLY = {
    "distillation_nodes",
    "distillation_gpus_per_node",
    "distillation_volume",
    "distillation_node_options",
    "distillation_training",
    *(f"{what}_{of}" for what in ("calibration", "pruning", "distillation", "evaluation") for of in SIZES),
    "merging_cpus",
    "merging_memory",
    "gpu_type",
    "node_selector",
    "tolerations",
}

ANOTHER_IMAGE = "registry.example/team/moeprune:7"


@pytest.fixture(scope="module")
def text() -> str:
    return compiled("prune")


@pytest.fixture(scope="module")
def with_another_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled in a process of its own, which draws other hashes."""
    path = tmp_path_factory.mktemp("compiled") / "new"
    command = [sys.executable, "-m", "moeprune.pipelines.compile", str(path)]
    environment = {"MOEPRUNE_IMAGE": ANOTHER_IMAGE, "PYTHONHASHSEED": "2"}
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return (path / "prune.yaml").read_text()


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    return next(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def platform(text: str) -> dict[str, Any]:
    return list(yaml.safe_load_all(text))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def described(definitions: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("parameters", "artifacts"):
        yield from definitions.get(kind, {}).items()


class TestTheYaml:
    def test_every_input_and_output_is_described(self, spec: dict[str, Any]) -> None:
        of_steps = {name.removeprefix("comp-"): component for name, component in spec["components"].items()}
        for group, tasks in GROUPS.items():
            assert of_steps.pop(group)["dag"]["tasks"].keys() == tasks
        assert of_steps.pop(IMPORTER)["executorLabel"] == f"exec-{IMPORTER}"
        assert of_steps.keys() == STEPS
        for name, component in [*of_steps.items(), ("the pipeline", spec["root"])]:
            for side in ("inputDefinitions", "outputDefinitions"):
                for key, definition in described(component.get(side, {})):
                    assert len(definition.get("description", "")) > 8, f"{name}: {key}"
                    assert "\n\n" not in definition["description"], f"{name}: {key}"

    def test_every_parameter_has_a_default(self, spec: dict[str, Any]) -> None:
        """A run can be started from the launch form as it is."""
        for name, definition in spec["root"]["inputDefinitions"]["parameters"].items():
            assert definition.get("isOptional"), name

    def test_the_same_source_gives_the_same_bytes_but_for_the_image(self, text: str, with_another_image: str) -> None:
        assert with_another_image.replace(ANOTHER_IMAGE, IMAGE) == text

    def test_one_image_that_can_be_chosen(self, spec: dict[str, Any], with_another_image: str) -> None:
        def images(of: dict[str, Any]) -> set[str]:
            return {
                executor["container"]["image"]
                for name, executor in of["deploymentSpec"]["executors"].items()
                if name != f"exec-{IMPORTER}"
            }

        assert {image.split(":")[0] for image in images(spec)} == {"moeprune"}
        assert images(next(yaml.safe_load_all(with_another_image))) == {ANOTHER_IMAGE}

    def test_nothing_is_installed_when_a_step_starts(self, text: str) -> None:
        assert "pip install" not in text

    def test_only_what_runs_share_is_cached(self, spec: dict[str, Any]) -> None:
        dags = [spec["root"]["dag"], *(spec["components"][f"comp-{group}"]["dag"] for group in GROUPS)]
        tasks = {name: task for dag in dags for name, task in dag["tasks"].items() if name not in GROUPS}
        assert tasks.keys() == STEPS | {IMPORTER}
        assert {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")} == REUSABLE

    def test_keys_come_from_a_secret_that_may_be_absent(self, spec: dict[str, Any], platform: dict[str, Any]) -> None:
        assert {name.removeprefix("exec-") for name in platform} == STEPS
        for executor in platform.values():
            (secret,) = executor["secretAsEnv"]
            assert secret["secretName"] == SECRET
            assert secret["optional"] is True
            assert {entry["envVar"] for entry in secret["keyToEnv"]} == set(VARIABLES)
            run_id, *_ = executor["fieldPathAsEnv"]
            assert run_id == {"name": "MOEPRUNE_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        for name, executor in spec["deploymentSpec"]["executors"].items():
            assert name == f"exec-{IMPORTER}" or "env" not in executor["container"]

    def test_the_task_of_nodes_shares_their_volume_knows_its_pod_and_is_tried_again(
        self, spec: dict[str, Any], platform: dict[str, Any]
    ) -> None:
        executor = platform["exec-distill-on-nodes"]
        assert executor["fieldPathAsEnv"][1:] == [{"name": POD_VARIABLE, "fieldPath": "metadata.name"}]
        (mount,) = executor["pvcMount"]
        group = spec["components"]["comp-condition-5"]
        volume = mount["pvcNameParameter"]["componentInputParameter"]
        assert volume in group["inputDefinitions"]["parameters"]
        assert volume.endswith("distillation_volume")
        task = group["dag"]["tasks"]["distill-on-nodes"]
        assert mount["mountPath"] == task["inputs"]["parameters"]["volume_path"]["runtimeValue"]["constant"]
        assert task["retryPolicy"]["maxRetryCount"] > 0

    def test_it_loads_again(self, text: str) -> None:
        loaded = components.load_component_from_text(text)
        assert loaded.component_spec.inputs.keys() == prune().component_spec.inputs.keys()
        assert prune().component_spec.outputs.keys() == {"report", "page", "model", "promoted", "verdict"}


class TestTheCommandLine:
    def test_has_an_option_for_every_parameter(self) -> None:
        options = inspect.signature(run_command).parameters
        assert not CLUSTER_ONLY & options.keys()
        for name, spec in prune().component_spec.inputs.items():
            if name in CLUSTER_ONLY:
                continue
            default = options[name].default
            match name:
                case "evaluation_data":  # depends on --data
                    assert default == ""
                case "method_options":
                    assert (default or {}) == spec.default
                case "ratio":  # not given, that one may say it otherwise is seen
                    assert default is None
                    assert spec.default == RATIO
                case "baselines":
                    assert default.split(",") == spec.default
                case _:
                    assert default == spec.default, name
