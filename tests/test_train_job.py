"""Training on several nodes: the TrainJob that is asked for, and what becomes of it on a cluster that has its moods."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_api
import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from hypothesis import given
from hypothesis import strategies as st
from kubeflow_trainer_api import models
from kubernetes import client
from kubernetes_api import NAMESPACE, KubernetesApi, strictly

from moeprune.errors import InputError, ServiceError
from moeprune.train_job import DEFAULT_RUNTIME, Cluster, Nodes, job_name, run_train_job
from moeprune.train_job.cluster import NoAnswerError
from moeprune.train_job.manifest import train_job
from moeprune.train_job.pod import POD_VARIABLE

RUNTIME = Path(__file__).parents[1] / "manifests" / "base" / "train-runtime.yaml"
COMMAND = ["torchrun", "-m", "moeprune.distillation.end_to_end"]
TWO = Nodes.of(count=2, volume="work", image="registry/moeprune:7", gpus=4, cpus="8", memory="64Gi", queue="gpus")
NAME = job_name("run-1")

nodes = st.builds(
    Nodes.of,
    count=st.integers(1, 9999),
    image=st.just("image"),
    gpus=st.integers(0, 16),
    cpus=st.sampled_from(["", "4", "1500m"]),
    memory=st.sampled_from(["", "64Gi"]),
    gpu_resource=st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
    volume=st.just("work"),
    node_selector=st.dictionaries(st.sampled_from(["pool", "zone"]), st.just("a")),
    tolerations=st.lists(st.just({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}), max_size=2),
    queue=st.sampled_from(["", "gpus"]),
    longest_hours=st.floats(0.001, 1000),
)


def manifest(of: Nodes = TWO, **options: Any) -> dict[str, Any]:
    return train_job("a-name", of, COMMAND, **{"runtime_kind": "TrainingRuntime"} | options)


class TestTheManifest:
    @given(nodes, st.sampled_from(["", "run-1"]))
    def test_it_is_what_the_schema_knows(self, of: Nodes, run: str) -> None:
        job = manifest(of, run=run, owner={"apiVersion": "v1", "kind": "Workflow", "name": "w", "uid": "u"})
        strictly(models.TrainerV1alpha1TrainJob, job)
        limits = job["spec"]["trainer"]["resourcesPerNode"]["limits"]
        assert limits.get(of.gpu_resource, "0") == str(of.gpus)
        names = [variable["name"] for variable in job["spec"]["trainer"]["env"]]
        assert len(set(names)) == len(names)  # a list with the name as its key, of which torch's are Trainer's own
        assert not [name for name in names if name.startswith("PET_")]
        (patch,) = job["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        spec = replicated["template"]["spec"]["template"].get("spec", {})
        assert all("env" not in container for container in spec.get("containers", []))  # refused for "node"

    @pytest.mark.parametrize(
        "path", [("spec",), ("spec", "trainer"), ("spec", "runtimeRef"), ("spec", "runtimePatches", 0), ("metadata",)]
    )
    def test_what_the_schema_does_not_know_is_seen(self, path: tuple[str | int, ...]) -> None:
        job: Any = manifest()
        inside = job
        for step in path:
            inside = inside[step]
        inside["surprise"] = 1
        with pytest.raises(ValueError, match=r"surprise"):
            strictly(models.TrainerV1alpha1TrainJob, job)

    def test_what_is_asked_for(self) -> None:
        job = manifest(
            TWO.model_copy(
                update={"node_selector": {"pool": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
            ),
            run="r-1",
        )
        assert job["metadata"]["labels"] == {
            "app.kubernetes.io/part-of": "moeprune",
            "app.kubernetes.io/component": "distill",
            "pipeline/runid": "r-1",
            "kueue.x-k8s.io/queue-name": "gpus",
        }
        spec = job["spec"]
        assert spec["runtimeRef"] == {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": DEFAULT_RUNTIME,
        }
        assert spec["activeDeadlineSeconds"] == 72 * 3600
        trainer = spec["trainer"]
        assert trainer["command"] == COMMAND
        assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry/moeprune:7", 2, 4)
        assert trainer["resourcesPerNode"] == {
            "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"},
            "limits": {"memory": "64Gi", "nvidia.com/gpu": "4"},
        }
        (patch,) = spec["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert replicated["name"] == "node"
        pod = replicated["template"]["spec"]["template"]
        assert pod["metadata"]["labels"] == {
            "app.kubernetes.io/part-of": "moeprune",
            "app.kubernetes.io/component": "distill",
            "pipeline/runid": "r-1",
            "sidecar.istio.io/inject": "false",
        }
        assert pod["spec"] == {
            "nodeSelector": {"pool": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "volumes": [{"name": "moeprune", "persistentVolumeClaim": {"claimName": "work"}}],
            "containers": [{"name": "node", "volumeMounts": [{"name": "moeprune", "mountPath": "/mnt/moeprune"}]}],
        }

    def test_one_process_where_there_is_no_gpu(self) -> None:
        trainer = manifest(Nodes.of(count=3, volume="work", image="i"))["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 1)
        assert trainer["resourcesPerNode"] == {"requests": {}, "limits": {}}

    def test_the_nodes_are_given_no_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "precious")
        job = manifest()
        assert "precious" not in json.dumps(job)
        assert [variable["name"] for variable in job["spec"]["trainer"]["env"]] == ["HF_HUB_OFFLINE"]

    @given(st.lists(st.text() | st.integers() | st.dictionaries(st.text(), st.text()), max_size=4), st.integers())
    def test_names(self, what: list[Any], more: int) -> None:
        name = job_name(*what)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(f"{name}-node-0-9999-abcde") <= 63  # a pod's
        assert name == job_name(*json.loads(json.dumps(what)))
        assert name != job_name(*what, more)


class TestTheRuntime:
    def test_it_is_what_the_schema_knows(self) -> None:
        runtime = yaml.safe_load(RUNTIME.read_text())
        strictly(models.TrainerV1alpha1ClusterTrainingRuntime, runtime)
        assert runtime["metadata"]["name"] == DEFAULT_RUNTIME
        assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        assert job["name"] == "node"
        assert job["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
        pod = job["template"]["spec"]["template"]["spec"]
        assert [container["name"] for container in pod["containers"]] == ["node"]
        assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


class TestThePermissions:
    """What docs/distillation.md and the manifests grant is what is asked for, and no more."""

    @staticmethod
    def granted(rules: list[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}

    def test_all_of_it(
        self,
        api: KubernetesApi,
        runs: Callable[[str], None],
        completes: Callable[[str], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv(POD_VARIABLE, "own")
        api.add_pod("own", phase="Running", conditions=[])
        Story(api, runs, lambda name: None, completes)
        run()
        asked = set()
        for request in api.requests:
            method, path = request.split()
            if "/kubeflow-system/" in path:  # the SDK's own curiosity, which it does without
                continue
            *_, plural, name, log = [*re.sub(rf"^.*/(namespaces/{NAMESPACE}|v1alpha1)/", "", path).split("/"), "", ""][
                :3
            ]
            verb = {"POST": "create", "DELETE": "delete", "GET": "get" if name else "list"}[method]
            asked.add((f"{plural}/{log}" if log else plural, verb))
        page = (RUNTIME.parents[2] / "docs" / "distillation.md").read_text()
        documented = [yaml.safe_load(block)["rules"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
        assert asked == {grant for rules in documented for grant in self.granted(rules)}
        accounts = list(yaml.safe_load_all((RUNTIME.parent / "runs" / "accounts.yaml").read_text()))
        distills = [
            it
            for it in accounts
            if it["kind"].endswith("Role") and it["metadata"]["name"].startswith("moeprune-distill")
        ]
        assert asked == {grant for role in distills for grant in self.granted(role["rules"])}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 0}, "count: Input should be greater than or equal to 1"),
        ({"gpus": -1}, "gpus: .*given: -1"),
        ({"memory": "64 GB"}, "memory: .*given: '64 GB'"),
        ({"cpus": "many"}, "cpus"),
        ({"runtime": ""}, "runtime"),
        ({"volume": "My Volume"}, "volume: "),
        ({"volume_path": "work"}, "volume_path"),
        ({"volume_path": "/"}, "volume_path"),
        ({"longest_hours": 0}, "longest_hours"),
        ({"gpu": 8}, "gpu: not known"),
    ],
)
def test_nodes_that_cannot_be_meant(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    options = {"count": 2, "volume": "work"} | wrong
    with pytest.raises(InputError, match=f"the nodes: {said}"):
        Nodes.of(**options)
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps(options))
    with pytest.raises(InputError, match=f"the nodes in {file}: {said}"):
        Nodes.load(file)


def test_nodes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(TWO.model_dump_json())
    assert Nodes.load(file) == TWO
    assert TWO.processes == 8
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        Nodes.load(tmp_path / "absent.json")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A cluster on which every job runs through: pods appear, say two lines each, and end."""
    api = KubernetesApi()
    api.add_runtime("clustertrainingruntimes", DEFAULT_RUNTIME)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("MOEPRUNE_PIPELINE_RUN", "run-1")
    with kubernetes_api.serving(api, tmp_path / "kubeconfig"):
        yield api


class Story:
    """What goes on in the cluster, one thing at each look at the job; the last stays."""

    def __init__(self, api: KubernetesApi, *scenes: Callable[[str], None]) -> None:
        self.scenes = list(scenes)
        api.on_look = self.go_on

    def go_on(self, job: dict[str, Any]) -> None:
        if self.scenes:
            self.scenes.pop(0)(job["metadata"]["name"])


@pytest.fixture
def runs(api: KubernetesApi) -> Callable[[str], None]:
    """A scene: both nodes run, and the first has said something."""

    def scene(name: str) -> None:
        for index in range(2):
            api.add_pod(f"pod-{index}", name, index, phase="Running")
        api.logs["pod-0"] += ["first", "second"]

    return scene


@pytest.fixture
def completes(api: KubernetesApi) -> Callable[[str], None]:
    def scene(name: str) -> None:
        if "pod-0" in api.logs:
            api.logs["pod-0"] += ["third"]
        api.set_status(name, "Complete")

    return scene


def run(
    say: Callable[[str], None] = lambda line: None, of: Nodes = TWO, patience: float = 5.0, **options: Any
) -> list[str]:
    """Train; returns what was said."""
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        say(line)

    cluster = Cluster(patience_seconds=patience, first_pause_seconds=0.01)
    run_train_job(NAME, of, COMMAND, cluster=cluster, say=hear, **{"seconds_between_looks": 0.01} | options)
    return said


class TestFollowing:
    def test_from_its_creation_to_its_removal(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        def waits(name: str) -> None:
            scheduled = client.V1PodCondition(
                type="PodScheduled", status="False", reason="Unschedulable", message="no GPU is free"
            )
            api.add_pod("pod-0", name, 0, phase="Pending", conditions=[scheduled])

        def says_more(name: str) -> None:
            api.logs["pod-0"] += [f"line {index}" for index in range(10)]

        quiet = [lambda name: None] * 2
        Story(api, *quiet, waits, *quiet, runs, *quiet, says_more, *quiet, completes)
        said = run()
        assert said == [
            f"the TrainJob {NAMESPACE}/{NAME} is created",
            f"{NAME}: 0 of 2 nodes run",
            f"{NAME}: 0 of 2 nodes run; pod-0 has no machine yet: no GPU is free",
            f"{NAME}: 2 of 2 nodes run",
            "first",
            "second",
            *[f"line {index}" for index in range(10)],
            "third",
            f"{NAME}: complete",
        ]
        assert not api.jobs
        assert [it for it in api.requests if it.startswith(("POST", "DELETE"))] == [
            f"POST /apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs",
            f"DELETE /apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs/{NAME}",
        ]

    def test_nodes_that_start_again_are_heard(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        """As after a preemption: other pods, with logs of their own."""

        def others(name: str) -> None:
            for index in range(2):
                api.add_pod(f"again-{index}", name, index, phase="Running")
            api.logs["again-0"] += ["from the checkpoint"]

        Story(api, runs, others, completes)
        said = run()
        assert [line for line in said if ":" not in line][1:] == ["first", "second", "from the checkpoint"]

    def test_a_queue_of_kueue(self, api: KubernetesApi, completes: Callable[[str], None]) -> None:
        Story(api, lambda name: api.set_status(name, "Suspended"), completes)
        assert f"{NAME}: waits in the queue gpus" in run()

    def test_one_that_runs_already_is_followed(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        """A task that is tried again, its first pod gone."""
        api.answer("POST", kubernetes_api._JOBS, {"fieldValidation": ["Strict"]}, self.job())
        made = api.jobs[NAME]["metadata"]["uid"] = "of the first try"
        Story(api, runs, lambda name: self.check(api.jobs[name]["metadata"]["uid"] == made), completes)
        said = run()
        assert said[0] == f"the TrainJob {NAMESPACE}/{NAME} is there already, and is followed"
        assert said[-2:] == ["third", f"{NAME}: complete"]

    def test_one_that_is_complete_already_is_not_run_again(self, api: KubernetesApi) -> None:
        api.answer("POST", kubernetes_api._JOBS, {"fieldValidation": ["Strict"]}, self.job())
        api.set_status(NAME, "Complete")
        assert run()[-1] == f"{NAME}: complete"

    def test_one_that_failed_before_makes_room(self, api: KubernetesApi, completes: Callable[[str], None]) -> None:
        api.answer("POST", kubernetes_api._JOBS, {"fieldValidation": ["Strict"]}, self.job())
        api.set_status(NAME, "Failed")
        Story(api, lambda name: None, completes)
        said = run()
        assert said[:2] == [
            f"the TrainJob {NAMESPACE}/{NAME} has failed before",
            f"the TrainJob {NAMESPACE}/{NAME} is created",
        ]
        assert said[-1] == f"{NAME}: complete"

    def test_one_that_is_on_its_way_out_makes_room(self, api: KubernetesApi, completes: Callable[[str], None]) -> None:
        api.answer("POST", kubernetes_api._JOBS, {"fieldValidation": ["Strict"]}, self.job())
        api.jobs[NAME]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

        def goes(name: str) -> None:
            if "deletionTimestamp" in api.jobs[name]["metadata"]:
                del api.jobs[name]

        Story(api, lambda name: None, goes, completes)
        said = run()
        assert said[0] == f"the TrainJob {NAMESPACE}/{NAME} is being deleted"
        assert said[-1] == f"{NAME}: complete"

    @staticmethod
    def job() -> dict[str, Any]:
        return train_job(NAME, TWO, COMMAND, runtime_kind="ClusterTrainingRuntime")

    @staticmethod
    def check(holds: bool) -> None:
        assert holds


class TestItsOwnPod:
    @pytest.fixture(autouse=True)
    def _pod(self, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(POD_VARIABLE, "own")
        api.add_pod("own", phase="Running", conditions=[])
        owner = client.V1OwnerReference(
            api_version="argoproj.io/v1alpha1", kind="Workflow", name="prune-x", uid="u-1", controller=True
        )
        api.pods["own"].metadata.owner_references = [owner]

    def test_image_and_owner(self, api: KubernetesApi, completes: Callable[[str], None]) -> None:
        seen: list[dict[str, Any]] = []
        Story(api, lambda name: seen.append(api.jobs[name]), completes)
        run(of=TWO.model_copy(update={"image": ""}))
        assert seen[0]["spec"]["trainer"]["image"] == "registry/moeprune:7"
        assert seen[0]["metadata"]["ownerReferences"] == [
            {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "prune-x", "uid": "u-1"}
        ]

    def test_a_run_that_is_cancelled_leaves_nothing(self, api: KubernetesApi, runs: Callable[[str], None]) -> None:
        Story(api, runs, lambda name: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="143"):
            run()
        assert not api.jobs

    def test_a_pod_that_is_taken_away_leaves_the_job_to_the_next(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        def taken(name: str) -> None:
            mark = client.V1PodCondition(type="DisruptionTarget", status="True", reason="PreemptionByScheduler")
            api.pods["own"].status.conditions = [mark]
            os.kill(os.getpid(), signal.SIGTERM)

        Story(api, runs, taken)
        with pytest.raises(SystemExit):
            run()
        assert NAME in api.jobs
        Story(api, completes)
        assert run()[0] == f"the TrainJob {NAMESPACE}/{NAME} is there already, and is followed"

    def test_no_image_outside_of_a_pod(self, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(POD_VARIABLE)
        with pytest.raises(InputError, match="which image"):
            run(of=TWO.model_copy(update={"image": ""}))


class TestFailures:
    def fails(self, api: KubernetesApi) -> Callable[[str], None]:
        def scene(name: str) -> None:
            out_of_memory = client.V1ContainerStateTerminated(exit_code=137, reason="OOMKilled")
            status = client.V1ContainerStatus(
                name="node",
                image="i",
                image_id="i",
                ready=False,
                restart_count=0,
                state=client.V1ContainerState(terminated=out_of_memory),
            )
            api.add_pod("pod-1", name, 1, phase="Failed", container_statuses=[status])
            api.logs["pod-1"] = ["of no interest", *["one of the last"] * 20]
            api.set_status(name, "Failed", "FailedJobs", "jobset failed")

        return scene

    def test_with_its_reason(self, api: KubernetesApi, runs: Callable[[str], None]) -> None:
        Story(api, runs, self.fails(api))
        said: list[str] = []
        with pytest.raises(ServiceError) as failure:
            run(said.append)
        assert str(failure.value) == (
            f"the TrainJob {NAME} failed: FailedJobs: jobset failed; pod-1 ended with code 137 (OOMKilled)"
        )
        assert said[-20:] == ["pod-1: one of the last"] * 20
        assert "pod-1: of no interest" not in said
        assert not api.jobs

    def test_an_image_that_nobody_can_pull(self, api: KubernetesApi) -> None:
        def stuck(name: str) -> None:
            waiting = client.V1ContainerStateWaiting(reason="ImagePullBackOff", message="no such tag")
            status = client.V1ContainerStatus(
                name="node",
                image="i",
                image_id="",
                ready=False,
                restart_count=0,
                state=client.V1ContainerState(waiting=waiting),
            )
            api.add_pod("pod-0", name, 0, phase="Pending", container_statuses=[status])

        Story(api, stuck)
        with pytest.raises(ServiceError, match="cannot start: pod-0: ImagePullBackOff no such tag"):
            run(seconds_for_obstacles=0.5)
        assert not api.jobs

    def test_only_obstacles_are_lost_patience_with(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        quiet = [lambda name: None] * 2
        Story(api, *quiet, runs, *quiet, completes)
        assert run(seconds_for_obstacles=0)[-1] == f"{NAME}: complete"

    def test_a_job_that_somebody_deletes(self, api: KubernetesApi, runs: Callable[[str], None]) -> None:
        Story(api, runs, lambda name: api.jobs.clear())
        with pytest.raises(ServiceError, match="somebody deleted"):
            run()

    @pytest.mark.parametrize(
        ("fault", "status", "kind", "said"),
        [
            (
                "POST .*trainjobs",
                403,
                ServiceError,
                r"may not create TrainJobs in the namespace team.*tion\.md",
            ),
            ("POST .*trainjobs", 404, ServiceError, r"namespace team.*Kubeflow Trainer 2\.2"),
            ("POST .*trainjobs", 422, ServiceError, "refuses to create TrainJobs: fault 422"),
            ("GET .*/pods$", 403, ServiceError, "may not list pods"),
            ("GET .*runtimes", 404, InputError, r"no TrainingRuntime moeprune-distill.*train-runtime\.yaml"),
        ],
    )
    def test_what_the_cluster_refuses(
        self, api: KubernetesApi, fault: str, status: int, kind: type[Exception], said: str
    ) -> None:
        api.faults[fault] = [status] * 9
        with pytest.raises(kind, match=said):
            run()
        assert not api.jobs

    def test_a_trainer_that_is_too_old(self, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
        """It does not know the patches, and says so instead of running without them."""

        def old(model: Any, manifest: Any) -> None:
            raise ValueError('unknown field "spec.runtimePatches"')

        monkeypatch.setattr(kubernetes_api, "strictly", old)
        with pytest.raises(ServiceError, match=r"refuses to create.*unknown field"):
            run()

    def test_a_namespace_that_is_not_there(self, api: KubernetesApi) -> None:
        api.runtimes["trainingruntimes"] = {}
        cluster = Cluster("nowhere", patience_seconds=1, first_pause_seconds=0.01)
        with pytest.raises(ServiceError, match="namespace nowhere"):
            run_train_job(NAME, TWO, COMMAND, cluster=cluster, say=lambda line: None)

    def test_a_runtime_for_something_else(self, api: KubernetesApi) -> None:
        api.add_runtime("trainingruntimes", DEFAULT_RUNTIME, "jax")  # the namespace's own comes before the cluster's
        with pytest.raises(InputError, match="for jax"):
            run()

    def test_no_cluster_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
        with pytest.raises(InputError, match="KUBECONFIG"):
            Cluster()


class TestAnApiWithMoods:
    @pytest.mark.parametrize(
        "fault", ["POST .*trainjobs", "GET .*trainjobs/", "GET .*/pods$", "GET .*runtimes", "DELETE"]
    )
    def test_what_passes_is_asked_for_again(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None], fault: str
    ) -> None:
        api.faults[fault] = [500, 429, None, 503]
        Story(api, runs, completes)
        assert run()[-2:] == ["third", f"{NAME}: complete"]
        assert not api.faults[fault]
        assert not api.jobs

    def test_a_log_that_cannot_be_read_for_a_while(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        api.faults["GET .*/log$"] = [502, 502]
        quiet = [lambda name: None] * 2
        Story(api, runs, *quiet, completes)
        assert [line for line in run() if ":" not in line][1:] == ["first", "second", "third"]

    def test_a_token_that_has_expired_is_read_again(
        self, api: KubernetesApi, runs: Callable[[str], None], completes: Callable[[str], None]
    ) -> None:
        path = Path(os.environ["KUBECONFIG"])
        server = yaml.safe_load(path.read_text())["clusters"][0]["cluster"]["server"]

        def expire(name: str) -> None:
            api.tokens = {"second"}
            api.on_unauthorized = lambda: kubernetes_api.write_kubeconfig(path, server, "second")

        Story(api, runs, expire, completes)
        assert run()[-2:] == ["third", f"{NAME}: complete"]

    def test_silence_leaves_the_job_to_the_next_try(self, api: KubernetesApi, runs: Callable[[str], None]) -> None:
        Story(api, runs)
        api.faults["GET .*/pods$"] = [503] * 1000
        with pytest.raises(NoAnswerError, match=r"in 0 s: fault 503; the TrainJob .* goes on"):
            run(patience=0.2)
        assert NAME in api.jobs
