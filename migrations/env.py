"""Run the migrations: where the URL comes from, and how to connect with either driver."""

import asyncio
import importlib.util
import logging.config
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store.sqlalchemy import Base

DRIVERS = ("psycopg", "asyncpg")
HOW_TO_SET = "set DATABASE_URL, such as postgresql+psycopg://user:password@host:5432/database"


def database_url() -> URL:
    """Return the URL from the caller's config or DATABASE_URL, with a driver that is installed."""
    given = context.config.attributes.get("url") or os.environ.get("DATABASE_URL")
    if not given:
        raise CommandError(f"no database given: {HOW_TO_SET}")
    try:
        url = make_url(given)
    except ArgumentError as exc:
        raise CommandError(f"the database's URL can't be read: {HOW_TO_SET}") from exc
    backend, _, driver = url.drivername.partition("+")
    if backend not in {"postgres", "postgresql"} or driver not in {"", *DRIVERS}:
        raise CommandError(
            f"saga-store needs PostgreSQL over {' or '.join(DRIVERS)}, not {url.drivername}: {HOW_TO_SET}"
        )
    installed = [name for name in DRIVERS if importlib.util.find_spec(name)]
    wanted = driver or next(iter(installed), DRIVERS[0])
    if wanted not in installed:
        raise CommandError(f"the driver {wanted} isn't installed: pip install saga-store[{wanted}]")
    return url.set(drivername=f"postgresql+{wanted}")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Look at no tables but ours: `alembic check` runs in databases that hold others."""
    return kind != "table" or name in Base.metadata.tables


def run(**where: Any) -> None:  # noqa: ANN401 - keywords of Alembic's, passed on
    context.configure(
        **where,
        target_metadata=Base.metadata,
        # A table of our own: ids and tables of a host application's history are not ours to touch.
        version_table="saga_store_version",
        include_name=include_name,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def migrate(connection: Connection) -> None:
    if connection.in_transaction():
        raise CommandError(
            "the connection is in a transaction already, so the migration would be committed by someone else or "
            "never: commit it or pass a fresh connection"
        )
    run(connection=connection)


@contextmanager
def explained(url: URL) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        reason = str(getattr(exc, "orig", None) or exc).strip()
        shown = url.render_as_string(hide_password=True)
        raise CommandError(f"can't connect to {shown}: {reason}\nIs the server up, and DATABASE_URL right?") from exc


async def migrate_async(url: URL) -> None:
    with explained(url):
        connection = await create_async_engine(url, poolclass=NullPool).connect()
    try:
        await connection.run_sync(migrate)
    finally:
        await connection.close()


def migrate_sync(url: URL) -> None:
    with explained(url):
        connection = create_engine(url, poolclass=NullPool).connect()
    with connection:
        migrate(connection)


def run_online() -> None:
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    url = database_url()
    if url.get_driver_name() != "asyncpg":
        migrate_sync(url)
    elif _loop_is_running():
        raise CommandError(
            "asyncpg can't be used here, inside a running event loop: use a postgresql+psycopg:// URL, or pass a "
            "connection: connection.run_sync(lambda c: (config.attributes.update(connection=c), upgrade(config)))"
        )
    else:
        asyncio.run(migrate_async(url))


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


if context.config.config_file_name and context.config.cmd_opts:
    # Only for the command line: an application that calls Alembic has logging of its own.
    logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    # Offline SQL needs no database, and so no URL.
    run(dialect_name="postgresql", literal_binds=True)
else:
    run_online()
