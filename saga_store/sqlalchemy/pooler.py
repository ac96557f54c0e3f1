"""Poolers that share the server's connections among clients, such as PgBouncer in transaction mode.

A prepared statement lives on one connection of the server's. Behind such a pooler the next statement may find itself
on another one: where the prepared statement isn't known, or where its name stands for somebody else's. The latter is
executed without complaint, so an engine that keeps prepared statements is refused before it is used.
"""

from typing import Any
from uuid import uuid4
from weakref import WeakSet

from sqlalchemy import Pool

from saga_store.errors import StorageUnavailableError
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import fetching, read_text

ADVICE = (
    "a pooler such as PgBouncer in transaction mode shares the server's connections, and would mix up the prepared "
    "statements that this engine keeps; keep none: create_async_engine(url, connect_args={'statement_cache_size': 0, "
    "'prepared_statement_cache_size': 0}) with asyncpg, connect_args={'prepare_threshold': None} with psycopg"
)

# What the drivers call the statements that they prepare; a pooler that keeps track of them gives them other names.
_NAMES_OF_DRIVERS = ("__asyncpg_", "_pg3_")

approved: WeakSet[Pool] = WeakSet()
"""The pools whose connections have been looked at: it is done once for each."""


async def check_pooler(pool: Pool, driver: Any) -> None:  # noqa: ANN401 - asyncpg has no types
    """Approve of a pool by one of its connections, the driver's own.

    Raises:
        StorageUnavailableError: Its prepared statements would be mixed up; or, in session mode, would be as soon as the
            pooler's mode is changed, which can't be told from here.
    """
    is_pooled = _is_pooled_asyncpg if hasattr(driver, "get_server_pid") else _is_pooled_psycopg
    if await is_pooled(driver):
        raise StorageUnavailableError(ADVICE)
    approved.add(pool)


def told_pid(driver: Any) -> int:  # noqa: ANN401 - asyncpg has no types
    """Return the process id that the driver was told: the server's own, unless a pooler made it up."""
    return int(driver.get_server_pid() if hasattr(driver, "get_server_pid") else driver.info.backend_pid)


async def _is_pooled_asyncpg(driver: Any) -> bool:  # noqa: ANN401 - asyncpg has no types
    if await _first("asyncpg", driver, _BACKEND_PID) == told_pid(driver):
        return False
    name = await _first("asyncpg", driver, _own_name())
    return name is not None and read_text(name).startswith(_NAMES_OF_DRIVERS)


async def _is_pooled_psycopg(driver: Any) -> bool:  # noqa: ANN401 - as above
    if driver.prepare_threshold is None or await _first("psycopg", driver, _BACKEND_PID) == told_pid(driver):
        return False
    name = await _first("psycopg", driver, _own_name(), prepare=True)
    return name is not None and read_text(name).startswith(_NAMES_OF_DRIVERS)


async def _first(name: str, driver: Any, sql: str, *, prepare: bool = False) -> Any:  # noqa: ANN401 - as above
    rows = await fetching(name)(driver, Statement(sql).spelled(None), {}, prepare=prepare)
    return rows[0][0] if rows else None


_BACKEND_PID = "SELECT CAST(pg_backend_pid() AS bigint)"


def _own_name() -> str:
    """Return a query for the name under which the server knows that very query; no row if it has none."""
    return f"SELECT convert_to(name, 'UTF8') FROM pg_prepared_statements WHERE statement LIKE '%{uuid4().hex}%'"  # noqa: S608 - hexadecimal
