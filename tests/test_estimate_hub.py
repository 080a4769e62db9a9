"""Estimates of models on the Hugging Face hub: a server that answers as the hub does, and counts what is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import tiny

from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError, ServiceError
from moeprune.estimation.anatomy import Anatomy
from moeprune.estimation.headers import describe
from moeprune.estimation.work import Work
from moeprune.steps import estimate as step

MODEL = "someone/tiny"


class Hub:
    """Serves one directory as a model; `taken` is how many bytes of each file were asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken: dict[str, int] = {}
        self.broken = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.broken:
            return self._send(request, 500, b"no")
        if path == f"/api/models/{MODEL}":
            files = [{"rfilename": file.name, "size": file.stat().st_size} for file in self.directory.iterdir()]
            siblings = [*files, {"rfilename": "onnx/model.onnx", "size": 5}]
            return self._send(request, 200, json.dumps({"id": MODEL, "siblings": siblings}).encode())
        if found := re.fullmatch(f"/{MODEL}/resolve/main/(.+)", path):
            ends = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
            assert ends
            part = (self.directory / found[1]).read_bytes()[int(ends[1]) : int(ends[2]) + 1]
            self.taken[found[1]] = self.taken.get(found[1], 0) + len(part)
            return self._send(request, 206, part)
        return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    directory = tiny.write(tmp_path / "model", tiny.FAMILIES["qwen2_moe"](), shard="60KB")
    served = Hub(directory)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
    files = served.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Thread(target=served.server.serve_forever, daemon=True).start()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_of_a_model_on_the_hub_only_config_and_headers_are_taken(hub: Hub) -> None:
    local = step.estimate(str(hub.directory), Work(), gpu="L4")
    there = step.estimate(MODEL, Work(), gpu="L4")
    assert there.original == local.original
    assert there.pruned == local.pruned
    sizes = {path.name: path.stat().st_size for path in hub.directory.iterdir()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    taken = sum(size for name, size in hub.taken.items() if name.endswith(".safetensors"))
    entries = Checkpoint(hub.directory).files.entries.values()
    assert 0 < taken == weights - sum(entry.nbytes for entry in entries)
    assert set(hub.taken) == {name for name in sizes if "safetensors" in name} | {"config.json"}
    brought = next(one for one in there.steps if one.name == "calibrate").disk.parts
    assert "the original, brought here" in [part.what for part in brought]


def test_small_files_that_stay_there_are_counted(hub: Hub) -> None:
    with describe(MODEL) as described:
        assert Anatomy.of(described.checkpoint, described.elsewhere) == Anatomy.of(Checkpoint(hub.directory))


def test_a_model_that_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(InputError, match="no directory someone/else here and no such model on the hub"):
        step.estimate("someone/else", Work(), gpu="L4")


def test_a_model_without_a_config(hub: Hub) -> None:
    (hub.directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"it has no config\.json"):
        step.estimate(MODEL, Work(), gpu="L4")


def test_a_hub_that_fails(hub: Hub) -> None:
    hub.broken = True
    with pytest.raises(ServiceError, match="cannot be reached for its headers"):
        step.estimate(MODEL, Work(), gpu="L4")
