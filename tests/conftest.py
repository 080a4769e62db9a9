"""What the tests share. All of it is made in temporary directories; nothing is downloaded."""

# ruff: noqa: E402
from __future__ import annotations

import os
import shutil
import tempfile

# The libraries read these when they are imported: their caches go to a directory of this test run.
_HOME = tempfile.mkdtemp(prefix="moeprune-tests-")
os.environ |= {"HF_HOME": _HOME, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "KFP_", "MOEPRUNE_"))]:
    if _name not in {"MLFLOW_DISABLE_TELEMETRY", "MOEPRUNE_CPRUNE_REFERENCE"}:
        del os.environ[_name]  # the user's own services are not to be tested on

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from moeprune.checkpoint.loading import Checkpoint
from moeprune.services import Services, session
from moeprune.services.ports import free_ports

# How long an example takes is no property of the code: the first may import scikit-learn.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from tests/test_families.py")
    parser.addoption("--image", default="", help="name of an image to look into (tests/test_image.py)")
    parser.addoption(
        "--write-methods", action="store_true", help="write the tables of docs/methods.md from the methods"
    )


@pytest.fixture(scope="session", autouse=True)
def _clean_home() -> Iterator[None]:
    yield
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny checkpoint of a family, written once."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        directory = root / family
        return directory if directory.is_dir() else tiny.write(directory, tiny.FAMILIES[family]())

    return get


@pytest.fixture(scope="session")
def model_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """That checkpoint in memory, loaded once; whoever changes it takes a copy."""
    loaded: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in loaded:
            loaded[family] = Checkpoint(checkpoint_of(family)).load()
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def qwen(checkpoint_of: Callable[[str], Path]) -> Path:
    """The checkpoint for tests to which the family does not matter."""
    return checkpoint_of("qwen2_moe")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of some 2,000 tokens."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("texts") / "corpus.jsonl", tiny.sentences(1, 60))


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """A real MLflow server and a real S3 server, on free ports."""
    with session(tmp_path_factory.mktemp("services"), *free_ports(2)) as running:
        yield running


@pytest.fixture
def connected(services: Services, monkeypatch: pytest.MonkeyPatch) -> Services:
    """The environment of a user of both services."""
    for name, value in services.environment().items():
        monkeypatch.setenv(name, value)
    return services


@pytest.fixture
def client(connected: Services) -> Any:
    """Of S3. A session of its own, not the process's, which remembers another test's key."""
    import boto3

    return boto3.Session().client("s3")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process, by its entry point: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from moeprune.cli import main

        monkeypatch.setattr(sys, "argv", ["moeprune", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
