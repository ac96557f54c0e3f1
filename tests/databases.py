"""Databases for tests: one each, cloned in milliseconds from one that Alembic migrated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
from alembic import command
from alembic.config import Config
from psycopg.sql import SQL, Composable, Identifier
from sqlalchemy import URL, make_url

from saga_store.testing.postgres import PostgresServer

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
# Nobody may connect to template0, so that it can always be copied; and a server's own default may not be UTF-8.
PRISTINE = SQL("TEMPLATE template0 ENCODING 'UTF8'")


@dataclass(frozen=True, slots=True)
class Database:
    """One database on the server of the run."""

    address: URL

    @property
    def name(self) -> str:
        assert self.address.database
        return self.address.database

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
        self._copying = SQL("STRATEGY file_copy" if admin.info.server_version >= 150000 else "")

    @contextmanager
    def empty(self) -> Iterator[Database]:
        with self._created(PRISTINE) as database:
            yield database

    @contextmanager
    def migrated(self) -> Iterator[Database]:
        with self.empty() as database:
            config = Config(str(ALEMBIC_INI))
            config.attributes["url"] = database.url("psycopg")
            command.upgrade(config, "head")
            yield database

    @contextmanager
    def clone(self, template: Database) -> Iterator[Database]:
        with self._created(SQL("TEMPLATE {} {}").format(Identifier(template.name), self._copying)) as database:
            yield database

    def drop_doomed(self) -> None:
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
