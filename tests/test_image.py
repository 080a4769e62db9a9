"""The image from inside, held as the steps are: where there is a Docker engine (`make image-check`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

Inside = Callable[..., subprocess.CompletedProcess[str]]
TMP = ("--tmpfs", "/tmp")


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--image")
    if not name:
        pytest.skip("no image to look into: make image-check")
    return str(name)


@pytest.fixture(scope="module")
def inside(image: str) -> Inside:
    """Run a command inside."""

    def run(*command: str, options: tuple[str, ...] = TMP) -> subprocess.CompletedProcess[str]:
        held = ("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
        return subprocess.run(
            ["docker", "run", "--rm", *held, *options, image, *command], capture_output=True, text=True, check=False
        )

    return run


def test_is_not_root(inside: Inside) -> None:
    assert inside("id", "-u").stdout.strip() == "1000"


def test_writes_to_tmp_and_nowhere_else(inside: Inside) -> None:
    said = inside("sh", "-c", "touch /tmp/a && for at in / /opt/moeprune /home /var/tmp; do touch $at/a; done").stderr
    assert said.count("Read-only file system") == 4


def test_nothing_to_build_with(inside: Inside) -> None:
    tools = "pip pip3 cc gcc c++ ld make git curl wget"
    assert inside("sh", "-c", f"command -v {' '.join(tools.split())}").stdout == ""
    for module in ("pip", "setuptools", "ensurepip"):
        assert f"No module named '{module}'" in inside("python3", "-c", f"import {module}").stderr


def test_nothing_of_the_build_is_left(inside: Inside) -> None:
    assert inside("ls", "-A", "/tmp", "/run/secrets", options=()).stdout.split() in (
        ["/tmp:"],
        ["/tmp:", "/run/secrets:"],
    )
    assert inside("find", "/opt/moeprune", "-name", "*.a", "-o", "-name", "tests", "-o", "-name", "*.h").stdout == ""
    assert "PIP" not in inside("env").stdout
    assert "No such file" in inside("ls", "/build").stderr


def test_nobody_but_root_could_change_it(inside: Inside) -> None:
    assert (
        inside("find", "/opt/moeprune", "!", "-type", "l", "(", "!", "-user", "root", "-o", "-perm", "/022", ")").stdout
        == ""
    )


def test_the_executor_of_kubeflow_is_there(inside: Inside) -> None:
    """Components bring no packages of their own (install_kfp_package=False): what they run is in the image."""
    ran = inside("python3", "-m", "kfp.dsl.executor_main", "--help")
    assert "--executor_input" in ran.stdout, ran.stderr


def test_a_user_whom_the_image_does_not_know(inside: Inside) -> None:
    ran = inside("python3", "-c", "import getpass; print(getpass.getuser())", options=("--user", "1234567:0", *TMP))
    assert ran.stdout == "moeprune\n", ran.stderr


def test_what_steps_use_is_there(inside: Inside) -> None:
    modules = "moeprune.steps.prune, moeprune.steps.distill, moeprune.steps.evaluate, boto3, kubeflow, mlflow, peft"
    ran = inside("python3", "-W", "ignore", "-c", f"import {modules}")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_labels(image: str) -> None:
    command = ["docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image]
    labels = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert labels["org.opencontainers.image.title"] == "moeprune"
    assert len(labels["org.opencontainers.image.revision"].partition("-")[0]) == 40
    assert all(labels.values())
