"""Where the migrations are, and Alembic's configuration for them."""

import importlib.util
from pathlib import Path

from alembic.config import Config
from sqlalchemy import Connection, column, select, table, text

from saga_store.schema.settings import MigrationError

VERSION_TABLE = "saga_store_version"
"""A table of our own: ids and tables of a host application's history are not ours to touch."""


def _folder() -> Path:
    spec = importlib.util.find_spec("saga_store.migrations")
    if spec is None or not spec.origin:
        raise ModuleNotFoundError(
            "saga_store.migrations is missing, which belongs to the package: install that again",
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


def recorded_revision(connection: Connection) -> str | None:
    """Return the revision that the database records, in the first schema of the search_path; None if there is none.

    Raises:
        MigrationError: There are several, as in a table that is shared with another history.
    """
    qualified = "quote_ident(current_schema()) || '." + VERSION_TABLE + "'"
    if connection.scalar(text(f"SELECT to_regclass({qualified})")) is None:
        return None
    schema = connection.scalar(text("SELECT current_schema()"))
    found: list[str] = list(
        connection.scalars(select(column("version_num")).select_from(table(VERSION_TABLE, schema=schema)))
    )
    if len(found) > 1:
        raise MigrationError(f"{VERSION_TABLE} holds {len(found)} revisions, not one: {', '.join(sorted(found))}")
    return next(iter(found), None)
