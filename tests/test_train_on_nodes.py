"""End-to-end distillation by the nodes of a cluster: the command that its pods are given really trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_api
import pytest
import tiny
import torch
from kubernetes_api import KubernetesApi
from masking import draws, plain_logits

from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.distillation.end_to_end.job import Job, Training
from moeprune.distillation.end_to_end.processes import failure_file
from moeprune.distillation.end_to_end.telling import Event, EventFile
from moeprune.distillation.end_to_end.training import Outcome
from moeprune.distillation.text import Text
from moeprune.errors import InputError, ServiceError
from moeprune.steps.distill_end_to_end import distill_end_to_end
from moeprune.train_job import DEFAULT_RUNTIME, Cluster, Nodes, OnNodes
from moeprune.train_job.training import train_on_nodes

NODES = 1  # it takes as long to start one as all else together; more find each other by the same variables


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
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # as in the image
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
    return Nodes.of(count=NODES, volume="work", image="image", volume_path=str(tmp_path / "volume"))


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
        processes=NODES,
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
        self, api: KubernetesApi, job: Job, nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The whole step, from checkpoint to checkpoint; the teacher is brought to the volume for them."""
        out = tmp_path / "distilled"
        data = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.sentences(4, 60))
        with kubelet_of(api, tmp_path / "logs") as kubelet:
            outcome = distill_end_to_end(
                str(job.teacher),
                str(job.student),
                str(job.plan),
                str(data),
                str(out),
                elsewhere=OnNodes(nodes),
                block_tokens=16,
                max_blocks=10,
                batch_blocks=4,
                evaluations=2,
                learning_rate=1e-3,
            )
            assert len(kubelet.pods) == NODES
        assert outcome.better
        assert outcome.curve.keys() == {1, 2}
        assert not api.jobs
        assert "distill: 2/2" in capsys.readouterr().err
        before, after = (Checkpoint(directory).load() for directory in (job.student, out))
        assert not torch.equal(plain_logits(before, tiny.token_ids(7)), plain_logits(after, tiny.token_ids(7)))
        assert not [path for path in Path(nodes.volume_path).rglob("models") if path.is_dir()]  # nothing stays behind

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

    def test_what_is_over_is_not_begun_again(
        self, api: KubernetesApi, job: Job, nodes: Nodes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The task was lost while it wrote the checkpoint, and could not even remove the job."""
        over = Outcome(before=2, after=1, curve={}, held_out={}, tokens_per_second=1)

        def ends(it: dict[str, Any]) -> None:
            (job.directory / "outcome.json").write_text(over.model_dump_json())
            api.faults["DELETE"] = [403]
            api.set_status(it["metadata"]["name"], "Complete")

        api.on_look = ends
        assert train(job, nodes)[0] == over
        assert "is left behind (this task may not delete" in capsys.readouterr().err
        assert api.jobs
        assert train(job, nodes)[0] == over
        assert not api.jobs
        assert sum(request.startswith("POST") for request in api.requests) == 1

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

    def test_a_volume_that_is_not_mounted_here(self, job: Job, nodes: Nodes, tmp_path: Path) -> None:
        absent = nodes.model_copy(update={"volume_path": str(tmp_path / "absent")})
        with pytest.raises(InputError, match=r"volume work is not here.*absent"):
            distill_end_to_end("T", "S", "P", "D", str(tmp_path / "out"), elsewhere=OnNodes(absent))
        with pytest.raises(InputError, match="for one machine"):
            distill_end_to_end("T", "S", "P", "D", str(tmp_path / "out"), elsewhere=OnNodes(nodes), processes=2)

    def test_a_teacher_elsewhere_is_copied_once(self, api: KubernetesApi, job: Job, nodes: Nodes) -> None:
        copy = job.directory / "models" / "teacher" / "config.json"
        times = []

        def ends(it: dict[str, Any]) -> None:
            times.append(copy.stat().st_mtime_ns)
            assert Job.load(job.directory).teacher == copy.parent
            assert Job.load(job.directory).student == job.student  # on the volume already
            api.set_status(it["metadata"]["name"], "Complete")

        api.on_look = ends
        for _ in range(2):
            with pytest.raises(ServiceError):
                train(job, nodes)
        assert len(times) == 2
        assert times[0] == times[1]

    def test_nothing_is_copied_for_a_cluster_that_cannot_train(
        self, api: KubernetesApi, job: Job, nodes: Nodes
    ) -> None:
        api.runtimes["clustertrainingruntimes"].clear()
        with pytest.raises(InputError, match="no TrainingRuntime"):
            train(job, nodes)
        assert not (job.directory / "models").exists()
