"""Training in two processes that share the model (FSDP2): the same as in one, really shared, continued when killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from training import Pair, in_processes, make_pair, unheard

from moeprune.distillation.end_to_end.keeping import Keeping
from moeprune.distillation.end_to_end.processes import command, train_in_processes
from moeprune.distillation.end_to_end.telling import Event
from moeprune.distillation.end_to_end.trainer import DistillationTrainer
from moeprune.distillation.end_to_end.training import Outcome, train

ROUNDING = 2e-6
STEPS = 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts=1,block=0.5": ("experts,router,shared", {"accumulation": 2}),
    "logits=1,text=0.5,temperature=2": ("all", {"teacher_outputs": "cached", "gradient_checkpointing": True}),
    "logits=1,block=1": ("lora,router", {"accumulation": 2}),
}


@pytest.fixture(scope="module")
def pair(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(qwen, tmp_path_factory.mktemp("processes") / "pair")


@pytest.fixture(scope="module")
def together(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, each in a directory of its number, done by one pair of processes."""
    root = tmp_path_factory.mktemp("together")
    jobs = [
        pair.job(root / str(number), objective, parts, processes=2, **settings)
        for number, (objective, (parts, settings)) in enumerate(CASES.items())
    ]

    def work() -> None:
        for job in jobs:
            with_shares_noted(job.directory, lambda job=job: train(job, unheard))  # type: ignore[misc]

    assert in_processes(2, work) == [0, 0]
    return root


def with_shares_noted(directory: Path, work: Callable[[], object]) -> None:
    """Note, in each process, how much of each parameter and of its optimizer's state it has when a state is saved."""
    original = DistillationTrainer._save_checkpoint

    def save(self: DistillationTrainer, model: torch.nn.Module, trial: Any) -> None:
        noted = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.optimizer.state.get(parameter, {})
            tensors = [parameter, *(state[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in state)]
            shares = [tensor.to_local().numel() for tensor in tensors if isinstance(tensor, DTensor)]
            noted[name] = [parameter.numel(), *shares]
        (directory / f"shares-{os.environ['RANK']}.json").write_text(json.dumps(noted))
        original(self, model, trial)

    DistillationTrainer._save_checkpoint = save  # type: ignore[method-assign]
    try:
        work()
    finally:
        DistillationTrainer._save_checkpoint = original  # type: ignore[method-assign]


def best(directory: Path) -> dict[str, torch.Tensor]:
    return Keeping(directory / "states").best()


def outcome(directory: Path) -> Outcome:
    found = Outcome.of(directory)
    assert found
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_two_processes_train_as_one_does(number: int, together: Path, pair: Pair, tmp_path: Path) -> None:
    objective, (parts, settings) = list(CASES.items())[number]
    train(pair.job(tmp_path / "one", objective, parts, **settings), unheard)
    assert_same_but_for_rounding(tmp_path / "one", together / str(number))


def assert_same_but_for_rounding(alone: Path, shared: Path) -> None:
    made = outcome(alone)
    assert len(made.curve) == STEPS
    assert outcome(shared).curve == pytest.approx(made.curve, abs=ROUNDING, rel=ROUNDING)
    assert outcome(shared).held_out == pytest.approx(made.held_out, abs=ROUNDING, rel=ROUNDING)
    assert made.better
    one, two = best(alone), best(shared)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), name


def test_each_process_has_its_share_of_the_model_and_of_the_optimizer(together: Path, pair: Pair) -> None:
    mine, others = (json.loads((together / "1" / f"shares-{rank}.json").read_text()) for rank in range(2))
    model = pair.student.load(torch.float32)
    assert mine.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        whole, here, *moments = mine[name]
        assert whole == parameter.numel(), name
        assert here + others[name][1] == whole, name
        assert moments == [here, here], name
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(here for _, here, *_ in mine.values()) < 0.55 * total


def test_killed_it_goes_on_and_ends_with_the_same_weights(together: Path, pair: Pair, tmp_path: Path) -> None:
    objective, (parts, settings) = next(iter(CASES.items()))
    job = pair.job(tmp_path / "job", objective, parts, processes=2, **settings)

    def kill(event: Event) -> None:
        if event.done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_processes(2, lambda: train(job, kill))[0] == -signal.SIGKILL
    assert Outcome.of(job.directory) is None
    state = Keeping(job.directory / "states").last
    assert state is not None
    assert state.name == "checkpoint-2"
    heard = job.directory / "heard.json"

    def listen(event: Event) -> None:
        with heard.open("a") as file:
            file.write(f"{event.done}\n")

    assert in_processes(2, lambda: train(job, listen)) == [0, 0]
    done = [int(line) for line in heard.read_text().split() if line != "0"]
    assert done == [3, 4, 5, 6]
    uninterrupted = together / "0"
    one, two = best(uninterrupted), best(job.directory)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert outcome(job.directory).curve == outcome(uninterrupted).curve
    assert outcome(job.directory).held_out == outcome(uninterrupted).held_out


def test_torchrun_starts_them(pair: Pair, tmp_path: Path) -> None:
    """One of them, since a new process takes longer to import than to train; several nodes in `test_train_on_nodes`."""
    assert "--nproc-per-node=2" in command(tmp_path, 2)
    events: list[Event] = []
    made = train_in_processes(pair.job(tmp_path / "job", "logits=1", "router"), events.append)
    assert made == outcome(tmp_path / "job")
    assert len(made.curve) == STEPS
    assert made.better
    assert [event.done for event in events if event.total] == list(range(1, STEPS + 1))
    assert {name for event in events for name in event.metrics} >= {
        "training_loss",
        "learning_rate",
        "held_out_loss",
        "held_out_logits",
        "throughput_tokens_per_second",
        "peak_memory_bytes",
    }
