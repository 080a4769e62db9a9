"""Who may talk to whom on a cluster, as the NetworkPolicies of every overlay say it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from manifest_policies import Object, pods
from overlays import MLFLOW, RUNS, overlays, render


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
