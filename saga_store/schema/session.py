"""What a migration sets in its session, and gives back: the search_path, the timeouts, and the migration lock."""

import contextlib
from collections.abc import Iterator

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateSchema

from saga_store.schema.errors import MigrationError, MigrationLockError
from saga_store.schema.patience import Patience
from saga_store.schema.scripts import VERSION_TABLE
from saga_store.schema.sessions import holders_of_key
from saga_store.schema.settings import LOCK_TIMEOUT, STATEMENT_TIMEOUT, Settings

# Everything is committed at once: Alembic would take an open transaction for somebody else's, and never commit.

KEY = f"hashtextextended('{VERSION_TABLE}:' || {{schema}}, 0)"
"""The key of the migration lock: of its database, as all advisory locks are, of one schema and its version table."""


_EXISTS = text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")


def quoted(name: str) -> str:
    """Quote a name as a value has it; the dialect's own quoting is for statements, where percent signs are doubled."""
    return '"' + name.replace('"', '""') + '"'


@contextlib.contextmanager
def target_schema(connection: Connection, settings: Settings) -> Iterator[str]:
    """Yield the schema's name, which all names in this session refer to until the end."""
    if connection.dialect.detect_autocommit_setting(connection.connection.dbapi_connection):  # type: ignore[arg-type] # open
        raise MigrationError("the connection is in autocommit, where a revision that fails couldn't be undone")
    with _restored(connection):
        name = settings.schema
        with connection.begin():
            if name is not None:
                _set(connection, "search_path", quoted(name))
            found = connection.scalar(text("SELECT current_schema()"))
        if name is None and found is None:
            raise MigrationError("no schema of the session's search_path exists: create it, or name one as schema")
        yield name or str(found)


@contextlib.contextmanager
def migration(connection: Connection, settings: Settings, schema: str) -> Iterator[None]:
    """Hold the migration lock, and see to it that the schema is there and that no statement waits for long."""
    with _locked(connection, settings, schema):
        with connection.begin():
            _set(connection, "lock_timeout", LOCK_TIMEOUT)
            _set(connection, "statement_timeout", STATEMENT_TIMEOUT)
            _see_to(connection, settings, schema)
        yield


def require_schema(connection: Connection, schema: str) -> None:
    """Raise MigrationError if there is no such schema."""
    if connection.scalar(_EXISTS, {"schema": schema}) is None:
        raise MigrationError(
            f"there is no schema {schema!r}: correct the name, or have it created with --create-schema "
            "(alembic: -x create_schema=true)"
        )


def _see_to(connection: Connection, settings: Settings, schema: str) -> None:
    # Asked first: CREATE SCHEMA IF NOT EXISTS is refused to a role that may create none, also where there is one.
    if settings.create_schema and settings.schema and connection.scalar(_EXISTS, {"schema": schema}) is None:
        connection.execute(CreateSchema(schema, if_not_exists=True))
    require_schema(connection, schema)


@contextlib.contextmanager
def _locked(connection: Connection, settings: Settings, schema: str) -> Iterator[None]:
    # Polled: a session that waited inside the server for the lock would have a snapshot, for which CREATE INDEX
    # CONCURRENTLY of the one that holds the lock would wait in turn.
    patience = Patience(connection, settings.lock_wait)
    with connection.begin():
        key = connection.scalar(text(f"SELECT {KEY.format(schema='CAST(:schema AS text)')}"), {"schema": schema})
    while not _call(connection, "pg_try_advisory_lock", key):
        if not patience.pause():
            raise MigrationLockError(
                f"another migration of schema {schema!r} hasn't ended within {patience.wait.total_seconds():g} s, and "
                f"nothing was done. Its session:\n{holders_of_key(connection, key)}\n"
                "Wait for it, or have a longer --lock-wait (alembic: -x lock_wait=SECONDS)."
            )
    try:
        yield
    finally:
        with _unless_lost(connection):
            _call(connection, "pg_advisory_unlock", key)


def _call(connection: Connection, function: str, key: int) -> bool:
    with connection.begin():
        return bool(connection.scalar(text(f"SELECT {function}(CAST(:key AS bigint))"), {"key": key}))


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute(text("SELECT set_config(:name, :value, FALSE)"), {"name": name, "value": value})


@contextlib.contextmanager
def _restored(connection: Connection) -> Iterator[None]:
    """Give a session of the caller's, or of a pool's, back as it was."""
    names = ("search_path", "lock_timeout", "statement_timeout")
    with connection.begin():
        before = {name: connection.scalar(text("SELECT current_setting(:name)"), {"name": name}) for name in names}
    try:
        yield
    finally:
        with _unless_lost(connection), connection.begin():
            for name, value in before.items():
                _set(connection, name, value)


@contextlib.contextmanager
def _unless_lost(connection: Connection) -> Iterator[None]:
    """Tidy up, unless the session has ended: then nothing is left to tidy up, and the first error counts."""
    if connection.in_transaction():
        connection.rollback()
    try:
        yield
    except DBAPIError:
        if not connection.invalidated:
            raise
