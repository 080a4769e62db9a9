"""The S3 server: SeaweedFS, all its parts in one process, its data in `state/objects` and `state/names`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

from moeprune.errors import InputError
from moeprune.services.addresses import BUCKET, HOST, Services, inherited
from moeprune.services.ports import free_ports
from moeprune.services.process import Launch

MLFLOW_BUCKET = "mlflow"
KEY_FILE = "s3.json"
VOLUME_MEGABYTES = 256  # data are kept in files of this size; nothing is allocated ahead


def launch(state: Path, port: int, avoid: tuple[int, ...]) -> Launch:
    """How to start it with S3 on the port. Raises InputError if SeaweedFS is not installed."""
    weed = executable()
    key(state)
    for directory in ("objects", "names"):
        (state / directory).mkdir(exist_ok=True)
    # The master keeps a log of what the volumes tell it anyway, under its port: a new one at each start.
    for log in (state / "names").glob("m[0-9]*"):
        shutil.rmtree(log)
    # The parts talk over these. Any free ones will do; the defaults, and http port + 10000 for gRPC, might be taken.
    inner = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip((*inner, "s3.port.grpc"), free_ports(len(inner) + 1, avoid), strict=True)) | {"s3.port": port}
    options = {
        "ip": HOST,
        "ip.bind": HOST,
        "dir": "objects",
        "master.dir": "names",  # the filer's database too, which says where each object is
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "master.volumeSizeLimitMB": VOLUME_MEGABYTES,
        "volume.max": 0,  # as many volumes as the disk has room for
        "volume.preStopSeconds": 0,
        "disableHttp": "true",  # master and filer: their pages would show and take files without asking for a key
        "filer": "true",
        "s3": "true",
        "s3.config": KEY_FILE,
        "s3.localSocket": "s3.sock",  # else they are in /tmp
        "filer.localSocket": "filer.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
    }
    # Its parts prove to each other who they are with these; they are in one process, so nobody else needs to know.
    tokens = {f"WEED_JWT_{name}_KEY": secrets.token_hex(32) for name in ("SIGNING", "SIGNING_READ", "FILER_SIGNING")}
    return Launch(
        name="S3",
        command=[str(weed), "server", *(f"-{name}={value}" for name, value in options.items())],
        # HOME: a configuration of SeaweedFS that the user has there is for another server.
        environment=inherited() | tokens | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "HOME": str(state)},
        directory=state,
        log=state / "logs" / "s3.log",
        port=port,
        leftovers=(
            state / "s3.sock",
            state / "filer.sock",
            *(
                Path(f"/tmp/seaweedfs-{part}-grpc-{ports[f'{part}.port.grpc']}.sock")
                for part in ("master", "volume", "filer", "s3")
            ),
        ),
    )


def executable() -> Path:
    """The `weed` of this Python environment, or else the one on the PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if (found := shutil.which("weed", path=places)) is None:
        raise InputError(
            "the local S3 server needs SeaweedFS, and there is no `weed` in this environment: "
            "pip install 'moeprune[local]', or, where that has none for this machine, put SeaweedFS's on the PATH"
        )
    return Path(found)


def key(state: Path) -> tuple[str, str]:
    """The directory's own access key and secret key, made at random when first asked for."""
    path = state / KEY_FILE
    if not path.exists():
        pair = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
        identity = {"name": "moeprune", "credentials": [pair], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        beside = path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file, indent=1)
        beside.replace(path)
    try:
        (identity, *_) = json.loads(path.read_bytes())["identities"]
        (pair, *_) = identity["credentials"]
        return pair["accessKey"], pair["secretKey"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold an S3 key any more: remove it, and a new one is made") from error


def probe(services: Services) -> Callable[[], str | None]:
    """A check that makes the buckets, writes and reads an object, and returns what hinders it, None if nothing."""
    import boto3  # not everybody who imports moeprune has it; the `launch`es say so in a sentence
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=services.s3,
        aws_access_key_id=services.access_key,
        aws_secret_access_key=services.secret_key,
        aws_session_token="",
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
    )
    name, content = "moeprune-probe", secrets.token_bytes(16)

    def check() -> str | None:
        try:
            present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in (MLFLOW_BUCKET, BUCKET):
                if bucket not in present:
                    client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=BUCKET, Key=name, Body=content)
            read = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
            client.delete_object(Bucket=BUCKET, Key=name)
        except (BotoCoreError, ClientError) as error:
            return str(error)
        return None if read == content else "an object does not come back as it was written"

    return check
