"""End-to-end distillation by the nodes of a cluster: the command that its pods are given really trains."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_api
import pytest
import tiny
from kubernetes_api import KubernetesApi
from masking import draws

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.end_to_end.job import Job, Text, Training
from moeprune.distillation.end_to_end.keeping import Keeping
from moeprune.distillation.end_to_end.on_nodes import train_on_nodes
from moeprune.distillation.end_to_end.processes import failure_file
from moeprune.distillation.end_to_end.telling import Event, EventFile
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.errors import InputError, ServiceError
from moeprune.train_job import DEFAULT_RUNTIME, Cluster, Nodes


class Kubelet:
    """Runs what a TrainJob asks for as processes of this machine: a pod for each node, with what Kubeflow Trainer's
    torch runtime tells them of each other.
    """

    def __init__(self, api: KubernetesApi, logs: Path) -> None:
        self.api, self.logs = api, logs
        self.pods: list[subprocess.Popen] = []
        api.on_look = self.look

    def look(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        if not self.pods:
            self._start(job["spec"]["trainer"])
            for index in range(len(self.pods)):
                self.api.add_pod(f"pod-{index}", name, index, phase="Running")
        self.api.logs["pod-0"] = (self.logs / "0").read_text().splitlines()
        codes = [pod.poll() for pod in self.pods]
        if all(code == 0 for code in codes):
            self.api.set_status(name, "Complete")
        elif any(codes):
            self.api.set_status(name, "Failed", "FailedJobs", "jobset failed")

    def _start(self, trainer: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            **{variable["name"]: variable["value"] for variable in trainer["env"]},
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        for index in range(trainer["numNodes"]):
            with (self.logs / str(index)).open("wb") as log:
                self.pods.append(
                    subprocess.Popen(
                        trainer["command"],
                        env=environment | {"PET_NODE_RANK": str(index)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def stop(self) -> None:
        for pod in self.pods:
            if pod.poll() is None:
                os.killpg(pod.pid, 9)
            pod.wait()


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    api = KubernetesApi()
    api.add_runtime("clustertrainingruntimes", DEFAULT_RUNTIME)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with kubernetes_api.serving(api, tmp_path / "kubeconfig"):
        yield api


@contextmanager
def kubelet_of(api: KubernetesApi, logs: Path) -> Iterator[Kubelet]:
    logs.mkdir()
    kubelet = Kubelet(api, logs)
    try:
        yield kubelet
    finally:
        kubelet.stop()


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    (tmp_path / "volume").mkdir()
    return Nodes.of(count=2, volume="work", image="image", volume_path=str(tmp_path / "volume"))


@pytest.fixture
def job(tmp_path: Path, checkpoint_of: Callable[[str], Path], nodes: Nodes) -> Job:
    """The teacher is elsewhere, as a model of the hub would be; the student is on the volume already."""
    volume = Path(nodes.volume_path)
    source = Checkpoint(checkpoint_of("qwen2_moe"))
    layers = list(source.layout.layers)
    plan = tiny.plan_for(layers, draws(3, len(layers), [3, 6, 4][: len(layers)]), source.fingerprint)
    apply(source, plan, volume / "student")
    plan.save(volume / "plan.json")
    job = Job(
        teacher=source.directory,
        student=volume / "student",
        plan=volume / "plan.json",
        directory=volume / "work",
        objective="logits=1",
        parts=["experts", "router"],
        training=Training.of(batch_blocks=4, evaluations=2),
        processes=2,
    )
    job.save(Text(tiny.token_ids(5, blocks=8), tiny.token_ids(6, blocks=2)))
    return job


def train(job: Job, nodes: Nodes, **how: Any) -> tuple[Outcome, list[Event]]:
    events: list[Event] = []
    cluster = Cluster(patience_seconds=5, first_pause_seconds=0.01)
    outcome = train_on_nodes(
        job, events.append, nodes, cluster, say=lambda line: None, **{"seconds_between_looks": 0.1} | how
    )
    return outcome, events


class TestTrainOnNodes:
    def test_the_nodes_find_each_other_and_train(
        self, api: KubernetesApi, job: Job, nodes: Nodes, tmp_path: Path
    ) -> None:
        with kubelet_of(api, tmp_path / "logs") as kubelet:
            outcome, events = train(job, nodes)
            assert len(kubelet.pods) == 2
        assert outcome == Outcome.of(job.directory)
        assert outcome.curve.keys() == {1, 2}
        assert outcome.better
        assert Keeping(job.directory / "states").best()
        assert [(event.done, event.total) for event in events if event.total] == [(1, 2), (2, 2)]
        assert not api.jobs
        assert (job.directory / "models" / "teacher" / "config.json").is_file()
        assert not (job.directory / "models" / "student").exists()

    def test_an_error_that_the_user_can_mend(self, api: KubernetesApi, job: Job, nodes: Nodes) -> None:
        def fails(it: dict[str, Any]) -> None:
            failure_file(job.directory).write_text("training diverged at step 3")
            api.set_status(it["metadata"]["name"], "Failed", "FailedJobs", "jobset failed")

        api.on_look = fails
        with pytest.raises(InputError, match=r"^training diverged at step 3$"):
            train(job, nodes)
        assert not api.jobs

    def test_what_was_said_before_is_heard_by_the_next_try(self, api: KubernetesApi, job: Job, nodes: Nodes) -> None:
        file = EventFile.of(job.directory)
        file.clear()
        file.write(Event(done=1, total=3))

        def ends(it: dict[str, Any]) -> None:
            if api.looks == 2:
                file.write(Event(done=3, total=3))
                (job.directory / "outcome.json").write_text(
                    Outcome(before=2, after=1, curve={}, held_out={}, tokens_per_second=1).model_dump_json()
                )
                api.set_status(it["metadata"]["name"], "Complete")

        api.on_look = ends
        outcome, events = train(job, nodes, seconds_between_looks=0.01)
        assert outcome.after == 1
        assert [event.done for event in events] == [1, 3]

    def test_a_job_that_fails_without_a_word(self, api: KubernetesApi, job: Job, nodes: Nodes) -> None:
        failure_file(job.directory).write_text("of an earlier try")
        api.on_look = lambda it: api.set_status(it["metadata"]["name"], "Failed", "FailedJobs", "jobset failed")
        with pytest.raises(ServiceError, match="FailedJobs: jobset failed"):
            train(job, nodes)

    def test_a_job_that_ends_without_a_result(self, api: KubernetesApi, job: Job, nodes: Nodes) -> None:
        api.on_look = lambda it: api.set_status(it["metadata"]["name"], "Complete")
        with pytest.raises(ServiceError, match="without a result"):
            train(job, nodes)

    def test_work_that_the_nodes_cannot_reach(self, job: Job, nodes: Nodes, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot reach .*elsewhere; .*volume work"):
            train_on_nodes(job.model_copy(update={"directory": tmp_path / "elsewhere"}), lambda event: None, nodes)
