"""Where a statement runs: what each kind of bind means for the unit of work."""

import abc
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import Engine, Pool, PoolProxiedConnection, QueuePool
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


class Bind(abc.ABC):
    @abc.abstractmethod
    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows: ...

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Bind"]:
        """Give a bind for statements that follow each other closely; it may keep its connection meanwhile."""
        yield self


class EngineBind(Bind):
    """A connection from the pool for each statement, in autocommit: no BEGIN and no COMMIT travel."""

    def __init__(self, engine: AsyncEngine) -> None:
        _check_driver(engine.dialect.name, engine.dialect.driver)
        self._engine = engine

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.engine = self._engine
        return await greenlet_spawn(_execute_on_pool, self._engine.sync_engine, statement, parameters, attempt)

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[Bind]:
        held = _HeldBind(self._engine)
        try:
            yield held
        finally:
            await held.give_back()


class _HeldBind(Bind):
    """A connection that isn't given back between two statements, as long as the pool has others.

    Taking it and giving it back costs the client as much as the statement itself.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._fetch = _FETCH[engine.dialect.driver]
        self._taken: _Taken | None = None
        self._statements = 0

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.engine = self._engine
        if self._taken is None or not self._taken.is_quiet():
            await self.give_back()
            self._taken = await greenlet_spawn(_Taken, self._engine.sync_engine)
            self._statements = 0
        attempt.reached_connection = True
        try:
            rows = await self._fetch(self._taken.driver, statement, parameters)
        except BaseException as exc:
            await self.give_back(exc)
            raise
        self._statements += 1
        if self._statements >= _MOST_STATEMENTS_HELD or not _has_others(self._engine.sync_engine.pool):
            await self.give_back()
        return rows

    async def give_back(self, exc: BaseException | None = None) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            await greenlet_spawn(taken.give_back, exc)


class SessionmakerBind(Bind):
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


class JoinedBind(Bind):
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


# Then the pool sees it again, lest its own rules, such as when to replace it, be put off for ever.
_MOST_STATEMENTS_HELD = 100


class _Taken:
    """A connection of the pool's, in autocommit until it is given back.

    It is used on the driver's level: what SQLAlchemy would add costs more than the driver. To be made and given back
    in a greenlet of SQLAlchemy's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._pool = engine, engine.pool
        self._pooled = _live_connection(engine)
        connection: Any = self._pooled.dbapi_connection
        self.driver: Any = self._pooled.driver_connection
        self.run_async: Callable[..., Any] = connection.run_async
        self._connection = connection
        self._autocommit_before = connection.autocommit
        try:
            connection.autocommit = True
            if self._pool not in approved:
                connection.run_async(partial(check_pooler, self._pool))
        except BaseException as exc:
            self.give_back(exc)
            raise

    def is_quiet(self) -> bool:
        """Whether the server has neither said anything nor hung up since the last statement."""
        liveness: Liveness = self._pooled.info[_LIVENESS]
        return liveness.is_quiet()

    def give_back(self, exc: BaseException | None = None) -> None:
        """Return it to the pool; ``exc`` is what its last statement raised."""
        try:
            if (exc is not None and not isinstance(exc, Exception)) or self._engine.pool is not self._pool:
                # Nobody knows what it is at; or the engine was disposed of, and nobody would close it later.
                self._pooled.invalidate(exc)
            elif exc is not None and (is_lost(exc) or sqlstate(exc) == READ_ONLY):
                # As SQLAlchemy does: the others are as old, and lead to the server that went away or was demoted.
                self._pool._invalidate(self._pooled, exc)  # noqa: SLF001 - there is no public way to it
            else:
                self._connection.autocommit = self._autocommit_before
        except Exception as failure:  # noqa: BLE001 - whatever it is, the statement has had its answer
            self._pooled.invalidate(failure)
        finally:
            self._pooled.close()


def _execute_on_pool(engine: Engine, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
    taken = _Taken(engine)
    attempt.reached_connection = True
    fetch = _FETCH[engine.dialect.driver]
    try:
        rows: Rows = taken.run_async(lambda driver: fetch(driver, statement, parameters))
    except BaseException as exc:
        taken.give_back(exc)
        raise
    taken.give_back()
    return rows


def _live_connection(engine: Engine) -> PoolProxiedConnection:
    """Take a connection from the pool, after throwing away those that have died there."""
    for _ in range(_MOST_STALE):
        pooled = engine.raw_connection()
        liveness = pooled.info.get(_LIVENESS)
        if liveness is None:
            liveness = pooled.info[_LIVENESS] = Liveness(pooled.driver_connection)
        if liveness.is_quiet():
            break
        pooled.invalidate()
        pooled.close()
    else:
        pooled = engine.raw_connection()
        pooled.info[_LIVENESS] = Liveness(pooled.driver_connection)
    return pooled


def _has_others(pool: Pool) -> bool:
    """Whether somebody else who wants a connection gets one without waiting."""
    return isinstance(pool, QueuePool) and pool.checkedout() < pool.size()
