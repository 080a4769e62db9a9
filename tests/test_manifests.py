"""The manifests of every overlay: Kubernetes takes them, and a security reviewer has nothing to say."""

from __future__ import annotations

import configparser
import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from custom_resources import CERTIFICATE, EXTERNAL_SECRET
from kubeflow_trainer_api import models
from kubernetes_api import strictly
from manifest_policies import POLICIES, Object, Pods, Policy, pods

from moeprune.pipelines.on_a_cluster import SECRET, VARIABLES

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
OVERLAYS = ("dev", "gpu", "prod")
KUBERNETES = ("1.33", "1.34", "1.35", "1.36", "1.37")
RUNS, MLFLOW = "moeprune", "moeprune-mlflow"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def _rendered(overlay: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl on the PATH, which renders the manifests")
    command = ["kubectl", "kustomize", str(MANIFESTS / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns"
    return done.stdout


def render(overlay: str) -> list[Object]:
    """All objects of an overlay, the caller's own."""
    return list(yaml.load_all(_rendered(overlay), yaml.CSafeLoader))


def find(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of that kind whose name begins so; kustomize adds a hash to the names of ConfigMaps."""
    (found,) = (
        it
        for it in objects
        if it["kind"] == kind
        and re.fullmatch(re.escape(name) + (r"-[a-z0-9]{10}" if kind == "ConfigMap" else ""), it["metadata"]["name"])
        and namespace in (None, it["metadata"].get("namespace"))
    )
    return found


def is_custom(it: Object) -> bool:
    """Whether it is of a kind that an operator brings along."""
    group = it["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


def script(path: str) -> ModuleType:
    """A Python file of manifests/, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, MANIFESTS / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestKubernetesTakesThem:
    @pytest.mark.parametrize("version", KUBERNETES)
    def test_in_every_version_that_is_supported(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from kubernetes_validate import utils as kubernetes

        # It would read the same schemas for each object.
        monkeypatch.setattr(kubernetes, "schema_contents", functools.cache(kubernetes.schema_contents))
        seen = set()
        for overlay in OVERLAYS:
            for it in render(overlay):
                if is_custom(it):
                    continue
                text = json.dumps(it, sort_keys=True)
                if text not in seen:  # most are the same in several overlays
                    kubernetes.validate(it, version, strict=True)
                    seen.add(text)
        assert len(seen) > 40

    @overlays
    def test_custom_resources(self, overlay: str) -> None:
        import jsonschema  # type: ignore[import-untyped]

        known: dict[str, Callable[[Object], Any]] = {
            "ClusterTrainingRuntime": lambda it: strictly(models.TrainerV1alpha1ClusterTrainingRuntime, it),
            "ExternalSecret": lambda it: jsonschema.validate(it, EXTERNAL_SECRET),
            "Certificate": lambda it: jsonschema.validate(it, CERTIFICATE),
        }
        kinds = set()
        for it in render(overlay):
            if is_custom(it):
                known[it["kind"]](it)
                kinds.add(it["kind"])
        assert (
            kinds
            == {
                "dev": {"ClusterTrainingRuntime"},
                "gpu": {"ClusterTrainingRuntime", "ExternalSecret"},
                "prod": set(known),
            }[overlay]
        )

    @overlays
    def test_no_two_objects_are_one(self, overlay: str) -> None:
        names = [(it["kind"], it["metadata"].get("namespace"), it["metadata"]["name"]) for it in render(overlay)]
        assert len(names) == len(set(names))


class TestPolicies:
    @overlays
    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
    def test_nothing_offends(self, overlay: str, policy: Policy) -> None:
        assert list(policy(render(overlay))) == []

    @pytest.mark.parametrize(
        ("policy", "kind", "change"),
        [
            ("nobody_is_root", "Deployment", lambda it: _pod(it)["securityContext"].pop("runAsNonRoot")),
            ("nobody_is_root", "CronJob", lambda it: _container(it)["securityContext"].update(runAsUser=0)),
            ("nothing_is_privileged", "Job", lambda it: _container(it)["securityContext"].pop("capabilities")),
            ("nothing_is_privileged", "Deployment", lambda it: _pod(it).update(hostNetwork=True)),
            (
                "nothing_is_privileged",
                "CronJob",
                lambda it: _container(it, "initContainers")["securityContext"].update(allowPrivilegeEscalation=True),
            ),
            (
                "file_systems_are_read_only",
                "ClusterTrainingRuntime",
                lambda it: _container(it)["securityContext"].pop("readOnlyRootFilesystem"),
            ),
            ("images_are_pinned", "Deployment", lambda it: _container(it).update(image="mlflow:latest")),
            ("images_are_pinned", "Deployment", lambda it: _container(it).update(image="localhost:5000/mlflow")),
            ("resources_are_bounded", "Job", lambda it: _container(it)["resources"]["limits"].pop("memory")),
            ("servers_are_probed", "Deployment", lambda it: _container(it).pop("livenessProbe")),
            ("tokens_are_given_where_needed", "Job", lambda it: _pod(it).pop("automountServiceAccountToken")),
            (
                "tokens_are_given_where_needed",
                "ServiceAccount",
                lambda it: it.pop("automountServiceAccountToken", it["metadata"].update(name="other")),
            ),
            ("rights_are_the_least", "Role", lambda it: it["rules"][0].update(verbs=["*"])),
            ("rights_are_the_least", "Role", lambda it: [rule.pop("resourceNames", 0) for rule in it["rules"]]),
            ("rights_are_the_least", "ClusterRole", lambda it: it["rules"][0]["verbs"].append("list")),
            ("no_secret_is_in_git", "ResourceQuota", lambda it: it.update(kind="Secret")),
            (
                "no_secret_is_in_git",
                "Job",
                lambda it: _container(it)["env"].append({"name": "ADMIN_PASSWORD", "value": "1234"}),
            ),
            ("traffic_is_denied_by_default", "NetworkPolicy", lambda it: it["spec"].update(ingress=[{}])),
            (
                "everything_has_its_place",
                "Namespace",
                lambda it: it["metadata"].pop("labels") and it.update(_NO_LABELS),
            ),
            ("everything_has_its_place", "LimitRange", lambda it: it["metadata"].update(namespace="other")),
        ],
    )
    def test_policies_see_what_offends(self, policy: str, kind: str, change: Callable[[Object], Any]) -> None:
        objects = render("prod")
        (check,) = (each for each in POLICIES if each.__name__ == policy)
        assert not list(check(objects))
        for it in objects:
            if it["kind"] == kind:
                change(it)
        assert list(check(objects))

    def test_kubernetes_itself_enforces_the_strictest_in_production(self) -> None:
        for it in render("prod"):
            if it["kind"] == "Namespace":
                assert it["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


_NO_LABELS: Object = {"metadata": {"name": RUNS, "labels": {}}}


def _pod(it: Object) -> Object:
    return next(pods([it])).spec


def _container(it: Object, which: str = "containers") -> Object:
    container: Object = _pod(it)[which][0]
    return container


class TestNamesLeadSomewhere:
    """What one object says of another is so."""

    @overlays
    def test_secrets_and_settings(self, overlay: str) -> None:
        objects = render(overlay)
        there = _secrets(overlay) | {
            ("ConfigMap", it["metadata"]["namespace"], it["metadata"]["name"]): set(it["data"])
            for it in objects
            if it["kind"] == "ConfigMap"
        }
        if overlay == "prod":  # made by cert-manager
            there["Secret", MLFLOW, "mlflow-tls"] = {"tls.crt", "tls.key", "ca.crt"}
        for of in pods(objects):
            for kind, name, key, optional in _references(of):
                if optional:
                    continue
                assert (kind, of.namespace, name) in there, f"{of.owner} wants the {kind} {name}"
                assert key is None or key in there[kind, of.namespace, name], f"{of.owner} wants {key} of {name}"

    @overlays
    def test_volumes_are_mounted_and_mounts_are_volumes(self, overlay: str) -> None:
        objects = render(overlay)
        for of in pods(objects):
            claims = {
                claim["metadata"]["name"]
                for it in objects
                if it["kind"] == "StatefulSet"
                for claim in it["spec"]["volumeClaimTemplates"]
                if of.kind == "StatefulSet" and of.owner.endswith(it["metadata"]["name"])
            }
            volumes = {volume["name"] for volume in of.spec.get("volumes", [])} | claims
            mounts = {mount["name"] for _, container in of.containers() for mount in container.get("volumeMounts", [])}
            assert mounts == volumes, of.owner

    @overlays
    def test_selectors_accounts_and_targets(self, overlay: str) -> None:
        objects = render(overlay)
        for it in objects:
            namespace, spec = it["metadata"].get("namespace"), it.get("spec", {})
            labels = [of.labels for of in pods(objects) if of.namespace == namespace]
            if it["kind"] == "Service":
                assert any(spec["selector"].items() <= each.items() for each in labels), it["metadata"]["name"]
            elif it["kind"] in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
                wanted = spec["selector"]["matchLabels"]
                assert any(wanted.items() <= each.items() for each in labels), it["metadata"]["name"]
            elif it["kind"] == "HorizontalPodAutoscaler":
                target = find(objects, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"], namespace)
                assert "replicas" not in target["spec"], "every `kubectl apply` would undo what the autoscaler did"
            elif it["kind"] == "Ingress":
                for rule in spec["rules"]:
                    for path in rule["http"]["paths"]:
                        to = path["backend"]["service"]
                        ports = find(objects, "Service", to["name"], namespace)["spec"]["ports"]
                        assert to["port"]["name"] in {port["name"] for port in ports}
                assert {rule["host"] for rule in spec["rules"]} == {h for tls in spec["tls"] for h in tls["hosts"]}
            elif it["kind"] in ("RoleBinding", "ClusterRoleBinding"):
                find(objects, it["roleRef"]["kind"], it["roleRef"]["name"], namespace)
                for subject in it["subjects"]:
                    if subject["namespace"] in (RUNS, MLFLOW):
                        find(objects, "ServiceAccount", subject["name"], subject["namespace"])
        for of in pods(objects):
            if account := of.spec.get("serviceAccountName"):
                find(objects, "ServiceAccount", account, of.namespace)
            if priority := of.spec.get("priorityClassName"):
                find(objects, "PriorityClass", priority)

    @overlays
    def test_the_tasks_find_their_secret(self, overlay: str) -> None:
        keys = _secrets(overlay)["Secret", RUNS, SECRET]
        assert keys <= set(VARIABLES), "no task would be given the others"
        assert keys >= {
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "MLFLOW_TRACKING_URI",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
        }

    def test_nothing_is_left_to_replace_and_the_values_of_the_site_are_where_they_belong(self) -> None:
        objects = render("prod")
        text = _rendered("prod")
        assert "REPLACED" not in text
        assert not any(it["metadata"]["name"] == "site" for it in objects)
        for value in yaml.safe_load((MANIFESTS / "overlays/prod/site.yaml").read_text())["data"].values():
            assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", text), value
        assert text.count("https://s3.eu-central-1.amazonaws.com") == 3, "MLflow, tasks and backups, each"
        assert "us-east-1" not in text
        settings = find(objects, "ConfigMap", "mlflow", MLFLOW)["data"]
        (host,) = find(objects, "Ingress", "mlflow")["spec"]["tls"][0]["hosts"]
        assert settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")[0] == host
        # Else MLflow refuses what its own page, in a browser, asks it to change.
        assert settings["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"


def _secrets(overlay: str) -> dict[tuple[str, str, str], set[str]]:
    """The keys of each Secret that will be there: from the secret store, or in `dev` from the script."""
    if overlay == "dev":
        made = script("overlays/dev/make_secrets.py").made_up()
        return {("Secret", it["metadata"]["namespace"], it["metadata"]["name"]): set(it["stringData"]) for it in made}
    found = {}
    for it in render(overlay):
        if it["kind"] == "ExternalSecret":
            spec = it["spec"]
            keys = spec["target"].get("template", {}).get("data") or {entry["secretKey"] for entry in spec["data"]}
            found["Secret", it["metadata"]["namespace"], spec["target"]["name"]] = set(keys)
    return found


def _references(of: Pods) -> Iterator[tuple[str, str, str | None, bool]]:
    """Kind, name and key of what a pod reads, and whether it can do without."""
    kinds = {
        "secretKeyRef": "Secret",
        "configMapKeyRef": "ConfigMap",
        "secretRef": "Secret",
        "configMapRef": "ConfigMap",
    }
    for _, container in of.containers():
        for variable in container.get("env", []):
            for kind, ref in variable.get("valueFrom", {}).items():
                yield kinds[kind], ref["name"], ref["key"], ref.get("optional", False)
        for source in container.get("envFrom", []):
            for kind, ref in source.items():
                yield kinds[kind], ref["name"], None, ref.get("optional", False)
    for volume in of.spec.get("volumes", []):
        for kind, name in (("secret", "secretName"), ("configMap", "name")):
            if source := volume.get(kind):
                for item in source.get("items", [{"key": None}]):
                    yield kind[0].upper() + kind[1:], source[name], item["key"], source.get("optional", False)


class TestTraffic:
    """Who may talk to whom, as NetworkPolicies say it; see `_may_talk`."""

    @pytest.mark.parametrize(
        ("overlay", "source", "target", "port", "may"),
        [
            # A task, and what it needs.
            ("prod", "task", "mlflow", 5000, True),
            ("prod", "task", "1.2.3.4", 443, True),
            ("dev", "task", "seaweedfs", 8333, True),
            ("dev", "task", "kubeflow-api", 8888, True),
            ("prod", "kubeflow-ui", "artifact-proxy", 3000, True),
            ("prod", "kubeflow-ui", "task", 3000, False),
            # A task, and what it does not need: databases, logins, other tasks, a cloud's own credentials.
            ("dev", "task", "postgres", 5432, False),
            ("dev", "task", "seaweedfs", 9333, False),
            ("prod", "task", "login", 4180, False),
            ("prod", "task", "task", 8080, False),
            ("prod", "task", "node", 29500, False),
            ("prod", "task", "10.0.0.9", 5432, False),
            ("prod", "task", "169.254.169.254", 80, False),
            ("prod", "task", "169.254.170.23", 443, False),
            # The nodes of a distillation are among themselves.
            ("gpu", "node", "node", 29500, True),
            ("gpu", "mlflow", "node", 29500, False),
            ("gpu", "node", "1.2.3.4", 443, False),
            ("gpu", "node", "mlflow", 5000, False),
            ("dev", "node", "seaweedfs", 8333, False),
            # MLflow.
            ("dev", "mlflow", "postgres", 5432, True),
            ("dev", "mlflow", "seaweedfs", 8333, True),
            ("dev", "migration", "postgres", 5432, True),
            ("dev", "migration", "seaweedfs", 8333, False),
            ("prod", "mlflow", "10.0.0.9", 5432, True),
            ("prod", "mlflow", "1.2.3.4", 443, True),
            ("prod", "migration", "10.0.0.9", 5432, True),
            ("prod", "backup", "10.0.0.9", 5432, True),
            ("prod", "backup", "1.2.3.4", 443, True),
            ("prod", "backup", "mlflow", 5000, False),
            ("prod", "mlflow", "169.254.169.254", 80, False),
            ("prod", "mlflow", "task", 8080, False),
            # Those who come to MLflow.
            ("prod", "kubeflow-api", "mlflow", 5000, True),
            ("prod", "kubeflow-other", "mlflow", 5000, False),
            ("dev", "kubeflow-other", "mlflow", 5000, True),  # may be a task, of a single-user installation
            ("dev", "kubeflow-other", "postgres", 5432, False),
            ("prod", "stranger", "mlflow", 5000, False),
            ("prod", "login", "mlflow", 5000, True),
            ("prod", "ingress", "login", 4180, True),
            ("prod", "ingress", "mlflow", 5000, False),
            ("prod", "stranger", "login", 4180, False),
        ],
    )
    def test_only_what_is_needed(self, overlay: str, source: str, target: str, port: int, may: bool) -> None:
        assert _may_talk(render(overlay), source, target, port) == may

    @overlays
    def test_pods_are_labelled_as_the_policies_think(self, overlay: str) -> None:
        known = [labels for namespace, labels in _PEERS.values() if namespace == MLFLOW]
        assert all(of.labels in known for of in pods(render(overlay)) if of.namespace == MLFLOW)

    @overlays
    def test_everything_finds_names(self, overlay: str) -> None:
        for source in ("task", "node", "mlflow", "migration"):
            assert _may_talk(render(overlay), source, "dns", 53), source


_PEERS = {  # namespace and labels
    "task": (RUNS, {"app.kubernetes.io/part-of": "moeprune", "app.kubernetes.io/component": "distill"}),
    "node": (RUNS, {"app.kubernetes.io/part-of": "moeprune", "jobset.sigs.k8s.io/replicatedjob-name": "node"}),
    "mlflow": (MLFLOW, {"app.kubernetes.io/name": "mlflow"}),
    "migration": (MLFLOW, {"app.kubernetes.io/name": "mlflow-migration"}),
    "backup": (MLFLOW, {"app.kubernetes.io/name": "mlflow-backup"}),
    "login": (MLFLOW, {"app.kubernetes.io/name": "mlflow-login"}),
    "postgres": (MLFLOW, {"app.kubernetes.io/name": "postgres"}),
    "seaweedfs": (MLFLOW, {"app.kubernetes.io/name": "seaweedfs"}),
    "kubeflow-api": ("kubeflow", {"app": "ml-pipeline"}),
    "kubeflow-ui": ("kubeflow", {"app": "ml-pipeline-ui"}),
    "kubeflow-other": ("kubeflow", {"app": "other"}),
    "artifact-proxy": (RUNS, {"app": "ml-pipeline-ui-artifact"}),
    "ingress": ("ingress", {"app": "controller"}),
    "stranger": ("default", {}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
}


def _may_talk(objects: list[Object], source: str, target: str, port: int) -> bool:
    """Whether the policies let a connection out at its source and in at its target."""
    out = _lets(objects, "Egress", source, target, port)
    return out and (target not in _PEERS or _lets(objects, "Ingress", target, source, port))


def _lets(objects: list[Object], direction: str, here: str, there: str, port: int) -> bool:
    namespace, labels = _PEERS[here]
    policies = [
        it["spec"]
        for it in objects
        if it["kind"] == "NetworkPolicy"
        and it["metadata"]["namespace"] == namespace
        and direction in it["spec"]["policyTypes"]
        and _matches(it["spec"]["podSelector"], labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    return not policies or any(
        any(entry["port"] == port for entry in rule.get("ports", [{"port": port}]))
        and any(_is(peer, namespace, there) for peer in rule.get("from" if direction == "Ingress" else "to", [{}]))
        for rule in rules
    )


def _is(peer: Object, policy_namespace: str, name: str) -> bool:
    if block := peer.get("ipBlock"):
        if name in _PEERS:
            return False  # CIDRs are for what is outside of the cluster
        address = ip_address(name)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(cidr) for cidr in block.get("except", [])
        )
    if name not in _PEERS:
        return False
    namespace, labels = _PEERS[name]
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != policy_namespace:
        return False
    return _matches(peer.get("podSelector", {}), labels)


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        key, operator = expression["key"], expression["operator"]
        assert operator in ("In", "DoesNotExist")
        if labels.get(key) not in expression["values"] if operator == "In" else key in labels:
            return False
    return True


class TestMlflow:
    @overlays
    def test_is_the_release_that_is_tested_here(self, overlay: str) -> None:
        (release,) = re.findall(r"^mlflow==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        objects = render(overlay)
        images = {
            container["image"]
            for of in pods(objects)
            for _, container in of.containers()
            if "mlflow/mlflow" in container["image"]
        }
        # "full": with drivers for PostgreSQL and S3, and what authentication needs.
        assert images == {f"ghcr.io/mlflow/mlflow:v{release}-full"}
        # A Job cannot be changed: another release has another.
        assert find(objects, "Job", f"mlflow-migration-v{release}", MLFLOW)

    @overlays
    def test_asks_who_is_there_and_keeps_its_own_address(self, overlay: str) -> None:
        server = _container(find(render(overlay), "Deployment", "mlflow"))
        assert server["command"][:4] == ["mlflow", "server", "--app-name", "basic-auth"]
        settings = find(render(overlay), "ConfigMap", "mlflow", MLFLOW)["data"]
        assert "*" not in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
        # In the cluster's network there is a service of this name, which Kubernetes would have it take for a port.
        assert _pod(find(render(overlay), "Deployment", "mlflow"))["enableServiceLinks"] is False

    def test_speaks_tls_in_production(self) -> None:
        objects = render("prod")
        server = _container(find(objects, "Deployment", "mlflow"))
        options = find(objects, "ConfigMap", "mlflow", MLFLOW)["data"]["MLFLOW_UVICORN_OPTS"].split()
        mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
        for option in ("--ssl-certfile", "--ssl-keyfile"):
            assert str(Path(options[options.index(option) + 1]).parent) in mounts
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[probe]["httpGet"] == {"path": "/health", "port": "http", "scheme": "HTTPS"}
        address = find(objects, "ExternalSecret", "moeprune")["spec"]["target"]["template"]["data"][
            "MLFLOW_TRACKING_URI"
        ]
        upstream = f"--upstream={address}"
        assert upstream in _container(find(objects, "Deployment", "mlflow-login"))["args"]
        host = address.removeprefix("https://").removesuffix(":5000")
        assert host in find(objects, "Certificate", "mlflow")["spec"]["dnsNames"]

    def test_a_server_waits_for_the_migration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        database = script("base/mlflow/database.py")
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{tmp_path / 'runs.db'}")
        with pytest.raises(SystemExit, match=r"not ready in 0 s: its schema is None, not yet [0-9a-f]{12}"):
            database.wait(0)
        engine = database.tracking_database()
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('an older one')")
        with pytest.raises(SystemExit, match="its schema is an older one, not yet"):
            database.wait(0)
        with engine.begin() as connection:
            newest = database.utils._get_latest_schema_revision()
            connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{newest}'")
        database.wait(0)
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{tmp_path / 'no' / 'such' / 'place.db'}")
        with pytest.raises(SystemExit, match="it does not answer: unable to open database file"):
            database.wait(0)

    def test_kubeflow_is_told_what_it_knows(self) -> None:
        """In a namespace, Kubeflow Pipelines takes these settings and refuses the whole entry for any other."""
        entry = json.loads(find_plain(render("prod"), "ConfigMap", "kfp-launcher")["data"]["plugins.mlflow"])
        assert entry.keys() == {"settings"}
        assert entry["settings"].keys() <= {
            "experimentDescription",
            "defaultExperimentName",
            "injectUserEnvVars",
            "credentialSecretRef",
        }
        for overlay in OVERLAYS:
            keys = _secrets(overlay)["Secret", RUNS, "kfp-mlflow-credentials"]
            assert keys == set(entry["settings"]["credentialSecretRef"].values())


def find_plain(objects: list[Object], kind: str, name: str) -> Object:
    """An object whose name has no hash."""
    (found,) = (it for it in objects if it["kind"] == kind and it["metadata"]["name"] == name)
    return found


class TestSecrets:
    def test_those_made_up_for_a_small_cluster_fit_together(self) -> None:
        make = script("overlays/dev/make_secrets.py").made_up
        secrets = {it["metadata"]["name"]: it["stringData"] for it in make()}
        users = configparser.ConfigParser()
        users.read_string(secrets["mlflow-auth"]["basic_auth.ini"])
        for address, database in (
            (users["mlflow"]["database_uri"], "mlflow_auth"),
            (secrets["mlflow-database"]["tracking-uri"], "mlflow"),
        ):
            password = secrets["postgres"]["password"]
            assert address == f"postgresql+psycopg2://mlflow:{password}@postgres:5432/{database}"
        password = secrets["mlflow-auth"]["pipeline-password"]
        assert secrets["moeprune"]["MLFLOW_TRACKING_PASSWORD"] == password
        assert secrets["kfp-mlflow-credentials"]["password"] == password
        assert secrets["mlflow-s3"].items() <= secrets["moeprune"].items()
        assert password != secrets["mlflow-auth"]["admin-password"]
        namespaces = {it["metadata"]["name"]: it["metadata"]["namespace"] for it in make("kubeflow")}
        assert namespaces["moeprune"] == namespaces["kfp-mlflow-credentials"] == "kubeflow"
        assert namespaces["postgres"] == MLFLOW
        again = {it["metadata"]["name"]: it["stringData"] for it in make()}
        assert again["postgres"] != secrets["postgres"]
        assert again["mlflow-s3"] != secrets["mlflow-s3"]

    def test_the_file_of_users_takes_any_address(self) -> None:
        """A percent sign, as of an escaped character in a password, is special in it."""
        secret = find(render("prod"), "ExternalSecret", "mlflow-auth")
        template = secret["spec"]["target"]["template"]["data"]["basic_auth.ini"]
        address = "postgresql+psycopg2://mlflow:p%40ss@host/mlflow_auth?sslmode=verify-full"
        filled = template.replace('{{ .auth_uri | replace "%" "%%" }}', address.replace("%", "%%"))
        assert "{{" not in filled
        users = configparser.ConfigParser()
        users.read_string(filled)
        assert users["mlflow"]["database_uri"] == address

    @pytest.mark.parametrize("overlay", ["gpu", "prod"])
    def test_templates_use_what_is_fetched(self, overlay: str) -> None:
        for it in render(overlay):
            if it["kind"] == "ExternalSecret" and (template := it["spec"]["target"].get("template")):
                used = set(re.findall(r"\{\{ \.(\w+)", json.dumps(template)))
                assert used == {entry["secretKey"] for entry in it["spec"]["data"]}, it["metadata"]["name"]


class TestBackups:
    def test_arrive(self, client: Any, tmp_path: Path) -> None:
        upload = script("overlays/prod/upload.py").upload
        (tmp_path / "mlflow.dump").write_bytes(b"runs")
        (tmp_path / "mlflow_auth.dump").write_bytes(b"users")
        client.create_bucket(Bucket="backups")
        keys = upload(tmp_path, "s3://backups/nightly", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
        folder = "nightly/2026-01-02T030405Z"
        assert keys == [f"{folder}/mlflow.dump", f"{folder}/mlflow_auth.dump"]
        assert client.get_object(Bucket="backups", Key=keys[1])["Body"].read() == b"users"
        assert upload(tmp_path, "s3://backups", datetime(2026, 1, 3, tzinfo=UTC))[0].startswith("2026-01-03T")

    def test_an_empty_dump_is_none(self, tmp_path: Path) -> None:
        upload = script("overlays/prod/upload.py").upload
        with pytest.raises(SystemExit, match="there is no dump"):
            upload(tmp_path, "s3://backups", datetime.now(UTC))
        (tmp_path / "mlflow.dump").touch()
        with pytest.raises(SystemExit, match="or an empty one"):
            upload(tmp_path, "s3://backups", datetime.now(UTC))


class TestTasks:
    """The pods that a compiled pipeline asks for come into a namespace of ours."""

    def test_are_not_root_in_any_pipeline(self) -> None:
        files = sorted((ROOT / "pipelines/compiled").glob("*.yaml"))
        assert files
        for file in files:
            _, platform = yaml.load_all(file.read_text(), yaml.CSafeLoader)
            executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            for name, executor in executors.items():
                assert executor["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1000"}, (
                    f"{file.name}: {name}"
                )


class TestDocs:
    PAGE = (ROOT / "docs/cluster.md").read_text()

    def test_name_what_there_is(self) -> None:
        form = (ROOT / "docs/launch_form.md").read_text()
        parameters = set(re.findall(r"--set (\w+)=", self.PAGE))
        assert parameters
        assert parameters <= set(re.findall(r"^\| `(\w+)`", form, re.MULTILINE))
        for path in re.findall(r"(?<=[ `])(?:manifests|overlays|components|base)/[\w./-]+\w", self.PAGE):
            assert (MANIFESTS / path.removeprefix("manifests/")).exists(), path

    def test_list_every_secret_and_what_is_kept_in_the_store(self) -> None:
        for _, namespace, name in [*_secrets("dev"), *_secrets("prod")]:
            assert re.search(rf"^\| `{namespace}`, `{name}`", self.PAGE, re.MULTILINE), name
        for it in render("prod"):
            if it["kind"] == "ExternalSecret":
                for entry in it["spec"]["data"]:
                    (row,) = (
                        row for row in self.PAGE.splitlines() if row.startswith(f"| `{entry['remoteRef']['key']}`")
                    )
                    assert f"`{entry['remoteRef']['property']}`" in row


class TestGpus:
    def test_the_nodes_of_a_distillation_go_to_them(self) -> None:
        (nodes,) = (of for of in pods(render("gpu")) if of.kind == "ClusterTrainingRuntime")
        plain = next(of for of in pods(render("dev")) if of.kind == "ClusterTrainingRuntime")
        added = {"affinity", "tolerations", "priorityClassName", "topologySpreadConstraints"}
        assert nodes.spec.keys() - plain.spec.keys() == added
        assert {key: value for key, value in nodes.spec.items() if key not in added} == plain.spec

    def test_are_counted(self) -> None:
        gpus = {
            overlay: find(render(overlay), "ResourceQuota", "runs")["spec"]["hard"]["requests.nvidia.com/gpu"]
            for overlay in OVERLAYS
        }
        assert gpus == {"dev": "0", "gpu": "16", "prod": "16"}
