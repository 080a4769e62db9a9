"""Schemas of the custom resources in manifests/ for which no package has one in Python: those of their fields that we
use, written by hand after the operators' documentation, and no other field.

ExternalSecret: external-secrets.io/v1 (External Secrets Operator 0.16 and later). Certificate: cert-manager.io/v1.
"""

from __future__ import annotations

from typing import Any

_DURATION = {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}
_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
_KEY = {"type": "string", "pattern": r"^[-._a-zA-Z0-9]+$", "maxLength": 253}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    """A schema that knows these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _resource(api_version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    metadata = _object("name namespace", name=_NAME, namespace=_NAME, labels=texts, annotations=texts)
    head = {"apiVersion": {"const": api_version}, "kind": {"const": kind}}
    return _object("apiVersion kind metadata spec", **head, metadata=metadata, spec=spec)


EXTERNAL_SECRET = _resource(
    "external-secrets.io/v1",
    "ExternalSecret",
    _object(
        "refreshInterval secretStoreRef target data",
        refreshInterval=_DURATION,
        secretStoreRef=_object("kind name", kind={"enum": ["SecretStore", "ClusterSecretStore"]}, name=_NAME),
        target=_object(
            "name",
            name=_NAME,
            template=_object(
                "engineVersion data",
                engineVersion={"const": "v2"},
                data={"type": "object", "propertyNames": _KEY, "additionalProperties": {"type": "string"}},
            ),
        ),
        data={
            "type": "array",
            "minItems": 1,
            "items": _object(
                "secretKey remoteRef",
                secretKey=_KEY,
                remoteRef=_object("key property", key={"type": "string"}, property={"type": "string"}),
            ),
        },
    ),
)

CERTIFICATE = _resource(
    "cert-manager.io/v1",
    "Certificate",
    _object(
        "secretName dnsNames issuerRef",
        secretName=_NAME,
        dnsNames={"type": "array", "minItems": 1, "items": _NAME},
        duration=_DURATION,
        renewBefore=_DURATION,
        privateKey=_object(
            "",
            algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
            size={"type": "integer"},
            rotationPolicy={"enum": ["Never", "Always"]},
        ),
        usages={"type": "array", "items": {"enum": ["server auth", "client auth", "digital signature"]}},
        issuerRef=_object("name", group={"type": "string"}, kind={"enum": ["Issuer", "ClusterIssuer"]}, name=_NAME),
    ),
)
