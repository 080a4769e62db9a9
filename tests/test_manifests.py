"""The manifests of every overlay: Kubernetes takes them, and a security reviewer has nothing to say."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # kfp brings it
from custom_resources import CERTIFICATE, EXTERNAL_SECRET
from kubeflow_trainer_api import models
from kubernetes_api import strictly
from manifest_policies import POLICIES, Object, Pods, Policy, pods
from overlays import (
    MANIFESTS,
    MLFLOW,
    OVERLAYS,
    ROOT,
    RUNS,
    container_of,
    find,
    overlays,
    pod_of,
    render,
    rendered,
    secrets_of,
)

from moeprune.pipelines.on_a_cluster import SECRET, VARIABLES

KUBERNETES = ("1.33", "1.34", "1.35", "1.36", "1.37")
_NO_LABELS: Object = {"metadata": {"name": RUNS, "labels": {}}}


def is_custom(it: Object) -> bool:
    """Whether it is of a kind that an operator brings along."""
    group = it["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


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
            ("nobody_is_root", "Deployment", lambda it: pod_of(it)["securityContext"].pop("runAsNonRoot")),
            ("nobody_is_root", "CronJob", lambda it: container_of(it)["securityContext"].update(runAsUser=0)),
            ("nothing_is_privileged", "Job", lambda it: container_of(it)["securityContext"].pop("capabilities")),
            ("nothing_is_privileged", "Deployment", lambda it: pod_of(it).update(hostNetwork=True)),
            (
                "nothing_is_privileged",
                "CronJob",
                lambda it: container_of(it, "initContainers")["securityContext"].update(allowPrivilegeEscalation=True),
            ),
            (
                "file_systems_are_read_only",
                "ClusterTrainingRuntime",
                lambda it: container_of(it)["securityContext"].pop("readOnlyRootFilesystem"),
            ),
            ("images_are_pinned", "Deployment", lambda it: container_of(it).update(image="mlflow:latest")),
            ("images_are_pinned", "Deployment", lambda it: container_of(it).update(image="localhost:5000/mlflow")),
            ("resources_are_bounded", "Job", lambda it: container_of(it)["resources"]["limits"].pop("memory")),
            ("servers_are_probed", "Deployment", lambda it: container_of(it).pop("livenessProbe")),
            ("tokens_are_given_where_needed", "Job", lambda it: pod_of(it).pop("automountServiceAccountToken")),
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
                lambda it: container_of(it)["env"].append({"name": "ADMIN_PASSWORD", "value": "1234"}),
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


class TestNamesLeadSomewhere:
    """What one object says of another is so."""

    @overlays
    def test_secrets_and_settings(self, overlay: str) -> None:
        objects = render(overlay)
        there = secrets_of(overlay) | {
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
        keys = secrets_of(overlay)["Secret", RUNS, SECRET]
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
        text = rendered("prod")
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
        for _, namespace, name in [*secrets_of("dev"), *secrets_of("prod")]:
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
