"""The overlays of manifests/, as kustomize renders them, and what is asked of them again and again."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from manifest_policies import Object, pods
from scripts import script

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
OVERLAYS = ("dev", "gpu", "prod")
RUNS, MLFLOW = "moeprune", "moeprune-mlflow"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def rendered(overlay: str) -> str:
    """As text."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl on the PATH, which renders the manifests")
    command = ["kubectl", "kustomize", str(MANIFESTS / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns"
    return done.stdout


def render(overlay: str) -> list[Object]:
    """All objects of an overlay, the caller's own."""
    return list(yaml.load_all(rendered(overlay), yaml.CSafeLoader))


def find(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of that kind and name; to the names of most ConfigMaps kustomize adds a hash."""
    (found,) = (
        it
        for it in objects
        if it["kind"] == kind
        and re.fullmatch(re.escape(name) + ("(-[a-z0-9]{10})?" if kind == "ConfigMap" else ""), it["metadata"]["name"])
        and namespace in (None, it["metadata"].get("namespace"))
    )
    return found


def pod_of(it: Object) -> Object:
    """The spec of the first pod that an object asks for."""
    return next(pods([it])).spec


def container_of(it: Object, which: str = "containers") -> Object:
    """The first container of that."""
    found: Object = pod_of(it)[which][0]
    return found


def secrets_of(overlay: str) -> dict[tuple[str, str, str], set[str]]:
    """The keys of each Secret that will be there: from the secret store, or in `dev` from the script."""
    if overlay == "dev":
        made = script(MANIFESTS / "overlays/dev/make_secrets.py").made_up()
        return {("Secret", it["metadata"]["namespace"], it["metadata"]["name"]): set(it["stringData"]) for it in made}
    found = {}
    for it in render(overlay):
        if it["kind"] == "ExternalSecret":
            spec = it["spec"]
            keys = spec["target"].get("template", {}).get("data") or {entry["secretKey"] for entry in spec["data"]}
            found["Secret", it["metadata"]["namespace"], spec["target"]["name"]] = set(keys)
    return found
