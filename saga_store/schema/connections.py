"""A connection to migrate on: from a URL, an engine or a connection, with either driver."""

import asyncio
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from saga_store.schema import pooler
from saga_store.schema.errors import MigrationError

Bind = str | URL | Engine | Connection
T = TypeVar("T")

DRIVERS = ("psycopg", "asyncpg")
HOW_TO_SET = "set DATABASE_URL, such as postgresql+psycopg://user:password@host:5432/database"
RUN_SYNC = "await connection.run_sync(lambda sync: schema.upgrade(sync))"


def connected(bind: Bind, work: Callable[[Connection], T]) -> T:
    """Return what ``work`` makes of a connection that isn't in a transaction.

    Raises:
        MigrationError: There is no such connection to be had, or the one given is in a transaction.
    """
    if isinstance(bind, AsyncConnection | AsyncEngine):
        raise MigrationError(f"an {type(bind).__name__} can't be used by itself: pass its connection on, {RUN_SYNC}")
    if isinstance(bind, Connection):
        if bind.in_transaction():
            raise MigrationError(
                "the connection is in a transaction already, so the migration would be committed by someone else or "
                "never: commit it or pass a fresh connection"
            )
        return work(bind)
    if isinstance(bind, Engine):
        with _explained(bind.url):
            connection = bind.connect()
        with connection:
            return work(connection)
    url = database_url(bind)
    if url.get_driver_name() != "asyncpg":
        return connected(create_engine(url, poolclass=NullPool), work)
    if _loop_is_running():
        raise MigrationError(
            "asyncpg can't be used here, inside a running event loop: use a postgresql+psycopg:// URL, or pass a "
            f"connection: {RUN_SYNC}"
        )
    return asyncio.run(_connected_async(url, work))


async def _connected_async(url: URL, work: Callable[[Connection], T]) -> T:
    with _explained(url):
        connection = await create_async_engine(url, poolclass=NullPool).connect()
    try:
        return await connection.run_sync(work)
    finally:
        await connection.close()


def database_url(given: str | URL | None) -> URL:
    """Return the URL with a driver that is installed; ``postgres://`` and ``postgresql://`` leave the choice to us.

    Raises:
        MigrationError: It is no URL, names another database or driver, or the driver isn't installed.
    """
    if not given:
        raise MigrationError(f"no database given: {HOW_TO_SET}")
    try:
        url = make_url(given)
    except ArgumentError as exc:
        raise MigrationError(f"the database's URL can't be read: {HOW_TO_SET}") from exc
    backend, _, driver = url.drivername.partition("+")
    if backend not in {"postgres", "postgresql"} or driver not in {"", *DRIVERS}:
        raise MigrationError(
            f"saga-store needs PostgreSQL over {' or '.join(DRIVERS)}, not {url.drivername}: {HOW_TO_SET}"
        )
    installed = [name for name in DRIVERS if importlib.util.find_spec(name)]
    wanted = driver or next(iter(installed), DRIVERS[0])
    if wanted not in installed:
        raise MigrationError(f"the driver {wanted} isn't installed: pip install saga-store[{wanted}]")
    return url.set(drivername=f"postgresql+{wanted}")


@contextmanager
def _explained(url: URL) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        if pooled := pooler.explained(exc):
            raise pooled from exc
        reason = str(getattr(exc, "orig", None) or exc).strip()
        shown = url.render_as_string(hide_password=True)
        raise MigrationError(f"can't connect to {shown}: {reason}\nIs the server up, and DATABASE_URL right?") from exc


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
