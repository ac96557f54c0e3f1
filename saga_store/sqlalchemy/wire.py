"""A statement as each driver executes it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from saga_store.sqlalchemy.statement import Statement

Parameters: TypeAlias = Mapping[str, object]
Rows: TypeAlias = Sequence[Sequence[Any]]


async def _fetch_asyncpg(driver: Any, statement: Statement, parameters: Parameters) -> Rows:  # noqa: ANN401 - no types
    rows: Rows = await driver.fetch(statement.numbered, *[parameters[name] for name in statement.names])
    return rows


async def _fetch_psycopg(driver: Any, statement: Statement, parameters: Parameters) -> Rows:  # noqa: ANN401 - no types
    cursor = await driver.execute(statement.named, parameters)
    rows: Rows = await cursor.fetchall()
    return rows


FETCH: dict[str, Callable[[Any, Statement, Parameters], Awaitable[Rows]]] = {
    "asyncpg": _fetch_asyncpg,
    "psycopg": _fetch_psycopg,
}
"""What executes a statement on a driver's own connection, by the driver's name."""
