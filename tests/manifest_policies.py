"""What a security reviewer asks of manifests. A policy takes all objects of an overlay and yields offences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
Policy = Callable[[list[Object]], Iterator[str]]

CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ClusterTrainingRuntime", "PriorityClass"}
# The pipeline's tasks, whose executor reports to Argo; nothing else talks to Kubernetes.
MAY_HAVE_TOKENS = {"moeprune"}
_PATHS = {
    "Deployment": ["spec"],
    "StatefulSet": ["spec"],
    "Job": ["spec"],
    "CronJob": ["spec", "jobTemplate", "spec"],
}


@dataclass(frozen=True)
class Pods:
    """The pods that an object asks for.

    Attributes:
        owner: kind and name of the object.
        template: metadata and spec of the pods.
    """

    owner: str
    kind: str
    namespace: str
    template: Object

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template.get("metadata", {}).get("labels", {})
        return labels

    def containers(self, first: bool = True) -> Iterator[tuple[str, Object]]:
        """Name and container; with those that run first."""
        for container in [*(self.spec.get("initContainers", []) if first else []), *self.spec["containers"]]:
            yield f"{self.owner}, container {container['name']}", container


def pods(objects: list[Object]) -> Iterator[Pods]:
    for it in objects:
        owner, namespace = f"{it['kind']} {it['metadata']['name']}", it["metadata"].get("namespace", "")
        if it["kind"] in _PATHS:
            at = it
            for step in _PATHS[it["kind"]]:
                at = at[step]
            yield Pods(owner, it["kind"], namespace, at["template"])
        elif it["kind"] == "ClusterTrainingRuntime":
            for job in it["spec"]["template"]["spec"]["replicatedJobs"]:
                # Its pods run where the job is that refers to it.
                yield Pods(owner, it["kind"], "moeprune", job["template"]["spec"]["template"])


def nobody_is_root(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        context = of.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
            yield f"{of.owner} may run as root"
        for name, container in of.containers():
            own = container.get("securityContext", {})
            if own.get("runAsNonRoot", True) is not True or own.get("runAsUser", 1) == 0:
                yield f"{name} may run as root"


def nothing_is_privileged(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        if any(of.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{of.owner} is on its machine's network or among its processes"
        if any("hostPath" in volume for volume in of.spec.get("volumes", [])):
            yield f"{of.owner} mounts its machine's files"
        if of.spec.get("securityContext", {}).get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{of.owner} may make any system call"
        for name, container in of.containers():
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{name} can gain privileges"
            if context.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name} keeps capabilities"


def file_systems_are_read_only(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        for name, container in of.containers():
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{name} can write to its image"


def images_are_pinned(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        for name, container in of.containers():
            if not re.search(r"(:v?\d+(\.\d+)+[-\w]*|@sha256:[0-9a-f]{64})$", container["image"]):
                yield f"{name} runs {container['image']}, which names no release"


def resources_are_bounded(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        if of.kind == "ClusterTrainingRuntime":
            continue  # the job that refers to it says what its nodes get, and the namespace's LimitRange what at least
        for name, container in of.containers():
            resources = container.get("resources", {})
            for what in ("requests", "limits"):
                if missing := {"cpu", "memory"} - resources.get(what, {}).keys():
                    yield f"{name} has no {what} for {', '.join(sorted(missing))}"


def servers_are_probed(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        if of.kind in ("Deployment", "StatefulSet"):
            for name, container in of.containers(first=False):
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if probe not in container:
                        yield f"{name} has no {probe}"


def tokens_are_given_where_needed(objects: list[Object]) -> Iterator[str]:
    for of in pods(objects):
        if of.spec.get("automountServiceAccountToken") is not False:
            yield f"{of.owner} is given a token for the cluster's API"
    for it in objects:
        name = it["metadata"]["name"]
        gives = it.get("automountServiceAccountToken") is not False
        if it["kind"] == "ServiceAccount" and gives and name not in MAY_HAVE_TOKENS:
            yield f"the account {name} in {it['metadata']['namespace']} gives tokens to its pods"


def rights_are_the_least(objects: list[Object]) -> Iterator[str]:
    for it in objects:
        if it["kind"] not in ("Role", "ClusterRole"):
            continue
        name = f"{it['kind']} {it['metadata']['name']}"
        for rule in it["rules"]:
            words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            if any("*" in word for word in words):
                yield f"{name} has a wildcard"
            if {"escalate", "bind", "impersonate"} & set(rule["verbs"]):
                yield f"{name} can make itself more than it is"
            if {"pods/exec", "pods/attach", "pods/ephemeralcontainers"} & set(rule["resources"]):
                yield f"{name} can get into other pods"
            if "secrets" in rule["resources"] and (set(rule["verbs"]) != {"get"} or not rule.get("resourceNames")):
                yield f"{name} can do more than read secrets of given names"
            if it["kind"] == "ClusterRole" and (set(rule["verbs"]) != {"get"} or not rule.get("resourceNames")):
                yield f"{name} can do more in the whole cluster than read things of given names"


def no_secret_is_in_git(objects: list[Object]) -> Iterator[str]:
    for it in objects:
        if it["kind"] == "Secret":
            yield f"Secret {it['metadata']['name']} is in git"
    for of in pods(objects):
        for name, container in of.containers():
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", variable["name"]) and "value" in variable:
                    yield f"{name} has {variable['name']} in git"


def traffic_is_denied_by_default(objects: list[Object]) -> Iterator[str]:
    closed = {
        it["metadata"]["namespace"]
        for it in objects
        if it["kind"] == "NetworkPolicy"
        and it["spec"].get("podSelector") == {}
        and set(it["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not it["spec"].get("ingress")
        and not it["spec"].get("egress")
    }
    namespaces = {it["metadata"]["name"] for it in objects if it["kind"] == "Namespace"}
    for namespace in sorted(namespaces | {of.namespace for of in pods(objects)}):
        if namespace not in closed:
            yield f"pods in {namespace} that no policy names may talk to all others"


def everything_has_its_place(objects: list[Object]) -> Iterator[str]:
    namespaces = {it["metadata"]["name"]: it for it in objects if it["kind"] == "Namespace"}
    for it in objects:
        namespace = it["metadata"].get("namespace")
        if (namespace is None) != (it["kind"] in CLUSTER_WIDE) or (namespace and namespace not in namespaces):
            yield f"{it['kind']} {it['metadata']['name']} is in the namespace {namespace}"
    for name, it in namespaces.items():
        enforced = it["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
        if enforced not in ("baseline", "restricted"):
            yield f"the namespace {name} takes any pod"
        for kind in ("ResourceQuota", "LimitRange"):
            if not any(it["kind"] == kind and it["metadata"]["namespace"] == name for it in objects):
                yield f"the namespace {name} has no {kind}"


POLICIES: list[Policy] = [
    nobody_is_root,
    nothing_is_privileged,
    file_systems_are_read_only,
    images_are_pinned,
    resources_are_bounded,
    servers_are_probed,
    tokens_are_given_where_needed,
    rights_are_the_least,
    no_secret_is_in_git,
    traffic_is_denied_by_default,
    everything_has_its_place,
]
