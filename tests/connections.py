"""Engines, ports and waits that several test modules share."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import QueuePool

from tests.databases import Database


@asynccontextmanager
async def engine_on(
    url: URL | str,
    **options: Any,  # noqa: ANN401 - whatever create_async_engine takes
) -> AsyncIterator[AsyncEngine]:
    """An engine on any URL, such as a proxy's; asserts that every connection was given back."""
    engine = create_async_engine(url, **options)
    try:
        yield engine
        await until_returned(engine)
    finally:
        await engine.dispose()


def free_port() -> int:
    """Return a port of this machine's that nobody uses; somebody may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def lock_table(holder: AsyncSession) -> None:
    """Let writers wait in the server: for a row alone no storage that commits by itself does."""
    await holder.execute(text("LOCK TABLE saga_executions IN EXCLUSIVE MODE"))


async def until_blocked(database: Database) -> None:
    """Wait until a statement in this database waits for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(database.url(), autocommit=True) as admin:
        async with asyncio.timeout(30):
            while admin.execute(query).fetchone() == (0,):
                await _one_turn()


async def until_returned(engine: AsyncEngine) -> None:
    """Wait until the pool has all its connections back, which a batch may be using after its callers have gone."""
    assert isinstance(engine.pool, QueuePool)
    async with asyncio.timeout(30):
        while engine.pool.checkedout():
            await _one_turn()


async def _one_turn() -> None:
    await asyncio.sleep(0)
