"""`moeprune submit` against a server that speaks the API of Kubeflow Pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as api
import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from hypothesis import given
from hypothesis import strategies as st
from pipelines_api import PipelinesApi, serving

from moeprune.cli.checks import check_values
from moeprune.errors import InputError
from moeprune.pipelines.compile import compiled
from moeprune.pipelines.submission import following, parameter_file, server
from moeprune.pipelines.submission.package import Package
from moeprune.pipelines.workspace import Workspace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.parse(compiled("prune"))


@pytest.fixture
def kubeflow() -> PipelinesApi:
    return PipelinesApi()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("first\n")
    return file


@pytest.fixture
def submit(
    kubeflow: PipelinesApi,
    package: Package,
    token: Path,
    tmp_path: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """`moeprune submit ...` to that server, with a package that was compiled once; nothing waits long."""
    monkeypatch.setattr(server, "_PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(following, "EVERY_SECONDS", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp keeps a namespace in it
    file = tmp_path / "prune.yaml"
    file.write_text(package.text)
    with serving(kubeflow) as host:
        yield lambda *options: run_cli(
            "submit", "--host", host, "--token-file", token, "--package", file, "--run-name", "it", *options
        )


def ends(kubeflow: PipelinesApi, *states: str, **details: Any) -> None:
    """Let a run go through states, one for each look at it; with the last one come the details."""
    left = list(states)

    def look(run: api.V2beta1Run) -> None:
        run.state = left.pop(0) if len(left) > 1 else left[0]
        if len(left) == 1 and run.state == states[-1]:
            for name, value in details.items():
                setattr(run, name, value)

    kubeflow.on_look = look


def task(name: str, state: str, **details: Any) -> api.V2beta1PipelineTaskDetail:
    return api.V2beta1PipelineTaskDetail(task_id=f"id of {name}", display_name=name, state=state, **details)


class TestWhatIsSent:
    def test_a_pipeline_a_version_an_experiment_and_a_run(
        self, submit: Run, kubeflow: PipelinesApi, package: Package, tmp_path: Path
    ) -> None:
        (tmp_path / "parameters.yaml").write_text("model: s3://bucket/model\nratio: 0.25\nlearning_rate: 1e-2\n")
        code, out, err = submit(
            "--parameters", tmp_path / "parameters.yaml", "--set", "ratio=0.75", "--set", "baselines=[random]",
            "--service-account", "runner", "--pipeline-root", "s3://bucket/runs", "--experiment", "law",
        )  # fmt: skip
        assert (code, err) == (0, "")
        (pipeline,), (version,), (experiment,), (run,) = (
            list(those.values())
            for those in (kubeflow.pipelines, kubeflow.versions, kubeflow.experiments, kubeflow.runs)
        )
        assert (pipeline.name, pipeline.description) == ("moeprune-prune", package.description)
        assert kubeflow.files[version.pipeline_version_id] == package.text.encode()
        assert version.name.endswith(package.digest[:12])
        assert experiment.display_name == "law"
        assert run.display_name == "it"
        assert run.experiment_id == experiment.experiment_id
        assert run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
        assert run.runtime_config.parameters == {
            "model": "s3://bucket/model",
            "ratio": 0.75,
            "learning_rate": 0.01,
            "baselines": ["random"],
        }
        assert (run.service_account, run.runtime_config.pipeline_root) == ("runner", "s3://bucket/runs")
        assert f"/pipeline/#/runs/details/{run.run_id}" in out
        assert f"/pipeline/#/pipelines/details/{pipeline.pipeline_id}/version/{version.pipeline_version_id}" in out

    def test_the_same_bytes_are_no_new_version(self, submit: Run, kubeflow: PipelinesApi) -> None:
        for _ in range(2):
            assert submit()[0] == 0
        assert (len(kubeflow.pipelines), len(kubeflow.versions), len(kubeflow.runs)) == (1, 1, 2)

    def test_other_bytes_are(self, submit: Run, kubeflow: PipelinesApi, package: Package, tmp_path: Path) -> None:
        """Also where there are more versions than fit on a page of the server's answer."""
        for number in range(4):
            (tmp_path / "prune.yaml").write_text(f"{package.text}# {number}\n")
            assert submit("--upload-only")[0] == 0
        (tmp_path / "prune.yaml").write_text(f"{package.text}# 3\n")
        code, out, _ = submit("--upload-only")
        assert code == 0
        assert "was there" in out
        assert (len(kubeflow.pipelines), len(kubeflow.versions), len(kubeflow.runs)) == (1, 4, 0)

    def test_a_dry_run_sends_nothing(self, submit: Run, kubeflow: PipelinesApi) -> None:
        code, out, _ = submit("--dry-run", "--set", "ratio=0.25")
        assert code == 0
        shown = json.loads(out[out.index("{") :])
        assert (shown["ratio"], shown["method"]) == (0.25, "fuse")
        assert not kubeflow.requests


class TestWhatIsRefusedBeforeAnythingIsSent:
    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("ratioo=0.5", "has no parameter ratioo; did you mean ratio?"),
            ("zzz=1", "has no parameter zzz; it has baselines, "),
            ("ratio=half", "ratio is a number, not 'half'"),
            ("ratio=true", "ratio is a number, not True"),
            ("ratio=.nan", "ratio is a number, not nan"),
            ("block_tokens=1.5", "block_tokens is a whole number, not 1.5"),
            ("trust_remote_code=1", "trust_remote_code is true or false, not 1"),
            ("baselines=random", "baselines is a list, not 'random'"),
            ("method_options=[1]", "method_options is an object, not [1]"),
            ("ratio", "'ratio' is not of the form NAME=VALUE"),
            ("baselines=[", "the value of baselines cannot be read"),
        ],
    )
    def test_values(self, submit: Run, kubeflow: PipelinesApi, setting: str, said: str) -> None:
        code, _, err = submit("--set", setting)
        assert code == 1
        assert said in err
        assert err.count("\n") == 1
        assert not kubeflow.requests

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("- 1", "one value for each name"),
            ("1: 2", "one value for each name"),
            ("a: [", "neither YAML nor JSON"),
            ("ratio: 0.5\nratio: 0.6", "ratio is there twice"),
            ("model: 5", "model is a text, not 5"),
        ],
    )
    def test_files(self, submit: Run, kubeflow: PipelinesApi, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "file.yaml").write_text(text)
        code, _, err = submit("-p", tmp_path / "file.yaml")
        assert code == 1
        assert said in err
        assert not kubeflow.requests

    def test_what_is_wrong_though_its_type_is_right(self, run_cli: Run) -> None:
        code, _, err = run_cli("submit", "--host", "http://127.0.0.1:9", "--set", "method=magic")
        assert code == 1
        assert "magic" in err

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"distillation_objective": "magic=1"}, "'magic', which is no objective"),
            ({"distillation_objective": "logits=1"}, "needs the whole model"),
            ({"distillation_parts": "heads"}, "'heads', which is no part"),
            ({"distillation_parts": "lora"}, "makes sense of a whole model only"),
            ({"distillation_epochs": 0}, "all must be above 0"),
            ({"distillation_memory_limit": "much"}, "'much' is not a size"),
            ({"distillation_nodes": 2, "distillation_training": {"objective": "magic=1"}}, "which is no objective"),
            ({"distillation_nodes": 2, "distillation_training": {"learning_rate": 0}}, "learning_rate"),
            ({"distillation_nodes": 2, "distillation_parts": "heads"}, "'heads', which is no part"),
        ],
    )
    def test_what_distillation_could_not_do(self, values: dict[str, Any], said: str, package: Package) -> None:
        with pytest.raises(InputError, match=said):
            check_values(package.with_defaults(values))

    def test_what_it_can_do_on_nodes(self, package: Package) -> None:
        training = {"objective": "logits=1", "learning_rate": 1e-5, "work": "/mnt/moeprune/mine"}
        wanted = {"distillation_nodes": 2, "distillation_parts": "lora", "distillation_training": training}
        check_values(package.with_defaults(wanted))

    @pytest.mark.parametrize("text", ["", "a: 1", "[", "components: {}\nroot: 5\npipelineInfo: {name: x}"])
    def test_packages_that_are_none(self, run_cli: Run, tmp_path: Path, text: str) -> None:
        (tmp_path / "other.yaml").write_text(text)
        code, _, err = run_cli("submit", "--host", "http://127.0.0.1:9", "--package", tmp_path / "other.yaml")
        assert code == 1
        assert "make compile" in err

    def test_an_image_that_is_none(self, run_cli: Run) -> None:
        assert "is not the name of an image" in run_cli("submit", "--image", "a b: c")[2]

    def test_a_token_file_that_is_not_there(self, submit: Run, kubeflow: PipelinesApi) -> None:
        assert "cannot be read" in submit("--token-file", "/no/such/token")[2]
        assert not kubeflow.requests

    def test_no_address_at_all(self, run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
        code, _, err = run_cli("submit")
        assert code == 1
        assert "KF_PIPELINES_ENDPOINT" in err


class TestNamespaces:
    @pytest.fixture(autouse=True)
    def _many_users(self, kubeflow: PipelinesApi) -> None:
        kubeflow.namespaces = {"team"}

    def test_everything_is_in_it(self, submit: Run, kubeflow: PipelinesApi) -> None:
        assert submit("--namespace", "team")[0] == 0
        (pipeline,), (experiment,) = kubeflow.pipelines.values(), kubeflow.experiments.values()
        assert (pipeline.namespace, experiment.namespace) == ("team", "team")

    def test_one_is_needed(self, submit: Run, kubeflow: PipelinesApi) -> None:
        assert "whose namespace with --namespace" in submit()[2]
        assert kubeflow.requests == ["GET /healthz"]

    def test_one_that_is_not_there(self, submit: Run, kubeflow: PipelinesApi) -> None:
        code, _, err = submit("--namespace", "temm")
        assert code == 1
        assert '404 namespaces "temm" not found' in err
        assert not kubeflow.runs

    def test_where_there_are_none(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.namespaces = set()
        assert "leave --namespace out" in submit("--namespace", "team")[2]


class TestTokens:
    def test_one_that_expired_is_read_again(self, submit: Run, kubeflow: PipelinesApi, token: Path) -> None:
        """It is replaced between our reading it and the server's look at it."""
        kubeflow.tokens = {"second"}
        kubeflow.on_unauthorized = lambda: token.write_text("second")  # type: ignore[assignment]
        assert submit()[0] == 0
        assert len(kubeflow.runs) == 1
        assert kubeflow.requests[:2] == ["GET /healthz", "GET /healthz"]

    def test_one_that_expires_while_the_run_is_followed(self, submit: Run, kubeflow: PipelinesApi, token: Path) -> None:
        ends(kubeflow, "RUNNING", "SUCCEEDED")
        seen: list[str] = []

        def look(run: api.V2beta1Run) -> None:
            seen.append(run.run_id)
            run.state = "RUNNING" if len(seen) == 1 else "SUCCEEDED"
            kubeflow.tokens = {"second"}

        kubeflow.on_look = look
        kubeflow.on_unauthorized = lambda: token.write_text("second")  # type: ignore[assignment]
        code, out, _ = submit("--wait")
        assert code == 0
        assert "succeeded" in out

    def test_one_that_nobody_renews(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.tokens = {"other"}
        code, _, err = submit()
        assert code == 1
        assert "401" in err
        assert "renew it" in err
        assert len(kubeflow.requests) == 2
        assert "first" not in err

    def test_one_that_may_not(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.faults = {"POST /runs": [403]}
        code, _, err = submit()
        assert code == 1
        assert "may not do this" in err


class TestOthersAtTheSameTime:
    def test_they_make_the_same_pipeline_experiment_and_version(
        self, submit: Run, kubeflow: PipelinesApi, package: Package
    ) -> None:
        """Each comes into being between our look and our try."""
        kubeflow.before = {
            "POST /pipelines": [lambda: kubeflow.add_pipeline(_pipeline()) and None],
            "POST /pipelines/upload_version": [lambda: _upload_as_another(kubeflow, package)],
            "POST /experiments": [
                lambda: kubeflow.add_experiment(api.V2beta1Experiment(display_name="moeprune")) and None
            ],
        }
        code, out, err = submit()
        assert (code, err) == (0, "")
        assert "was there" in out
        assert [len(those) for those in (kubeflow.pipelines, kubeflow.versions, kubeflow.experiments)] == [1, 1, 1]
        (run,) = kubeflow.runs.values()
        assert run.pipeline_version_reference.pipeline_version_id == "version-1"
        assert run.experiment_id == "experiment-1"

    def test_a_conflict_that_cannot_be_explained_is_told(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.faults = {"POST /pipelines": [409]}
        code, _, err = submit()
        assert code == 1
        assert "409" in err

    def test_an_archived_experiment(self, submit: Run, kubeflow: PipelinesApi) -> None:
        archived = api.V2beta1ExperimentStorageState.ARCHIVED
        kubeflow.add_experiment(api.V2beta1Experiment(display_name="moeprune", storage_state=archived))
        assert "is archived" in submit()[2]


def _pipeline() -> api.V2beta1Pipeline:
    return api.V2beta1Pipeline(name="moeprune-prune", display_name="moeprune-prune")


def _upload_as_another(kubeflow: PipelinesApi, package: Package) -> None:
    import moeprune

    name = f"{moeprune.__version__}-{package.digest[:12]}"
    kubeflow.add_version("pipeline-1", name, package.text.encode())


class TestFaults:
    def test_passing_ones_are_waited_out(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.faults = {"GET /healthz": [503, 502], "GET /pipelines/names/.*": [None], "GET /experiments": [429]}
        assert submit()[0] == 0

    def test_lasting_ones_are_told(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.faults = {"GET /healthz": [503] * 9}
        code, _, err = submit()
        assert code == 1
        assert "503 fault 503" in err

    def test_a_run_is_not_started_twice(self, submit: Run, kubeflow: PipelinesApi) -> None:
        kubeflow.faults = {"POST /runs": [503]}
        assert submit()[0] == 1
        assert kubeflow.requests.count("POST /runs") == 1

    def test_a_server_that_is_not_there(self, run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "_PAUSES_SECONDS", ())
        monkeypatch.setenv("HOME", str(tmp_path))
        code, _, err = run_cli("submit", "--host", "http://127.0.0.1:9", "--set", "model=a/b")
        assert code == 1
        assert "http://127.0.0.1:9 does not answer" in err


class TestWaiting:
    def test_for_a_run_that_succeeds(self, submit: Run, kubeflow: PipelinesApi) -> None:
        details = api.V2beta1RunDetails(task_details=[task("calibrate", "SUCCEEDED")])
        ends(kubeflow, "PENDING", "RUNNING", "SUCCEEDED", run_details=details)
        code, out, _ = submit("--wait")
        assert code == 0
        assert out.count("calibrate") == 1
        assert sum(line.startswith("GET /runs/") for line in kubeflow.requests) == 3

    def test_for_one_that_fails(self, submit: Run, kubeflow: PipelinesApi) -> None:
        child = api.PipelineTaskDetailChildTask(task_id="id of distill")
        tasks = [
            task("calibrate", "SUCCEEDED"),
            task("for-loop-1", "FAILED", child_tasks=[child]),
            task("distill", "FAILED", error=api.GoogleRpcStatus(code=2, message="out of\nmemory")),
        ]
        ends(kubeflow, "RUNNING", "FAILED", run_details=api.V2beta1RunDetails(task_details=tasks))
        code, _, err = submit("--wait")
        assert code == 1
        assert "the run failed (distill: out of memory)" in err

    def test_for_one_that_is_cancelled(self, submit: Run, kubeflow: PipelinesApi) -> None:
        ends(kubeflow, "CANCELING", "CANCELED")
        code, _, err = submit("--wait")
        assert code == 1
        assert "the run was cancelled" in err

    def test_not_for_ever(self, submit: Run, kubeflow: PipelinesApi) -> None:
        ends(kubeflow, "RUNNING")
        code, _, err = submit("--wait", "--timeout", "0")
        assert code == 1
        assert "it goes on" in err


class TestWorkspaces:
    def test_the_pipeline_has_it(self, run_cli: Run) -> None:
        code, out, err = run_cli("submit", "--dry-run", "--workspace", "3Gi", "--workspace-access", "ReadWriteOnce")
        assert code == 0, err
        wanted = compiled("prune", workspace=Workspace("3Gi", access_mode="ReadWriteOnce"))
        assert Package.parse(wanted).digest[:12] in out

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--workspace", "big"], "of a size such as 200Gi, not 'big'"),
            (["--workspace", "1Gi", "--workspace-access", "Many"], "ReadWriteMany or ReadWriteOnce, not 'Many'"),
            (["--workspace-class", "shared"], "a workspace has a size, too"),
        ],
    )
    def test_it_can_be_none(self, run_cli: Run, options: list[str], said: str) -> None:
        code, _, err = run_cli("submit", "--dry-run", *options)
        assert code == 1
        assert said in " ".join(err.split())

    def test_a_compiled_pipeline_has_its_own(self, submit: Run) -> None:
        code, _, err = submit("--dry-run", "--workspace", "1Gi")
        assert code == 1
        assert "has its image and its workspace already" in err


class TestPackages:
    def test_the_image_is_the_only_difference(self, package: Package) -> None:
        other = compiled("prune", "registry.example:5000/team/moeprune@sha256:" + "0" * 64)
        ours, theirs = (list(yaml.safe_load_all(text)) for text in (package.text, other))
        ours_by_name, theirs_by_name = (it[0]["deploymentSpec"]["executors"] for it in (ours, theirs))
        for name, executor in theirs_by_name.items():
            if "container" in executor:
                assert executor["container"]["image"].startswith("registry.example:5000/")
                executor["container"]["image"] = ours_by_name[name]["container"]["image"]
        assert ours == theirs

    @given(st.data())
    def test_a_value_of_the_type_is_taken_and_any_other_is_not(self, package: Package, data: st.DataObject) -> None:
        number = st.floats(allow_nan=False, allow_infinity=False)
        of_type = {
            "STRING": st.text(),
            "NUMBER_INTEGER": st.integers(),
            "NUMBER_DOUBLE": number,
            "BOOLEAN": st.booleans(),
            "LIST": st.lists(st.text()),
            "STRUCT": st.dictionaries(st.text(), st.integers()),
        }
        name = data.draw(st.sampled_from(sorted(package.parameters)))
        kind = data.draw(st.sampled_from(sorted(of_type)))
        value = data.draw(of_type[kind])
        wanted = package.parameters[name].type
        if kind == wanted or (kind, wanted) == ("NUMBER_INTEGER", "NUMBER_DOUBLE"):
            assert package.checked({name: value}) == {name: value}
        else:
            with pytest.raises(InputError, match=name):
                package.checked({name: value})

    @given(st.dictionaries(st.text("abc_", min_size=1), st.floats(allow_nan=False) | st.integers()))
    def test_a_json_file_says_what_json_says(self, values: dict[str, Any]) -> None:
        text = json.dumps({name: value for name, value in values.items() if abs(value) != float("inf")})
        assert yaml.load(text, Loader=parameter_file._Loader) == json.loads(text)
