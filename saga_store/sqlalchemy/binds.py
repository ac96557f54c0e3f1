"""Where a statement runs: what each kind of bind means for the unit of work."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.util import greenlet_spawn

from saga_store.sqlalchemy.failures import READ_ONLY, is_lost, sqlstate
from saga_store.sqlalchemy.liveness import Liveness
from saga_store.sqlalchemy.pooler import approved, check_pooler
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import SagaExecutionModel

BindTarget: TypeAlias = AsyncEngine | async_sessionmaker[AsyncSession] | AsyncSession | AsyncConnection
Parameters: TypeAlias = Mapping[str, object]
Rows: TypeAlias = Sequence[Sequence[Any]]


@dataclass(slots=True)
class Attempt:
    """How far a statement got: what an error means depends on it."""

    engine: AsyncEngine | None = None
    reached_connection: bool = False
    commits: bool = True
    joins: bool = False


class Bind(Protocol):
    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows: ...


class EngineBind:
    """A connection from the pool for each statement, in autocommit: no BEGIN and no COMMIT travel."""

    def __init__(self, engine: AsyncEngine) -> None:
        _check_driver(engine.dialect.name, engine.dialect.driver)
        self._engine = engine

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.engine = self._engine
        return await greenlet_spawn(_execute_on_pool, self._engine.sync_engine, statement, parameters, attempt)


class SessionmakerBind:
    """As an engine, the one that a session of the maker's is routed to (``binds``, ``get_bind``)."""

    def __init__(self, maker: async_sessionmaker[AsyncSession]) -> None:
        self._maker = maker

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        async with self._maker() as session:
            routed = session.get_bind(SagaExecutionModel)
            if isinstance(routed, Engine):
                _check_driver(routed.dialect.name, routed.dialect.driver)
                attempt.engine = AsyncEngine(routed)
                return await greenlet_spawn(_execute_on_pool, routed, statement, parameters, attempt)
            # A maker bound to a connection joins a transaction of someone's, where autocommit can't be had.
            attempt.joins = True
            async with session.begin():
                connection = await session.connection(bind_arguments={"mapper": SagaExecutionModel})
                await _check_pooler(connection)
                attempt.engine, attempt.reached_connection = connection.engine, True
                return (await connection.execute(statement.text, parameters)).all()


class JoinedBind:
    """The caller's own transaction, used by one statement at a time."""

    def __init__(self, joined: AsyncSession | AsyncConnection) -> None:
        self.joined = joined
        self._one_at_a_time = asyncio.Lock()

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.joins = True
        async with self._one_at_a_time:
            joined = self.joined
            connection = (
                joined
                if isinstance(joined, AsyncConnection)
                else await joined.connection(bind_arguments={"mapper": SagaExecutionModel})
            )
            _check_driver(connection.dialect.name, connection.dialect.driver)
            attempt.commits = await _in_autocommit(connection)
            await _check_pooler(connection)
            attempt.engine, attempt.reached_connection = connection.engine, True
            return (await connection.execute(statement.text, parameters)).all()


def make_bind(target: BindTarget) -> Bind:
    if isinstance(target, AsyncEngine):
        return EngineBind(target)
    if isinstance(target, async_sessionmaker):
        return SessionmakerBind(target)
    if isinstance(target, AsyncSession | AsyncConnection):
        return JoinedBind(target)
    raise TypeError(
        f"SqlAlchemySagaStorage takes an AsyncEngine, async_sessionmaker, AsyncSession or AsyncConnection, not "
        f"{type(target).__name__}; make an engine with sqlalchemy.ext.asyncio.create_async_engine()"
    )


async def _check_pooler(connection: AsyncConnection) -> None:
    pool = connection.sync_engine.pool
    if pool not in approved:
        await check_pooler(pool, (await connection.get_raw_connection()).driver_connection)


async def _in_autocommit(connection: AsyncConnection) -> bool:
    raw = (await connection.get_raw_connection()).dbapi_connection
    return raw is not None and connection.dialect.detect_autocommit_setting(raw)


async def _fetch_asyncpg(driver: Any, statement: Statement, parameters: Parameters) -> Rows:  # noqa: ANN401 - no types
    rows: Rows = await driver.fetch(statement.numbered, *[parameters[name] for name in statement.names])
    return rows


async def _fetch_psycopg(driver: Any, statement: Statement, parameters: Parameters) -> Rows:  # noqa: ANN401 - no types
    cursor = await driver.execute(statement.named, parameters)
    rows: Rows = await cursor.fetchall()
    return rows


_FETCH: dict[str, Callable[[Any, Statement, Parameters], Awaitable[Rows]]] = {
    "asyncpg": _fetch_asyncpg,
    "psycopg": _fetch_psycopg,
}


def _check_driver(name: str, driver: str) -> None:
    if name != "postgresql" or driver not in _FETCH:
        raise TypeError(
            f"SqlAlchemySagaStorage needs PostgreSQL over asyncpg or psycopg, not {name}+{driver}; "
            "begin the engine's URL with postgresql+asyncpg:// or postgresql+psycopg://"
        )


# Where a connection's Liveness is kept: a place that lasts as long as the connection.
_LIVENESS = "saga_store.liveness"
# More than a pool holds: whoever talks as soon as it is connected is taken as it is.
_MOST_STALE = 100


def _live_connection(engine: Engine) -> PoolProxiedConnection:
    """Take a connection from the pool, after throwing away those that have died there."""
    for _ in range(_MOST_STALE):
        pooled = engine.raw_connection()
        liveness = pooled.info.get(_LIVENESS)
        if liveness is None:
            liveness = pooled.info[_LIVENESS] = Liveness(pooled.driver_connection)
        if liveness.is_quiet():
            return pooled
        pooled.invalidate()
        pooled.close()
    return engine.raw_connection()


def _execute_on_pool(engine: Engine, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
    """Run the statement on the driver's own connection: what SQLAlchemy would add costs more than the driver."""
    fetch = _FETCH[engine.dialect.driver]
    pooled = _live_connection(engine)
    connection: Any = pooled.dbapi_connection
    before = connection.autocommit
    try:
        connection.autocommit = True
        if engine.pool not in approved:
            connection.run_async(partial(check_pooler, engine.pool))
        attempt.reached_connection = True
        rows: Rows = connection.run_async(lambda driver: fetch(driver, statement, parameters))
        connection.autocommit = before
    except BaseException as exc:
        if not isinstance(exc, Exception):
            pooled.invalidate(exc)
        elif is_lost(exc) or sqlstate(exc) == READ_ONLY:
            # As SQLAlchemy does: the others are as old, and lead to the server that went away or was demoted.
            engine.pool._invalidate(pooled, exc)  # noqa: SLF001 - there is no public way to it
        else:
            connection.autocommit = before
        raise
    else:
        return rows
    finally:
        pooled.close()
