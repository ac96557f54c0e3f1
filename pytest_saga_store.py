"""The plugin for pytest: fixtures for tests of code that uses saga-store. Nothing is loaded before one of them is used.

They are ordinary fixtures, not async ones, so that they can be used with pytest-asyncio, with anyio and without either.
docs/how-to/test-your-code.md tells what they are for. Needs the extra ``testing``.

Settings of pytest: ``saga_store_pg``, which PostgreSQL to use (auto, docker, embedded or a URL; the variable
SAGA_STORE_TEST_PG comes first), and ``saga_store_driver``, asyncpg or psycopg.
"""

import importlib.util
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from saga_store import MemorySagaStorage
    from saga_store.sqlalchemy import SqlAlchemySagaStorage
    from saga_store.testing.clock import SagaClock
    from saga_store.testing.postgres import PostgresServer
    from saga_store.testing.postgres.databases import Database, Databases

_DRIVERS = ("asyncpg", "psycopg")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "saga_store_pg",
        "PostgreSQL for saga-store's fixtures: auto (a container, else embedded), docker, embedded or a URL",
        default="auto",
    )
    parser.addini(
        "saga_store_driver",
        "what saga_store_engine connects by: asyncpg (if it is installed, else) psycopg",
        default="",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("asyncio"):
        # The contract kit has it, and what the fixtures load is beside that.
        config.addinivalue_line("markers", "asyncio: a test for pytest-asyncio, which isn't there")


@pytest.fixture(scope="session")
def saga_store_server(pytestconfig: pytest.Config) -> "Iterator[PostgresServer]":
    """A PostgreSQL for the session, by SAGA_STORE_TEST_PG or ``saga_store_pg``; without one the tests fail."""
    from saga_store.testing.postgres import PostgresUnavailableError, serve  # noqa: PLC0415 - see the module
    from saga_store.testing.postgres.server import show_choice  # noqa: PLC0415 - likewise

    variable = os.environ.get("SAGA_STORE_TEST_PG")
    choice = variable or str(pytestconfig.getini("saga_store_pg"))
    said = f"{'SAGA_STORE_TEST_PG' if variable else 'saga_store_pg'}={show_choice(choice)}"
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serve(choice))
        except PostgresUnavailableError as exc:
            pytest.fail(f"no PostgreSQL for saga-store's fixtures ({said}): {exc}", pytrace=False)
        yield server


@pytest.fixture(scope="session")
def _saga_store_databases(saga_store_server: "PostgresServer") -> "Iterator[Databases]":
    import psycopg  # noqa: PLC0415 - see the module

    from saga_store.testing.postgres.databases import Databases  # noqa: PLC0415 - likewise

    with psycopg.connect(saga_store_server.url, autocommit=True) as admin:
        databases = Databases(saga_store_server, admin)
        yield databases
        databases.drop_doomed()


@pytest.fixture(scope="session")
def _saga_store_template(_saga_store_databases: "Databases") -> "Iterator[Database]":
    with _saga_store_databases.migrated() as template:
        yield template


@pytest.fixture
def saga_store_clock() -> "SagaClock":
    """A clock to move by ``advance(timedelta)``: for this test's twin, and for what is in its database."""
    from saga_store.testing.clock import SagaClock  # noqa: PLC0415 - see the module

    return SagaClock()


@pytest.fixture
def saga_store_database(
    _saga_store_databases: "Databases", _saga_store_template: "Database", saga_store_clock: "SagaClock"
) -> "Iterator[Database]":
    """A database of the test's own with saga-store's tables, empty; ``url("asyncpg")`` says where."""
    from saga_store.testing.postgres.databases import make_older  # noqa: PLC0415 - see the module

    with _saga_store_databases.clone(_saga_store_template) as database:
        saga_store_clock.follow(lambda by: make_older(database, by))
        yield database


@pytest.fixture
def saga_store_engine(pytestconfig: pytest.Config, saga_store_database: "Database") -> "AsyncEngine":
    """An ``AsyncEngine`` on the test's database, usable in any event loop: it keeps no connection."""
    from sqlalchemy import NullPool  # noqa: PLC0415 - see the module
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - likewise

    return create_async_engine(saga_store_database.url(_driver(pytestconfig)), poolclass=NullPool)


@pytest.fixture
def saga_storage(saga_store_engine: "AsyncEngine") -> "SqlAlchemySagaStorage":
    """A storage on the test's database."""
    from saga_store.sqlalchemy import SqlAlchemySagaStorage  # noqa: PLC0415 - see the module

    return SqlAlchemySagaStorage(saga_store_engine)


@pytest.fixture
def memory_saga_storage(saga_store_clock: "SagaClock") -> "MemorySagaStorage":
    """A storage in memory, the twin of ``saga_storage``; needs no server."""
    from saga_store import MemoryDatabase, MemorySagaStorage  # noqa: PLC0415 - see the module

    return MemorySagaStorage(MemoryDatabase(clock=saga_store_clock))


def _driver(config: pytest.Config) -> str:
    driver = str(config.getini("saga_store_driver")) or next(filter(importlib.util.find_spec, _DRIVERS), "psycopg")
    if driver not in _DRIVERS:
        raise pytest.UsageError(f"saga_store_driver must be asyncpg or psycopg, not {driver!r}")
    return driver
