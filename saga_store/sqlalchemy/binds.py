"""Where a connection comes from: what each kind of bind means for the unit of work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol, TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from saga_store.sqlalchemy.tables import SagaExecutionModel

BindTarget: TypeAlias = AsyncEngine | async_sessionmaker[AsyncSession] | AsyncSession | AsyncConnection

_ROUTE = {"mapper": SagaExecutionModel}
_AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}


class Lent(NamedTuple):
    """A connection for one statement, and whether the statement is committed with it."""

    connection: AsyncConnection
    commits: bool


class Bind(Protocol):
    def connection(self) -> AbstractAsyncContextManager[Lent]: ...


class EngineBind:
    """A connection from the pool for each statement, in autocommit: no BEGIN and no COMMIT travel."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(**_AUTOCOMMIT)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Lent]:
        async with self._engine.connect() as connection:
            yield Lent(connection, commits=True)


class SessionmakerBind:
    """A session for each statement, so that its routing (``binds``, ``get_bind``) is honoured."""

    def __init__(self, maker: async_sessionmaker[AsyncSession]) -> None:
        self._maker = maker
        # A maker bound to a connection joins a transaction of someone's, where autocommit can't be had.
        self._options = {} if isinstance(maker.kw.get("bind"), AsyncConnection) else _AUTOCOMMIT

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Lent]:
        async with self._maker.begin() as session:
            connection = await session.connection(bind_arguments=_ROUTE, execution_options=self._options)
            yield Lent(connection, commits=True)


class JoinedBind:
    """The caller's own transaction, used by one statement at a time."""

    def __init__(self, joined: AsyncSession | AsyncConnection) -> None:
        self.joined = joined
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Lent]:
        async with self._one_at_a_time:
            joined = self.joined
            connection = (
                joined if isinstance(joined, AsyncConnection) else await joined.connection(bind_arguments=_ROUTE)
            )
            yield Lent(connection, commits=await _in_autocommit(connection))


async def _in_autocommit(connection: AsyncConnection) -> bool:
    raw = (await connection.get_raw_connection()).dbapi_connection
    return raw is not None and connection.dialect.detect_autocommit_setting(raw)


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
