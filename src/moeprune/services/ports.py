"""Which TCP ports can be had on this machine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection
from contextlib import ExitStack

from moeprune.errors import InputError, ServiceError
from moeprune.services.addresses import HOST


def require_free(port: int, owner: str, variable: str) -> None:
    """Raise ServiceError if the port that `owner` wants and `variable` sets cannot be had, InputError if it is none."""
    if not 0 < port < 65536:
        raise InputError(f"{variable}={port}, wanted by {owner}, is not a port: choose one from 1024 to 65535")
    if (problem := hindrance(port)) is None:
        return
    hint = " (on macOS, AirPlay Receiver does)" if sys.platform == "darwin" and port == 5000 else ""
    raise ServiceError(
        f"port {port}, wanted by {owner}, cannot be had, {problem}{hint}: "
        f"stop what uses it or choose another port, e.g. {variable}={free_ports(1)[0]}"
    )


def hindrance(port: int) -> str | None:
    """Why a server cannot have the port, None if it can."""
    # Connecting too: a program on all interfaces does not hinder macOS from binding 127.0.0.1, and one on ::1 alone
    # would answer a browser that is sent to localhost.
    for family, host in ((socket.AF_INET, HOST), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.settimeout(1.0)
                if client.connect_ex((host, port)) == 0:
                    return f"another program listens on {host}"
        except OSError:
            continue  # this machine has no IPv6
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        # As servers do: connections of a server that just ended do not count as taken.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, port))
        except OSError as error:
            return str(error.strerror).lower()
    return None


def free_ports(count: int, avoid: Collection[int] = ()) -> list[int]:
    """Different ports that are free now and not among `avoid`."""
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            server = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            server.bind((HOST, 0))
            port: int = server.getsockname()[1]
            if port not in avoid:
                found.append(port)
        return found
