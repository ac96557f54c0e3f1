"""Migrations through a real PgBouncer: refused unless each client keeps its session."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import schema
from saga_store.schema import pooler
from saga_store.testing.postgres import PostgresServer
from tests import pgbouncer
from tests.databases import Database

DRIVERS = ["psycopg", "asyncpg"]


@contextmanager
def pooled(
    patch: pytest.MonkeyPatch, server: PostgresServer, database: Database, *, size: int = 4, **settings: str
) -> Iterator[Database]:
    """Yield the database through a PgBouncer with these settings."""
    text = pgbouncer.SETTINGS
    for name, value in settings.items():
        text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE) + f"{name} = {value}\n"
    patch.setattr(pgbouncer, "SETTINGS", text)
    with pgbouncer.pgbouncer(server.url, pool_size=size) as bouncer:
        yield Database(bouncer.before(database.address))


class TestThroughPgBouncer:
    @pytest.mark.parametrize("driver", DRIVERS)
    @pytest.mark.parametrize("settings", [{"server_round_robin": "0"}, {"server_round_robin": "1"}], ids=str)
    @pytest.mark.parametrize("size", [1, 4])
    def test_transaction_mode_is_refused(  # noqa: PLR0913, PLR0917 - what varies
        self,
        monkeypatch: pytest.MonkeyPatch,
        server: PostgresServer,
        empty_database: Database,
        driver: str,
        settings: dict[str, str],
        size: int,
    ) -> None:
        """Also to a single client, which gets the same session each time as long as it is alone."""
        with (
            pooled(monkeypatch, server, empty_database, size=size, **settings) as through,
            pytest.raises(schema.MigrationError, match=r"leads through a pooler.*Give the URL of PostgreSQL itself"),
        ):
            schema.upgrade(through.url(driver))
        assert schema.current(empty_database.url(driver)) is None

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_statement_mode_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, server: PostgresServer, empty_database: Database, driver: str
    ) -> None:
        with (
            pooled(monkeypatch, server, empty_database, pool_mode="statement") as through,
            # asyncpg hides the code of what PgBouncer says, but not its words.
            pytest.raises(schema.MigrationError, match="transaction blocks not allowed in statement pooling mode"),
        ):
            schema.upgrade(through.url(driver))
        assert schema.current(empty_database.url(driver)) is None

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_session_mode_works(
        self, monkeypatch: pytest.MonkeyPatch, server: PostgresServer, empty_database: Database, driver: str
    ) -> None:
        with pooled(monkeypatch, server, empty_database, pool_mode="session") as through:
            schema.upgrade(through.url(driver))
        assert schema.check(empty_database.url(driver)).state is schema.State.CURRENT

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_a_full_pool_is_refused_in_bounded_time(
        self, monkeypatch: pytest.MonkeyPatch, server: PostgresServer, empty_database: Database, driver: str
    ) -> None:
        """In session mode with one session a second client waits for ever, so nothing can be shown."""
        monkeypatch.setattr(pooler, "_PATIENCE_SECONDS", 1.0)
        settings = {"pool_mode": "session"}
        with (
            pooled(monkeypatch, server, empty_database, size=1, **settings) as through,
            pytest.raises(schema.MigrationError, match="can't be shown to keep sessions apart"),
        ):
            schema.upgrade(through.url(driver))

    def test_an_engine_without_a_connection_to_spare(
        self, monkeypatch: pytest.MonkeyPatch, server: PostgresServer, empty_database: Database
    ) -> None:
        """What is found out with a second client doesn't need a second connection of the caller's pool."""
        with pooled(monkeypatch, server, empty_database, pool_mode="session") as through:
            engine = create_engine(through.url("psycopg"), pool_size=1, max_overflow=0)
            schema.upgrade(engine)
            engine.dispose()

    async def test_inside_a_running_loop(
        self, monkeypatch: pytest.MonkeyPatch, server: PostgresServer, empty_database: Database
    ) -> None:
        with pooled(monkeypatch, server, empty_database, server_round_robin="0") as through:
            for driver in DRIVERS:
                engine = create_async_engine(through.url(driver))
                with pytest.raises(schema.MigrationError, match="leads through a pooler"):
                    async with engine.connect() as connection:
                        await connection.run_sync(schema.upgrade)
                await engine.dispose()
