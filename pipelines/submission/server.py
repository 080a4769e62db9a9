"""The API of Kubeflow Pipelines behind one small door: who we are, what is tried again, what an error means."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import kfp
import urllib3.exceptions
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
from kfp_server_api import ApiException, V2beta1GetHealthzResponse

from moeprune.errors import InputError, ServiceError, in_one_line

Result = TypeVar("Result")
# A server that is being replaced is back in minutes; a run that is followed takes hours.
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
_PASSING = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


class NotFoundError(ServiceError):
    """There is no such thing on the server."""


class ConflictError(ServiceError):
    """There is one of that name already."""


@dataclass(frozen=True)
class Address:
    """Where Kubeflow Pipelines is, and how to come in.

    Attributes:
        host: of its API, such as https://kubeflow.example/pipeline; empty: as the kubeconfig says.
        ui: what a browser opens; empty: the host.
        token_file: with a bearer token; it is read for every request, since tokens are replaced before they expire.
        ca_file: with the certificates to trust.
        namespace: of Kubeflow itself, for the kubeconfig's way in.
    """

    host: str = ""
    ui: str = ""
    token_file: str = ""
    ca_file: str = ""
    namespace: str = "kubeflow"

    def link(self, path: str) -> str:
        """Where a browser shows a thing; only its path where the way in is no browser's."""
        return f"{(self.ui or self.host).rstrip('/')}/#/{path}"


class _Client(kfp.Client):
    def get_kfp_healthz(self, sleep_duration: int = 5) -> V2beta1GetHealthzResponse:
        """kfp asks while it is made, for a namespace to keep in the home directory; ours is said each time."""
        return V2beta1GetHealthzResponse(multi_user=False)


class Server:
    """One KFP API. Raises InputError where the address cannot be used."""

    def __init__(self, address: Address) -> None:
        self.address = address
        if not address.host and not _has_kubeconfig():
            raise InputError(
                "where is Kubeflow Pipelines? Say it with --host or KF_PIPELINES_ENDPOINT, or have a kubeconfig"
            )
        if address.token_file and not os.access(address.token_file, os.R_OK):
            raise InputError(f"the token file {address.token_file} cannot be read")
        self._client: Any = None

    def _connected(self) -> Any:
        if self._client is None:
            token_file = self.address.token_file
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it works with KFP 2 alone
                self._client = _Client(
                    host=self.address.host or None,
                    namespace=self.address.namespace,
                    ssl_ca_cert=self.address.ca_file or None,
                    credentials=ServiceAccountTokenVolumeCredentials(token_file) if token_file else None,
                )
        return self._client

    def read(self, action: Callable[[Any], Result]) -> Result:
        """Ask for something; a passing fault is waited out. Raises ServiceError."""
        for pause in _PAUSES_SECONDS:
            try:
                return self._once(action)
            except (ApiException, urllib3.exceptions.HTTPError) as error:
                if isinstance(error, ApiException) and error.status not in _PASSING:
                    raise self._explained(error) from error
                time.sleep(pause)
        return self.write(action)

    def write(self, action: Callable[[Any], Result]) -> Result:
        """Ask for a change, once: an answer that got lost may mean that it was made. Raises ServiceError."""
        try:
            return self._once(action)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise self._explained(error) from error

    def _once(self, action: Callable[[Any], Result]) -> Result:
        try:
            return action(self._connected())
        except ApiException as error:
            if error.status != HTTPStatus.UNAUTHORIZED:
                raise
        self._client = None  # the next one reads the token, or the kubeconfig, again
        return action(self._connected())

    def _explained(self, error: Exception) -> ServiceError:
        where = self.address.host or "in the kubeconfig's cluster"
        if not isinstance(error, ApiException):
            return ServiceError(f"Kubeflow Pipelines at {where} does not answer: {in_one_line(error)[:300]}")
        said = f"Kubeflow Pipelines at {where} says: {_message(error)}"
        match error.status:
            case HTTPStatus.UNAUTHORIZED:
                return ServiceError(f"{said}; the token has expired or is not one of its own: renew it (--token-file)")
            case HTTPStatus.FORBIDDEN:
                return ServiceError(f"{said}; whoever the token is of may not do this in that namespace")
            case HTTPStatus.NOT_FOUND:
                return NotFoundError(said)
            case HTTPStatus.CONFLICT:
                return ConflictError(said)
        return ServiceError(said)


def _message(error: ApiException) -> str:
    """What the server says is wrong, of the JSON that it answers; else the reason of the status."""
    try:
        answer = json.loads(error.body)
        message = answer["message"] or answer["error"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return f"{error.status} {' '.join(str(message).split())[:400]}"


def _has_kubeconfig() -> bool:
    from kubernetes import config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except (config.ConfigException, OSError):
            return False
    return True
