"""`moeprune submit`: a run on a cluster, by the API of Kubeflow Pipelines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune.cli.app import app, console
from moeprune.errors import InputError

if TYPE_CHECKING:
    from moeprune.pipelines.workspace import Workspace


@app.command()
def submit(
    pipeline: Annotated[str, typer.Argument(metavar="[prune|sweep]", help="which of moeprune's pipelines")] = "prune",
    parameters: Annotated[
        Path | None,
        typer.Option("--parameters", "-p", metavar="FILE", help="values of its parameters: YAML or JSON, NAME: VALUE"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="value of a parameter, before that of the file; repeatable; docs/launch_form.md lists them all",
        ),
    ] = None,
    package: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a pipeline that was compiled earlier, instead of compiling it now"),
    ] = None,
    image: Annotated[
        str,
        typer.Option(metavar="IMAGE", help="that the steps run in; default: $MOEPRUNE_IMAGE, else moeprune:VERSION"),
    ] = "",
    workspace: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="of a volume that the tasks of the run share, such as 200Gi, so that the model is brought from where "
            "it lies once; default: none (docs/cluster.md)",
        ),
    ] = "",
    workspace_class: Annotated[str, typer.Option(metavar="NAME", help="storage class of that volume")] = "",
    workspace_access: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="of that volume: ReadWriteMany, or ReadWriteOnce where a run has but one node; default: the first",
        ),
    ] = "",
    host: Annotated[
        str,
        typer.Option(
            envvar="KF_PIPELINES_ENDPOINT",
            metavar="URL",
            help="of the API, such as https://kubeflow.example/pipeline; default: by way of the kubeconfig",
            show_default=False,
        ),
    ] = "",
    ui: Annotated[
        str,
        typer.Option(
            envvar="KF_PIPELINES_UI_ENDPOINT",
            metavar="URL",
            help="for the links, where it is not the host",
            show_default=False,
        ),
    ] = "",
    token_file: Annotated[
        str,
        typer.Option(
            envvar="KF_PIPELINES_TOKEN_FILE",
            metavar="FILE",
            help="with a bearer token; read again for every request, so whoever renews it can",
            show_default=False,
        ),
    ] = "",
    ca_file: Annotated[
        str, typer.Option(metavar="FILE", help="certificates to trust, where they are not the usual ones")
    ] = "",
    namespace: Annotated[
        str, typer.Option(envvar="KF_PIPELINES_NAMESPACE", help="whose run it is, where Kubeflow has many users")
    ] = "",
    kubeflow_namespace: Annotated[
        str, typer.Option(help="where Kubeflow Pipelines itself is, for the kubeconfig's way")
    ] = "kubeflow",
    pipeline_name: Annotated[
        str,
        typer.Option(metavar="NAME", help="of the pipeline on the server; default: its own, such as moeprune-prune"),
    ] = "",
    experiment: Annotated[str, typer.Option(metavar="NAME", help="of Kubeflow, that the run belongs to")] = "moeprune",
    run_name: Annotated[str, typer.Option(metavar="NAME", help="default: the pipeline, the method and the time")] = "",
    service_account: Annotated[str, typer.Option(metavar="NAME", help="of the pods; default: Kubeflow's")] = "",
    pipeline_root: Annotated[
        str, typer.Option(metavar="URL", help="where artifacts go, such as s3://bucket/runs; default: Kubeflow's")
    ] = "",
    upload_only: Annotated[bool, typer.Option("--upload-only", help="start no run")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, show what it would be, send nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="for its end; exit code 1 where it does not end well")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="to wait at most; the run goes on after it")
    ] = None,
) -> None:
    """Upload a pipeline to Kubeflow, if its bytes are new there, and start a run of it.

    The values of the parameters are checked before anything is sent.
    """
    _require_kubeflow()
    from moeprune.pipelines.submission import parameter_file
    from moeprune.pipelines.submission.following import follow
    from moeprune.pipelines.submission.server import Address, Server
    from moeprune.pipelines.submission.submitting import check_namespace, start, upload
    from moeprune.pipelines.workspace import Workspace

    compiled = _package(pipeline, package, image, Workspace.of(workspace, workspace_class, workspace_access))
    values = parameter_file.read(parameters) if parameters else {}
    values |= parameter_file.parse(settings or [], compiled.parameters)
    values = compiled.checked(values)
    if package is None:
        _check(pipeline, compiled.with_defaults(values))
    pipeline_name = pipeline_name or compiled.name
    if dry_run:
        console.print(f"pipeline    {pipeline_name}, {len(compiled.text):,} bytes, sha256 {compiled.digest[:12]}")
        console.print(json.dumps(compiled.with_defaults(values), indent=2), highlight=False, markup=False)
        return
    address = Address(host, ui, token_file, ca_file, kubeflow_namespace)
    server = Server(address)
    check_namespace(server, namespace)
    version = upload(server, compiled, pipeline_name, namespace)
    place = address.link(f"pipelines/details/{version.pipeline_id}/version/{version.version_id}")
    _say("pipeline", f"{pipeline_name} {version.name} ({'uploaded' if version.is_new else 'was there'})  {place}")
    if upload_only:
        return
    name = run_name or f"{compiled.name} {values.get('method', '')} {time.strftime('%Y-%m-%d %H:%M:%S')}".replace(
        "  ", " "
    )
    run = start(
        server,
        version,
        values,
        run_name=name,
        experiment=experiment,
        namespace=namespace,
        service_account=service_account,
        pipeline_root=pipeline_root,
    )
    _say("experiment", f"{experiment}  {address.link(f'experiments/details/{run.experiment_id}')}")
    _say("run", f"{name}  {address.link(f'runs/details/{run.run_id}')}")
    if wait:
        began = time.monotonic()
        try:
            follow(server, run.run_id, lambda task, state: _say(state.lower(), task), timeout_seconds=timeout)
        except KeyboardInterrupt:
            _say("", "not waited for any more; the run goes on")
            raise
        _say("succeeded", f"in {time.monotonic() - began:.0f} s")


def _say(kind: str, text: str) -> None:
    console.print(f"{kind:<12}{text}", highlight=False, markup=False)


def _package(pipeline: str, file: Path | None, image: str, workspace: Workspace | None) -> Any:
    from moeprune.pipelines.compile import PIPELINES, compiled
    from moeprune.pipelines.submission.package import Package

    if file is not None:
        if image or workspace:
            raise InputError(
                "a compiled pipeline has its image and its workspace already: leave those out, or --package"
            )
        try:
            return Package.parse(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the package {file} cannot be read: {error}") from error
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    if pipeline not in PIPELINES:
        raise InputError(f"there is no pipeline {pipeline}; there are {', '.join(PIPELINES)}")
    chosen = {"image": image} if image else {}
    return Package.parse(compiled(pipeline, workspace=workspace, **chosen))


def _check(pipeline: str, arguments: dict[str, Any]) -> None:
    """What is known to be wrong with the values themselves; what lies at the addresses only the cluster sees."""
    from moeprune.cli.checks import check_sweep, check_values

    {"prune": check_values, "sweep": check_sweep}[pipeline](arguments)


def _require_kubeflow() -> None:
    try:
        import kfp  # noqa: F401
    except ImportError as error:
        raise InputError(
            "`moeprune submit` needs the SDK of Kubeflow Pipelines: pip install 'moeprune[pipelines]'"
        ) from error
