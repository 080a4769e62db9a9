"""Where things live: local, built in, and on a real S3 server; and what is said where they cannot be had."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from masking import plain_logits

from moeprune import places, s3
from moeprune.checkpoint.loading import Checkpoint
from moeprune.errors import InputError, ServiceError
from moeprune.places import is_remote, local_file, local_model, output
from moeprune.services import BUCKET, Services

CLOSED = "http://127.0.0.1:9"  # the port of `discard`, where nobody listens


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A key of this test's own."""
    return "tests/" + re.sub(r"\W+", "-", request.node.name)


class TestLocal:
    def test_a_directory_is_its_own_model(self, qwen: Path) -> None:
        with local_model(str(qwen)) as directory:
            assert directory == qwen

    def test_a_file_is_itself(self, corpus: Path) -> None:
        with local_file(str(corpus)) as path:
            assert path == corpus

    @pytest.mark.parametrize("address", ["./none", "/none", "none", "a/b/c", "~/none", "builtin://other"])
    def test_no_model_is_there(self, address: str) -> None:
        with pytest.raises(InputError), local_model(address):
            pass

    def test_a_file_is_no_model(self, corpus: Path) -> None:
        with pytest.raises(InputError, match="not a directory"), local_model(str(corpus)):
            pass

    def test_no_file_is_there(self, tmp_path: Path) -> None:
        for address in (str(tmp_path / "none"), str(tmp_path), "none.json"):
            with pytest.raises(InputError, match="there is no file"), local_file(address):
                pass

    def test_the_built_in_model_is_part_of_the_package(self) -> None:
        with local_model(places.REFERENCE_MODEL) as directory:
            assert directory == Path(places.__file__).parent / "builtin" / "model"

    def test_an_output_is_where_it_was_said(self, tmp_path: Path) -> None:
        with output(str(tmp_path / "a" / "b")) as path:
            assert path == tmp_path / "a" / "b"

    def test_what_is_remote(self) -> None:
        assert is_remote("s3://bucket/key")
        assert not any(map(is_remote, ["/s3://x", "bucket/key", "builtin://code", "owner/name"]))


class TestS3:
    def test_a_checkpoint_goes_there_and_comes_back(self, client: Any, unique: str, qwen: Path, tmp_path: Path) -> None:
        address = f"s3://{BUCKET}/{unique}/model"
        source = tmp_path / "model"
        with output(address) as path:
            tiny.write(path, tiny.FAMILIES["mixtral"](), shard="20KB")
            (path / "deeper").mkdir()
            (path / "deeper" / "file").write_text("below")
            sent = contents(path)
            path.rename(source)
            source.rename(path)
        assert not path.exists()  # nothing stays on this machine
        with local_model(address) as directory:
            assert contents(directory) == sent
            assert plain_logits(Checkpoint(directory).load(), tiny.token_ids(0)).isfinite().all()
        assert not directory.exists()

    def test_a_file_goes_there_and_comes_back_and_can_be_replaced(self, client: Any, unique: str) -> None:
        address = f"s3://{BUCKET}/{unique}/notes #1?.jsonl"
        for text in ("first", "second"):
            with output(address) as path:
                path.write_text(text)
            with local_file(address) as path:
                assert path.read_text() == text
                assert path.name == "notes #1?.jsonl"

    def test_the_config_goes_last(
        self, connected: Services, unique: str, qwen: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[str] = []
        real = s3.client

        def recording() -> Any:
            client = real()
            upload = client.upload_file

            def note_and_upload(file: str, bucket: str, key: str) -> None:
                sent.append(Path(key).name)
                upload(file, bucket, key)

            client.upload_file = note_and_upload
            return client

        monkeypatch.setattr(s3, "client", recording)
        with output(f"s3://{BUCKET}/{unique}") as path:
            path.symlink_to(qwen)
        assert sent[-1] == "config.json"
        assert "model.safetensors" in sent

    def test_a_failure_sends_nothing(self, client: Any, unique: str) -> None:
        for error in (InputError("no"), KeyboardInterrupt()):
            with pytest.raises(type(error)), output(f"s3://{BUCKET}/{unique}") as path:  # noqa: PT012
                path.write_text("half")
                raise error
        assert not client.list_objects_v2(Bucket=BUCKET, Prefix=unique).get("Contents")

    def test_a_neighbour_with_a_longer_name_is_not_it(self, client: Any, unique: str) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{unique}/model-2/config.json", Body=b"{}")
        with pytest.raises(InputError, match="there is nothing at"), local_model(f"s3://{BUCKET}/{unique}/model"):
            pass

    def test_more_objects_than_one_listing_tells(
        self, client: Any, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):
            client.put_object(Bucket=BUCKET, Key=f"{unique}/{number}", Body=b"x")
        real = s3.client

        def short_pages() -> Any:
            client = real()
            pages = client.get_paginator

            class Short:
                def __init__(self, name: str) -> None:
                    self.of = pages(name)

                def paginate(self, **options: Any) -> Any:
                    return self.of.paginate(**options, PaginationConfig={"PageSize": 2})

            client.get_paginator = Short
            return client

        monkeypatch.setattr(s3, "client", short_pages)
        with local_model(f"s3://{BUCKET}/{unique}") as directory:
            assert len(contents(directory)) == 5

    def test_marks_of_folders_are_no_files(self, client: Any, unique: str) -> None:
        for key in (f"{unique}/model/", f"{unique}/model/deeper/"):
            client.put_object(Bucket=BUCKET, Key=key, Body=b"")
        client.put_object(Bucket=BUCKET, Key=f"{unique}/model/deeper/file", Body=b"content")
        with local_model(f"s3://{BUCKET}/{unique}/model") as directory:
            assert contents(directory) == {"deeper/file": b"content"}

    def test_a_place_that_is_taken_is_told_before_any_work(self, client: Any, unique: str) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{unique}/model-00003-of-00003.safetensors", Body=b"of another model")
        with pytest.raises(InputError, match="exists already"), output(f"s3://{BUCKET}/{unique}"):
            pytest.fail("work was begun")

    @pytest.mark.parametrize("place", [local_model, local_file])
    def test_nothing_is_there(self, place: Callable[[str], Any], connected: Services) -> None:
        for address in (f"s3://{BUCKET}/no/such/key", "s3://no-such-bucket/key"):
            with pytest.raises(InputError, match=f"there is nothing at {address}"), place(address):
                pass

    def test_no_bucket_to_write_to(self, connected: Services) -> None:
        with (
            pytest.raises(InputError, match="there is nothing at s3://no-such-bucket/key"),
            output("s3://no-such-bucket/key"),
        ):
            pytest.fail("work was begun")

    def test_a_key_that_is_withdrawn_meanwhile(
        self, connected: Services, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address = f"s3://{BUCKET}/{unique}"
        with pytest.raises(ServiceError, match=address), output(address) as path:  # noqa: PT012
            path.write_text("content")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "withdrawn")

    @pytest.mark.parametrize("address", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key"])
    def test_what_is_no_address(self, address: str, connected: Services) -> None:
        for place in (local_model, local_file, output):
            with pytest.raises(InputError, match="not of the form s3://bucket/key"), place(address):
                pass

    def test_a_name_that_no_bucket_can_have(self, connected: Services) -> None:
        with pytest.raises(ServiceError, match="Invalid bucket name") as raised, output("s3://B_d$/key"):
            pass
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("what", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_a_wrong_key(self, what: str, connected: Services, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(what, "wrong")
        address = f"s3://{BUCKET}/key"
        for place in (local_model, local_file, output):
            with pytest.raises(ServiceError, match=f"S3 refuses {address}"), place(address):
                pytest.fail("let in")


class TestWithoutS3:
    PLACES = (local_model, local_file, output)

    @pytest.fixture(autouse=True)
    def _nobody(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))

    def test_no_credentials(self) -> None:
        for place in self.PLACES:
            with pytest.raises(ServiceError, match="no S3 credentials: set AWS_ACCESS_KEY_ID"), place("s3://b/k"):
                pass

    def test_half_of_the_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
        with pytest.raises(ServiceError, match=r"artial credentials.*set AWS_ACCESS_KEY_ID"), output("s3://b/k"):
            pass

    @pytest.mark.parametrize("endpoint", [CLOSED, "http://no.such.host.invalid:8333", "localhost:8333"])
    def test_a_server_that_does_not_answer_is_told_in_seconds(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_ENDPOINT_URL": endpoint,
        }.items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        for place in self.PLACES:
            with pytest.raises(ServiceError, match=re.escape(endpoint.removeprefix("http://"))), place("s3://b/k"):
                pytest.fail("work was begun")
        assert time.monotonic() - started < 15


ON_THE_HUB = """
import sys, time, tiny
from moeprune.places import local_model
from moeprune.texts import read_blocks

def text(address):
    read_blocks(address, tiny.tokenizer(), block_tokens=8, max_blocks=2)

for read in (lambda address: local_model(address).__enter__(), text):
    for address in ("owner/name", "no owner/name"):
        started = time.monotonic()
        try:
            read(address)
        except Exception as error:
            said = " ".join(str(error).split())
            sys.stdout.write(f"{type(error).__name__} {time.monotonic() - started:.3f} {said}\\n")
"""


def test_a_hub_that_cannot_be_reached_is_told_in_seconds() -> None:
    # In a process of its own, since the hub's address is read when its library is imported.
    environment = {"HF_ENDPOINT": CLOSED, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    told = [line.split(" ", 2) for line in ended.stdout.splitlines()]
    assert [kind for kind, *_ in told] == ["ServiceError", "InputError"] * 2, ended.stdout + ended.stderr
    assert all(float(seconds) < 10 for _, seconds, _ in told), ended.stdout
    assert all("name" in said and "hub" in said for *_, said in told)
    assert not ended.stderr.strip()
