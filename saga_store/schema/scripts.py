"""Where the migrations are, and Alembic's configuration for them."""

import importlib.util
from pathlib import Path

from alembic.config import Config
from sqlalchemy import Connection, column, select, table, text

from saga_store.schema.errors import MigrationError

VERSION_TABLE = "saga_store_version"
"""A table of our own: ids and tables of a host application's history are not ours to touch."""


def _folder() -> Path:
    spec = importlib.util.find_spec("saga_store.migrations")
    if spec is None or not spec.origin:
        raise ModuleNotFoundError(
            "saga_store.migrations is missing: install the package (make setup, or pip install --editable .), since "
            "the checkout alone has it under another name",
            name="saga_store.migrations",
        )
    return Path(spec.origin).parent


SCRIPTS = _folder()
"""The folder with ``env.py`` and ``versions``."""


def make_config(**attributes: object) -> Config:
    """Return a configuration for Alembic's commands; the attributes are those that ``environment`` reads."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes.update(attributes)
    return config


def recorded_revision(connection: Connection, schema: str | None = None) -> str | None:
    """Return the revision that the database records; None if there is none, or no table that could hold one.

    Raises:
        MigrationError: There are several, as in a table that is shared with another history.
    """
    version = table(VERSION_TABLE, column("version_num"), schema=schema)
    name = connection.dialect.identifier_preparer.format_table(version)
    with connection.begin():
        if connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is None:
            return None
        found = list(connection.scalars(select(version.c.version_num)))
    if len(found) > 1:
        raise MigrationError(f"{name} holds {len(found)} revisions, and should hold one: {', '.join(sorted(found))}")
    return next(iter(found), None)
