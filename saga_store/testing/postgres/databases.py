"""Databases for tests: one each, cloned in milliseconds from one that was migrated once. Needs psycopg."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import psycopg
from psycopg.sql import SQL, Composable, Identifier
from sqlalchemy import URL, make_url

from saga_store import schema
from saga_store.testing.postgres.server import PostgresServer

_FIRST_WITH_STRATEGIES = 150000
_PATIENCE_MS = 5000
# Beyond all times of tests, and within those of PostgreSQL.
_OUT_OF_REACH = timedelta(days=100_000)
_TIMES = """
SELECT c.relname, a.attname
FROM pg_attribute a
JOIN pg_class c ON c.oid = a.attrelid
WHERE a.attrelid IN ('saga_executions'::regclass, 'saga_logs'::regclass, 'saga_archives'::regclass)
    AND a.atttypid = 'timestamptz'::regtype AND NOT a.attisdropped
ORDER BY 1, 2
"""
# Nobody may connect to template0, so that it can always be copied; and a server's own default may not be UTF-8.
PRISTINE = SQL("TEMPLATE template0 ENCODING 'UTF8'")


@dataclass(frozen=True, slots=True)
class Database:
    """One database on a server."""

    address: URL

    @property
    def name(self) -> str:
        return self.address.database or ""

    def url(self, driver: str | None = None) -> str:
        """Return ``postgresql+driver://...``; without a driver, what psycopg and libpq themselves take."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return self.address.set(drivername=scheme).render_as_string(hide_password=False)


class Databases:
    """Creates and drops databases, all over one connection.

    A database is dropped after the next one was created: PostgreSQL waits 100 ms for a session that is just ending,
    as those of the last test are, and by then they have ended.
    """

    def __init__(self, server: PostgresServer, admin: psycopg.Connection) -> None:
        self._server = make_url(server.url)
        self._admin = admin
        self._doomed: list[Identifier] = []
        # Copying files beats the default of logging every page, which PostgreSQL 14 doesn't know and needn't.
        self._copying = SQL("STRATEGY file_copy" if admin.info.server_version >= _FIRST_WITH_STRATEGIES else "")

    @contextmanager
    def empty(self) -> Iterator[Database]:
        """Give a new database for as long as the block."""
        with self._created(PRISTINE) as database:
            yield database

    @contextmanager
    def migrated(self) -> Iterator[Database]:
        """Give one with the tables of this release, which can be cloned as long as nobody is connected to it."""
        with self.empty() as database:
            schema.upgrade(database.url("psycopg"))
            yield database

    @contextmanager
    def clone(self, template: Database) -> Iterator[Database]:
        """Give a copy for as long as the block."""
        with self._created(SQL("TEMPLATE {} {}").format(Identifier(template.name), self._copying)) as database:
            yield database

    def drop_doomed(self) -> None:
        """Drop those whose blocks have been left; to be called after the last of them."""
        while self._doomed:
            self._admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(self._doomed.pop()))

    @contextmanager
    def _created(self, how: Composable) -> Iterator[Database]:
        database = Database(self._server.set(database=f"saga_test_{uuid4().hex[:16]}"))
        name = Identifier(database.name)
        self._admin.execute(SQL("CREATE DATABASE {} {}").format(name, how))
        self.drop_doomed()
        try:
            yield database
        finally:
            self._doomed.append(name)


def make_older(database: Database, by: timedelta) -> None:
    """Move all times back that are committed in the tables: as if so much time had passed.

    Raises:
        TimeoutError: A transaction that is open has locked a row, for longer than five seconds.
    """
    with psycopg.connect(database.url(), options=f"-c lock_timeout={_PATIENCE_MS}") as connection:
        columns: dict[str, list[str]] = {}
        for table, column in connection.execute(_TIMES).fetchall():
            columns.setdefault(table, []).append(column)
        try:
            # An archive's time is unique: first all go where none is, and then where they belong.
            for interval in (_OUT_OF_REACH + by, -_OUT_OF_REACH):
                for table, moved in columns.items():
                    changes = SQL(", ").join(
                        SQL("{0} = {0} - {1}").format(Identifier(name), interval) for name in moved
                    )
                    connection.execute(SQL("UPDATE {} SET {}").format(Identifier(table), changes))
        except psycopg.errors.LockNotAvailable as exc:
            raise TimeoutError(
                "a transaction that is open has locked a saga, so that its times can't be moved: commit or roll back "
                "before the clock is moved"
            ) from exc
