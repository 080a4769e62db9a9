"""MLflow's databases, in MLflow's image.

database.py migrate   brings both to this release's schema, and makes the users: an administrator, and the pipeline
database.py wait      until that has happened

MLFLOW_BACKEND_STORE_URI says where runs and models are kept, MLFLOW_AUTH_CONFIG_PATH (a file) where users are.
"""

import argparse
import logging
import os
import sys
import time

import sqlalchemy
from mlflow.store.db import utils

SECONDS_BETWEEN_LOOKS = 5
MOST_SECONDS = 1800  # a migration of a large database


def tracking_database() -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(os.environ["MLFLOW_BACKEND_STORE_URI"], pool_pre_ping=True)


def migrate() -> None:
    """Users first: where the other database is ready, as `wait` sees it, all is."""
    from mlflow.server.auth.config import read_auth_config  # needs more of MLflow than to wait does
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    users = SqlAlchemyStore()
    users.init_db(read_auth_config().database_uri)  # to its newest schema
    for who, is_admin in (("ADMIN", True), ("PIPELINE", False)):
        name, password = os.environ[f"{who}_USERNAME"], os.environ[f"{who}_PASSWORD"]
        if users.has_user(name):
            users.update_user(name, password=password, is_admin=is_admin)
        else:
            users.create_user(name, password, is_admin=is_admin)
    database = tracking_database()
    if utils._is_empty_database(database):
        utils._initialize_tables(database)
    else:
        utils._upgrade_db(database)


def wait(seconds: float) -> None:
    """Return when the schema is this release's; exit with 1 when it is not in time."""
    wanted, deadline = utils._get_latest_schema_revision(), time.monotonic() + seconds
    database, told = tracking_database(), ""
    while True:
        try:
            state = f"its schema is {utils._get_schema_version(database)}, not yet {wanted}"
            if state.startswith(f"its schema is {wanted},"):
                return
        except sqlalchemy.exc.OperationalError as error:
            state = f"it does not answer: {str(error.orig).strip()}"
        if state != told:
            logging.info("waiting for the database: %s", state)
            told = state
        if time.monotonic() >= deadline:
            sys.exit(f"the database was not ready in {seconds:.0f} s: {state}; see the log of the migration's Job")
        time.sleep(min(SECONDS_BETWEEN_LOOKS, max(0.1, deadline - time.monotonic())))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("migrate")
    commands.add_parser("wait").add_argument("--seconds", type=float, default=MOST_SECONDS)
    arguments = parser.parse_args()
    if arguments.command == "migrate":
        migrate()
    else:
        wait(arguments.seconds)
