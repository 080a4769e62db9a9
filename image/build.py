"""Build the image, with the package indexes that this machine's pip is configured with: `make image`.

Indexes, certificates and proxies reach the build as secrets, which leave nothing in the image. Folders on this
machine that pip is told to look into are served to the build while it runs, to this machine only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
INDEXES = ("index-url", "extra-index-url", "find-links")
OTHERS = ("trusted-host", "proxy", "timeout", "default-timeout", "retries")
CERTIFICATES = Path("/run/secrets/ca.crt")  # where the Dockerfile gets them


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch, pip_settings(Path(scratch)) as secrets:
        command = [
            *(arguments.docker, "build", "--tag", arguments.tag, "--network", "host", "--progress", "plain"),
            *(part for pair in secrets.items() for part in ("--secret", "id={},src={}".format(*pair))),
            *(part for name, value in labels().items() for part in ("--build-arg", f"{name}={value}")),
            *("--build-arg", f"TORCH={arguments.torch}"),
            *(("--build-arg", "TORCH_INDEX=") if known_to_pip(arguments.torch) else ()),
            *(part for given in arguments.build_arg for part in ("--build-arg", given)),
            str(ROOT),
        ]
        sys.exit(subprocess.run(command, env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=False).returncode)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", required=True, help="name of the image")
    parser.add_argument("--docker", default="docker", help="the command of a Docker that has BuildKit")
    parser.add_argument("--torch", default="cpu", help="cpu, or of a CUDA, such as cu130")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="see the Dockerfile")
    return parser


def known_to_pip(variant: str) -> bool:
    """Whether the indexes that pip is configured with have PyTorch for this variant; its own is not needed then."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return re.search(rf"\+{re.escape(variant)}\b", found) is not None


def labels() -> dict[str, str]:
    """Of which commit, version and time the image is: the time is the commit's, so that it can be built again."""
    revision, seconds = _git("log", "-1", "--format=%H %ct").split()
    changed = "-changed" if _git("status", "--porcelain", "--untracked-files=no") else ""
    version = (ROOT / "src/moeprune/__init__.py").read_text(encoding="utf-8").partition('__version__ = "')[2]
    return {
        "VERSION": version.partition('"')[0],
        "REVISION": revision + changed,
        "CREATED": datetime.fromtimestamp(int(seconds), UTC).isoformat(),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def pip_settings(scratch: Path) -> Iterator[dict[str, Path]]:
    """Secrets of the build, by name: this machine's settings of pip, as they are to be read inside."""
    settings = configured()
    secrets = {}
    with served() as serve:
        inside = {name: settings[name] for name in OTHERS if name in settings}
        for name in INDEXES:
            if name in settings:
                inside[name] = " ".join(serve(address) for address in settings[name].split())
        if "cert" in settings:
            secrets["ca.crt"] = Path(settings["cert"])
            inside["cert"] = str(CERTIFICATES)
        if inside:
            secrets["pip.conf"] = scratch / "pip.conf"
            rows = "\n".join(f"{name} = {value}" for name, value in inside.items())
            secrets["pip.conf"].write_text(f"[global]\n{rows}\n", encoding="utf-8")
        yield secrets


def configured() -> dict[str, str]:
    """What pip is configured with here, by files and by variables, which go before files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    pairs = (line.partition("=") for line in listed.splitlines())
    found = {name: value.strip("'\"") for name, _, value in pairs}
    scopes = ("global.", "install.", ":env:.")
    return {name.removeprefix(scope): found[name] for scope in scopes for name in found if name.startswith(scope)}


@contextmanager
def served() -> Iterator[Callable[[str], str]]:
    """A function from the address of an index to one by which the build gets there; folders are served meanwhile."""
    servers: list[ThreadingHTTPServer] = []

    def serve(address: str) -> str:
        folder = Path(unquote(urlsplit(address).path)) if address.startswith("file://") else Path(address)
        if not folder.is_dir():
            return address
        # Pages of an index point to files beside it.
        handler = partial(_Quiet, directory=str(folder.parent))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/{folder.name}/"

    try:
        yield serve
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()
