"""Where a statement runs: what each kind of bind means for the unit of work."""

import abc
import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from saga_store.sqlalchemy.pooled import Attempt, HeldConnection, execute_on_pool
from saga_store.sqlalchemy.pooler import approved, check_pooler
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import SagaExecutionModel
from saga_store.sqlalchemy.wire import FETCH, Parameters, Rows

BindTarget: TypeAlias = AsyncEngine | async_sessionmaker[AsyncSession] | AsyncSession | AsyncConnection

# What is read after a lock was obtained has to be younger than it, whatever the engine's or the role's default is.
_ISOLATION = "READ COMMITTED"


class Bind(abc.ABC):
    @abc.abstractmethod
    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows: ...

    @abc.abstractmethod
    def transaction(self, attempt: Attempt) -> AbstractAsyncContextManager[AsyncConnection]:
        """Give a connection in a transaction at READ COMMITTED, committed on leaving; or in the caller's own."""

    @property
    def database(self) -> str | None:
        """What its database is called, as far as that is known before it is used."""
        return None

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Bind"]:
        """Give a bind for statements that follow each other closely; it may keep its connection meanwhile."""
        yield self


class EngineBind(Bind):
    """A connection from the pool for each statement, in autocommit: no BEGIN and no COMMIT travel."""

    def __init__(self, engine: AsyncEngine) -> None:
        _check_driver(engine.dialect.name, engine.dialect.driver)
        self._engine = engine

    @property
    def database(self) -> str | None:
        return self._engine.url.database

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.engine = self._engine
        return await execute_on_pool(self._engine.sync_engine, statement, parameters, attempt)

    @asynccontextmanager
    async def transaction(self, attempt: Attempt) -> AsyncIterator[AsyncConnection]:
        attempt.engine = self._engine
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level=_ISOLATION)
            async with connection.begin():
                await _check_pooler(connection)
                attempt.reached_connection = True
                yield connection

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[Bind]:
        held = HeldConnection(self._engine.sync_engine)
        try:
            yield _HeldBind(self._engine, held)
        finally:
            await held.give_back()


class _HeldBind(Bind):
    def __init__(self, engine: AsyncEngine, held: HeldConnection) -> None:
        self._engine = engine
        self._held = held

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        attempt.engine = self._engine
        return await self._held.execute(statement, parameters, attempt)

    def transaction(self, attempt: Attempt) -> AbstractAsyncContextManager[AsyncConnection]:
        return EngineBind(self._engine).transaction(attempt)


class SessionmakerBind(Bind):
    """As an engine, the one that a session of the maker's is routed to (``binds``, ``get_bind``)."""

    def __init__(self, maker: async_sessionmaker[AsyncSession]) -> None:
        self._maker = maker

    @property
    def database(self) -> str | None:
        bound_to = self._maker.kw.get("bind")
        return bound_to.url.database if isinstance(bound_to, AsyncEngine) else None

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        async with self._maker() as session:
            routed = session.get_bind(SagaExecutionModel)
            if isinstance(routed, Engine):
                _check_driver(routed.dialect.name, routed.dialect.driver)
                attempt.engine = AsyncEngine(routed)
                return await execute_on_pool(routed, statement, parameters, attempt)
            # A maker bound to a connection joins a transaction of someone's, where autocommit can't be had.
            attempt.joins = True
            async with session.begin():
                connection = await session.connection(bind_arguments={"mapper": SagaExecutionModel})
                await _check_pooler(connection)
                attempt.engine, attempt.reached_connection = connection.engine, True
                return (await connection.execute(statement.text, parameters)).all()

    @asynccontextmanager
    async def transaction(self, attempt: Attempt) -> AsyncIterator[AsyncConnection]:
        async with self._maker() as session, session.begin():
            routed = session.get_bind(SagaExecutionModel)
            attempt.joins = not isinstance(routed, Engine)
            connection = await session.connection(
                bind_arguments={"mapper": SagaExecutionModel},
                execution_options={} if attempt.joins else {"isolation_level": _ISOLATION},
            )
            _check_driver(connection.dialect.name, connection.dialect.driver)
            await _check_pooler(connection)
            attempt.engine, attempt.reached_connection = connection.engine, True
            yield connection


class JoinedBind(Bind):
    """The caller's own transaction, used by one statement at a time."""

    def __init__(self, joined: AsyncSession | AsyncConnection) -> None:
        self.joined = joined
        self._one_at_a_time = asyncio.Lock()

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        async with self.transaction(attempt) as connection:
            return (await connection.execute(statement.text, parameters)).all()

    @asynccontextmanager
    async def transaction(self, attempt: Attempt) -> AsyncIterator[AsyncConnection]:
        attempt.joins = True
        async with self._one_at_a_time:
            connection = await self.connect()
            attempt.commits = await in_autocommit(connection)
            await _check_pooler(connection)
            attempt.engine, attempt.reached_connection = connection.engine, True
            yield connection

    async def connect(self) -> AsyncConnection:
        """Return the connection that the transaction is on, or will be."""
        joined = self.joined
        connection = (
            joined
            if isinstance(joined, AsyncConnection)
            else await joined.connection(bind_arguments={"mapper": SagaExecutionModel})
        )
        _check_driver(connection.dialect.name, connection.dialect.driver)
        return connection


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


async def in_autocommit(connection: AsyncConnection) -> bool:
    raw = (await connection.get_raw_connection()).dbapi_connection
    return raw is not None and connection.dialect.detect_autocommit_setting(raw)


def _check_driver(name: str, driver: str) -> None:
    if name != "postgresql" or driver not in FETCH:
        raise TypeError(
            f"SqlAlchemySagaStorage needs PostgreSQL over asyncpg or psycopg, not {name}+{driver}; "
            "begin the engine's URL with postgresql+asyncpg:// or postgresql+psycopg://"
        )
