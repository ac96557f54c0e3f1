"""One real PostgreSQL per process, one database per test; SAGA_STORE_TEST_PG chooses the server."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from saga_store import schema
from saga_store.testing.postgres import PostgresServer, PostgresUnavailableError, serve
from saga_store.testing.postgres.server import show_choice
from tests.cqrs_tables import create_tables
from tests.databases import Database, Databases
from tests.shard_schemas import SHARD_SCHEMAS, Shards
from tests.wheel import Environment, build_wheel, install_wheel

pytest_plugins = ["tests.announcing"]

SERVER = pytest.StashKey[PostgresServer]()
PATIENCE_SECONDS = 10
SHOWN = ("SQLAlchemy", "alembic", "asyncpg", "psycopg")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server before the header is printed; a run without one fails, it never skips."""
    if session.config.option.collectonly:
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So it is for whatever a shell runs in the background, and would be for all that the tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = ExitStack()
    session.config.add_cleanup(stack.close)
    choice = os.environ.get("SAGA_STORE_TEST_PG") or "auto"
    try:
        session.config.stash[SERVER] = stack.enter_context(serve(choice))
    except PostgresUnavailableError as exc:
        pytest.exit(f"no PostgreSQL for the tests (SAGA_STORE_TEST_PG={show_choice(choice)}): {exc}", returncode=1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    libraries = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    server = config.stash.get(SERVER, None)
    return [f"PostgreSQL {server.version}: {server.how}", libraries] if server else [libraries]


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> PostgresServer:
    return pytestconfig.stash[SERVER]


@pytest.fixture(scope="session")
def saga_store_server(server: PostgresServer) -> PostgresServer:
    """The run's, for the fixtures of the plugin."""
    return server


@pytest.fixture(scope="session")
def databases(server: PostgresServer) -> Iterator[Databases]:
    with psycopg.connect(server.url, autocommit=True) as admin:
        databases = Databases(server, admin)
        yield databases
        databases.drop_doomed()


@pytest.fixture(scope="session")
def template(databases: Databases) -> Iterator[Database]:
    """Yield what Alembic makes of an empty database; nobody connects to it, or it couldn't be copied."""
    with databases.migrated() as database:
        yield database


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection]:
    """A connection of its own, in autocommit, to look at and to disturb the database."""
    with psycopg.connect(database.url(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def database(databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        yield database


@pytest.fixture
def empty_database(databases: Databases) -> Iterator[Database]:
    with databases.empty() as database:
        yield database


@pytest.fixture(scope="session")
def shards_template(databases: Databases) -> Iterator[Database]:
    """Yield a database whose schemas are shards."""
    with databases.empty() as database:
        for name in SHARD_SCHEMAS:
            schema.upgrade(database.url("psycopg"), schema=name, create_schema=True)
        yield database


@pytest.fixture
def shards(databases: Databases, shards_template: Database, tmp_path: Path) -> Iterator[Shards]:
    with databases.clone(shards_template) as database:
        yield Shards(database, tmp_path)


@pytest.fixture(scope="session")
def cqrs_template(databases: Databases) -> Iterator[Database]:
    """Yield python-cqrs's own tables, with rows of all kinds."""
    with databases.empty() as database:
        create_tables(database)
        yield database


@pytest.fixture
def cqrs_database(databases: Databases, cqrs_template: Database) -> Iterator[Database]:
    with databases.clone(cqrs_template) as database:
        yield database


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The built wheel in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder), folder / "environment")


@pytest.fixture
async def make_engine(database: Database) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Make engines on the test's database, and see to it that the test gave every connection back."""
    engines: list[AsyncEngine] = []

    def make(driver: str, **options: Any) -> AsyncEngine:  # noqa: ANN401 - whatever create_async_engine takes
        engines.append(create_async_engine(database.url(driver), **options))
        return engines[-1]

    yield make
    pools = [engine.pool for engine in engines if isinstance(engine.pool, QueuePool)]
    # Callers of a batch hear before its connection is back.
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(pool.checkedout() for pool in pools):  # noqa: ASYNC110 - a pool tells nobody
                await asyncio.sleep(0.01)
    kept = [pool.checkedout() for pool in pools]
    for engine in engines:
        await engine.dispose()
    assert not any(kept), f"connections left checked out, by engine: {kept}"
