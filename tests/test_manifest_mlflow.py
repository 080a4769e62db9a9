"""MLflow on a cluster, its secrets and its backups: what the manifests say of it fits the release and itself."""

from __future__ import annotations

import configparser
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from manifest_policies import pods
from overlays import MANIFESTS, MLFLOW, OVERLAYS, ROOT, RUNS, container_of, find, overlays, pod_of, render, secrets_of
from scripts import script


class TestMlflow:
    @overlays
    def test_is_the_release_that_is_tested_here(self, overlay: str) -> None:
        (release,) = re.findall(r"^mlflow==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        objects = render(overlay)
        images = {
            container["image"]
            for of in pods(objects)
            for _, container in of.containers()
            if "mlflow/mlflow" in container["image"]
        }
        # "full": with drivers for PostgreSQL and S3, and what authentication needs.
        assert images == {f"ghcr.io/mlflow/mlflow:v{release}-full"}
        # A Job cannot be changed: another release has another.
        assert find(objects, "Job", f"mlflow-migration-v{release}", MLFLOW)

    @overlays
    def test_asks_who_is_there_and_keeps_its_own_address(self, overlay: str) -> None:
        server = container_of(find(render(overlay), "Deployment", "mlflow"))
        assert server["command"][:4] == ["mlflow", "server", "--app-name", "basic-auth"]
        settings = find(render(overlay), "ConfigMap", "mlflow", MLFLOW)["data"]
        assert "*" not in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
        # In the cluster's network there is a service of this name, which Kubernetes would have it take for a port.
        assert pod_of(find(render(overlay), "Deployment", "mlflow"))["enableServiceLinks"] is False

    def test_speaks_tls_in_production(self) -> None:
        objects = render("prod")
        server = container_of(find(objects, "Deployment", "mlflow"))
        options = find(objects, "ConfigMap", "mlflow", MLFLOW)["data"]["MLFLOW_UVICORN_OPTS"].split()
        mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
        for option in ("--ssl-certfile", "--ssl-keyfile"):
            assert str(Path(options[options.index(option) + 1]).parent) in mounts
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[probe]["httpGet"] == {"path": "/health", "port": "http", "scheme": "HTTPS"}
        address = find(objects, "ExternalSecret", "moeprune")["spec"]["target"]["template"]["data"][
            "MLFLOW_TRACKING_URI"
        ]
        upstream = f"--upstream={address}"
        assert upstream in container_of(find(objects, "Deployment", "mlflow-login"))["args"]
        host = address.removeprefix("https://").removesuffix(":5000")
        assert host in find(objects, "Certificate", "mlflow")["spec"]["dnsNames"]

    def test_a_server_waits_for_the_migration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        database = script(MANIFESTS / "base/mlflow/database.py")
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{tmp_path / 'runs.db'}")
        with pytest.raises(SystemExit, match=r"not ready in 0 s: its schema is None, not yet [0-9a-f]{12}"):
            database.wait(0)
        engine = database.tracking_database()
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('an older one')")
        with pytest.raises(SystemExit, match="its schema is an older one, not yet"):
            database.wait(0)
        with engine.begin() as connection:
            newest = database.utils._get_latest_schema_revision()
            connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{newest}'")
        database.wait(0)
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{tmp_path / 'no' / 'such' / 'place.db'}")
        with pytest.raises(SystemExit, match="it does not answer: unable to open database file"):
            database.wait(0)

    def test_kubeflow_is_told_what_it_knows(self) -> None:
        """In a namespace, Kubeflow Pipelines takes these settings and refuses the whole entry for any other."""
        entry = json.loads(find(render("prod"), "ConfigMap", "kfp-launcher")["data"]["plugins.mlflow"])
        assert entry.keys() == {"settings"}
        assert entry["settings"].keys() <= {
            "experimentDescription",
            "defaultExperimentName",
            "injectUserEnvVars",
            "credentialSecretRef",
        }
        for overlay in OVERLAYS:
            keys = secrets_of(overlay)["Secret", RUNS, "kfp-mlflow-credentials"]
            assert keys == set(entry["settings"]["credentialSecretRef"].values())


class TestSecrets:
    def test_those_made_up_for_a_small_cluster_fit_together(self) -> None:
        make = script(MANIFESTS / "overlays/dev/make_secrets.py").made_up
        secrets = {it["metadata"]["name"]: it["stringData"] for it in make()}
        users = configparser.ConfigParser()
        users.read_string(secrets["mlflow-auth"]["basic_auth.ini"])
        for address, database in (
            (users["mlflow"]["database_uri"], "mlflow_auth"),
            (secrets["mlflow-database"]["tracking-uri"], "mlflow"),
        ):
            password = secrets["postgres"]["password"]
            assert address == f"postgresql+psycopg2://mlflow:{password}@postgres:5432/{database}"
        password = secrets["mlflow-auth"]["pipeline-password"]
        assert secrets["moeprune"]["MLFLOW_TRACKING_PASSWORD"] == password
        assert secrets["kfp-mlflow-credentials"]["password"] == password
        assert secrets["mlflow-s3"].items() <= secrets["moeprune"].items()
        assert password != secrets["mlflow-auth"]["admin-password"]
        namespaces = {it["metadata"]["name"]: it["metadata"]["namespace"] for it in make("kubeflow")}
        assert namespaces["moeprune"] == namespaces["kfp-mlflow-credentials"] == "kubeflow"
        assert namespaces["postgres"] == MLFLOW
        again = {it["metadata"]["name"]: it["stringData"] for it in make()}
        assert again["postgres"] != secrets["postgres"]
        assert again["mlflow-s3"] != secrets["mlflow-s3"]

    def test_the_file_of_users_takes_any_address(self) -> None:
        """A percent sign, as of an escaped character in a password, is special in it."""
        secret = find(render("prod"), "ExternalSecret", "mlflow-auth")
        template = secret["spec"]["target"]["template"]["data"]["basic_auth.ini"]
        address = "postgresql+psycopg2://mlflow:p%40ss@host/mlflow_auth?sslmode=verify-full"
        filled = template.replace('{{ .auth_uri | replace "%" "%%" }}', address.replace("%", "%%"))
        assert "{{" not in filled
        users = configparser.ConfigParser()
        users.read_string(filled)
        assert users["mlflow"]["database_uri"] == address

    @pytest.mark.parametrize("overlay", ["gpu", "prod"])
    def test_templates_use_what_is_fetched(self, overlay: str) -> None:
        for it in render(overlay):
            if it["kind"] == "ExternalSecret" and (template := it["spec"]["target"].get("template")):
                used = set(re.findall(r"\{\{ \.(\w+)", json.dumps(template)))
                assert used == {entry["secretKey"] for entry in it["spec"]["data"]}, it["metadata"]["name"]


class TestBackups:
    def test_arrive(self, client: Any, tmp_path: Path) -> None:
        upload = script(MANIFESTS / "overlays/prod/upload.py").upload
        (tmp_path / "mlflow.dump").write_bytes(b"runs")
        (tmp_path / "mlflow_auth.dump").write_bytes(b"users")
        client.create_bucket(Bucket="backups")
        keys = upload(tmp_path, "s3://backups/nightly", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
        folder = "nightly/2026-01-02T030405Z"
        assert keys == [f"{folder}/mlflow.dump", f"{folder}/mlflow_auth.dump"]
        assert client.get_object(Bucket="backups", Key=keys[1])["Body"].read() == b"users"
        assert upload(tmp_path, "s3://backups", datetime(2026, 1, 3, tzinfo=UTC))[0].startswith("2026-01-03T")

    def test_an_empty_dump_is_none(self, tmp_path: Path) -> None:
        upload = script(MANIFESTS / "overlays/prod/upload.py").upload
        with pytest.raises(SystemExit, match="there is no dump"):
            upload(tmp_path, "s3://backups", datetime.now(UTC))
        (tmp_path / "mlflow.dump").touch()
        with pytest.raises(SystemExit, match="or an empty one"):
            upload(tmp_path, "s3://backups", datetime.now(UTC))
