"""Where the statements of a call go, and who commits: what each kind of bind means for the unit of work."""

import abc
import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Pool,
    PoolProxiedConnection,
    SingletonThreadPool,
    StaticPool,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from saga_store.errors import StorageUnavailableError
from saga_store.sqlalchemy.pooled import (
    Attempt,
    HeldConnection,
    commit_listeners_work,
    execute_on_pool,
    giving_back,
    is_closed,
    is_in_transaction,
    spawn,
)
from saga_store.sqlalchemy.pooler import approved, check_pooler
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import SagaExecutionModel
from saga_store.sqlalchemy.wire import DRIVERS, Parameters, Rows, fetching

BindTarget: TypeAlias = AsyncEngine | async_sessionmaker[AsyncSession] | AsyncSession | AsyncConnection

# What is read after a lock was obtained has to be younger than it, whatever the engine's or the role's default is.
_ISOLATION = "READ COMMITTED"

# What the ORM hands to get_bind() for a statement: the mapper, and the statement itself. An UPDATE stands for all that
# writes, since it is one to every way of asking whether a statement does.
_MAPPER = inspect(SagaExecutionModel)
_READS = select(SagaExecutionModel)
_WRITES = update(SagaExecutionModel)


class Transaction:
    """A transaction of an open connection, used by one statement at a time."""

    def __init__(self, connection: AsyncConnection, schema: str | None, attempt: Attempt) -> None:
        self._connection = connection
        self._attempt = attempt
        attempt.engine, attempt.schema = connection.engine, schema

    async def execute(self, statement: Statement, parameters: Parameters) -> Rows:
        """Run a statement on the driver's level; SQLAlchemy doesn't see it, but its transaction has begun."""
        connection = self._connection
        if not connection.in_transaction():
            await connection.begin()  # as SQLAlchemy does by itself before a statement; it sends nothing
        raw = await connection.get_raw_connection()
        adapted, driver = raw.dbapi_connection, raw.driver_connection
        was_sent = False
        try:
            async with _turn_on(adapted, connection.dialect.driver):
                was_sent = self._attempt.reached_connection = True
                await self._begin(adapted)
                spelling = statement.spelled(self._attempt.schema)
                return await fetching(connection.dialect.driver)(driver, spelling, parameters)
        except BaseException as exc:
            # SQLAlchemy didn't see it. What was cut short may be at anything.
            if was_sent and (not isinstance(exc, Exception) or is_closed(driver)):
                await spawn(_invalidate, _open(connection), raw, exc)
            raise

    async def _begin(self, adapted: Any) -> None:  # noqa: ANN401 - of either driver
        """Let the driver's connection begin the transaction, as SQLAlchemy's cursors do; psycopg's does by itself."""
        connection = self._connection
        if connection.dialect.driver == "asyncpg" and adapted._transaction is None:  # noqa: SLF001 - no public way
            await adapted._start_transaction()  # noqa: SLF001 - likewise
        pool = connection.sync_engine.pool
        if pool not in approved:
            await check_pooler(pool, adapted.driver_connection)


class Target(abc.ABC):
    """Where the statements of one call go: decided once, in the task and the context of its caller."""

    joins: bool
    """Whether they are part of a transaction that somebody else commits."""
    key: Hashable
    """Equal for those whose statements may be shared."""

    @abc.abstractmethod
    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows: ...

    @abc.abstractmethod
    def transaction(self, attempt: Attempt) -> AbstractAsyncContextManager["Transaction"]:
        """Give a transaction at READ COMMITTED, committed on leaving; or the caller's own."""

    def snapshot(self, attempt: Attempt) -> AbstractAsyncContextManager["Transaction"]:
        """Give a transaction that reads one moment, and can't write."""
        raise NotImplementedError

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Target"]:
        """Give a target for statements that follow each other closely; it may keep its connection meanwhile."""
        yield self


class PoolTarget(Target):
    """A connection from an engine's pool for each statement, in autocommit: no BEGIN and no COMMIT travel.

    Args:
        engine: Whose pool.
        schema: Where the tables are; None: along the connection's search path.
        neutral: Whether pool events run in a context of no caller's, since the statement is of several.
    """

    joins = False

    def __init__(self, engine: Engine, schema: str | None, *, neutral: bool = False) -> None:
        self.engine = engine
        self.schema = schema
        self.key: tuple[Pool, str | None] = (engine.pool, schema)
        self._neutral = neutral

    def neutral(self) -> "PoolTarget":
        return PoolTarget(self.engine, self.schema, neutral=True)

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        self._begin(attempt)
        spelling = statement.spelled(self.schema)
        return await execute_on_pool(self.engine, spelling, parameters, attempt, neutral=self._neutral)

    @asynccontextmanager
    async def transaction(self, attempt: Attempt) -> AsyncIterator[Transaction]:
        self._begin(attempt)
        async with self._connected(isolation_level=_ISOLATION) as connection, connection.begin():
            yield Transaction(connection, self.schema, attempt)

    @asynccontextmanager
    async def snapshot(self, attempt: Attempt) -> AsyncIterator[Transaction]:
        self._begin(attempt)
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        async with self._connected(**options) as connection, connection.begin():
            yield Transaction(connection, self.schema, attempt)

    @asynccontextmanager
    async def _connected(self, **options: Any) -> AsyncIterator[AsyncConnection]:  # noqa: ANN401 - SQLAlchemy's
        connection = await AsyncEngine(self.engine).connect()
        pooled = None
        try:
            pooled = await connection.get_raw_connection()
            if is_in_transaction(pooled.driver_connection):
                # Setting an isolation level would roll it back.
                await spawn(commit_listeners_work, pooled.dbapi_connection)
            await connection.execution_options(**options)
            yield connection
        finally:
            # As SQLAlchemy does, in a task of its own, which isn't cancelled along with this one.
            await asyncio.shield(asyncio.create_task(spawn(_close, _open(connection), pooled)))

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[Target]:
        held = HeldConnection(self.engine, neutral=self._neutral)
        try:
            yield _HeldTarget(self, held)
        finally:
            await held.give_back()

    def _begin(self, attempt: Attempt) -> None:
        attempt.engine, attempt.schema = AsyncEngine(self.engine), self.schema


def _invalidate(connection: Connection, pooled: PoolProxiedConnection, exc: BaseException) -> None:
    with giving_back(pooled):
        connection.invalidate(exc)


def _close(connection: Connection, pooled: PoolProxiedConnection | None) -> None:
    with nullcontext() if pooled is None else giving_back(pooled):
        connection.close()


class _HeldTarget(PoolTarget):
    def __init__(self, target: PoolTarget, held: HeldConnection) -> None:
        super().__init__(target.engine, target.schema)
        self._held = held

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        self._begin(attempt)
        return await self._held.execute(statement.spelled(self.schema), parameters, attempt)


class JoinedTarget(Target):
    """The caller's own transaction, used by one statement at a time."""

    joins = True

    def __init__(self, joined: AsyncSession | AsyncConnection, schema: str | None, *, writes: bool) -> None:
        self.key: Hashable = joined
        self._joined = joined
        self._schema = schema
        self._writes = writes

    async def execute(self, statement: Statement, parameters: Parameters, attempt: Attempt) -> Rows:
        async with self.transaction(attempt) as transaction:
            return await transaction.execute(statement, parameters)

    @asynccontextmanager
    async def transaction(self, attempt: Attempt) -> AsyncIterator[Transaction]:
        attempt.joins = True
        async with _connection_of(self._joined, writes=self._writes) as connection:
            attempt.commits = await in_autocommit(connection)
            schema = _translated(self._schema, _open(connection).get_execution_options())
            yield Transaction(connection, schema, attempt)


class Bind(abc.ABC):
    """What a storage was given; it decides where each call goes."""

    @abc.abstractmethod
    def target(self, *, writes: bool) -> Target:
        """Decide for one call, in its caller's context; no I/O.

        Raises:
            StorageUnavailableError: SQLAlchemy finds nowhere to go.
            TypeError: What it finds can't be used.
        """

    @property
    def url(self) -> URL | None:
        """Where its database is, as far as that is known before it is used."""
        return None

    @property
    def database(self) -> str | None:
        """What its database is called, as far as that is known before it is used."""
        return None if self.url is None else self.url.database


class EngineBind(Bind):
    def __init__(self, engine: AsyncEngine, schema: str | None) -> None:
        self._engine = engine.sync_engine
        self._schema = schema
        self._target = self._new_target()

    @property
    def url(self) -> URL:
        return self._engine.url

    def target(self, *, writes: bool) -> Target:  # noqa: ARG002 - an engine is one place
        # Disposing of an engine gives it another pool, and its options may be changed.
        if self._target.key != (self._engine.pool, _translated(self._schema, self._engine.get_execution_options())):
            self._target = self._new_target()
        return self._target

    def _new_target(self) -> PoolTarget:
        return _pool_target(self._engine, _translated(self._schema, self._engine.get_execution_options()))


class SessionmakerBind(Bind):
    """Where a session of the maker's would send the statement: by its ``get_bind``, as the ORM calls it."""

    def __init__(self, maker: async_sessionmaker[AsyncSession], schema: str | None) -> None:
        self._maker = maker
        self._schema = schema

    @property
    def url(self) -> URL | None:
        bound_to = self._maker.kw.get("bind")
        return bound_to.url if isinstance(bound_to, AsyncEngine) else None

    def target(self, *, writes: bool) -> Target:
        session = self._maker().sync_session
        try:
            bind = session.get_bind(**_bind_arguments(writes=writes))
        except SQLAlchemyError as exc:
            raise StorageUnavailableError(
                f"the sessionmaker leads nowhere: {exc}; bind it by async_sessionmaker(engine)"
            ) from exc
        # Sessions have options of their own since SQLAlchemy 2.1.
        schema = _translated(self._schema, bind.get_execution_options(), getattr(session, "execution_options", {}))
        if isinstance(bind, Engine):
            return _pool_target(bind, schema)
        if isinstance(bind, Connection):
            return JoinedTarget(AsyncConnection(AsyncEngine(bind.engine), bind), schema, writes=writes)
        raise TypeError(
            f"the session's get_bind() returned {type(bind).__name__}, and has to return an Engine or a Connection, as "
            "for SQLAlchemy's own statements: of an AsyncEngine return its sync_engine"
        )


class JoinedBind(Bind):
    def __init__(self, joined: AsyncSession | AsyncConnection, schema: str | None) -> None:
        self.joined = joined
        self._reads = JoinedTarget(joined, schema, writes=False)
        self._writes = JoinedTarget(joined, schema, writes=True)

    @property
    def url(self) -> URL | None:
        bound_to = self.joined.bind if isinstance(self.joined, AsyncSession) else self.joined
        return bound_to.engine.url if isinstance(bound_to, AsyncConnection | AsyncEngine) else None

    def target(self, *, writes: bool) -> Target:
        return self._writes if writes else self._reads

    def connected(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Give the connection that the transaction is on, or will be."""
        return _connection_of(self.joined, writes=True)


def make_bind(bind: BindTarget, schema: str | None) -> Bind:
    if isinstance(bind, AsyncEngine):
        return EngineBind(bind, schema)
    if isinstance(bind, async_sessionmaker):
        return SessionmakerBind(bind, schema)
    if isinstance(bind, AsyncSession | AsyncConnection):
        return JoinedBind(bind, schema)
    raise TypeError(
        f"SqlAlchemySagaStorage takes an AsyncEngine, async_sessionmaker, AsyncSession or AsyncConnection, not "
        f"{type(bind).__name__}; {_other_bind(bind)}"
    )


def _other_bind(bind: object) -> str:
    if isinstance(bind, type):
        return "make an object of that class"
    if isinstance(bind, Session):
        return "use AsyncSession, on an engine that create_async_engine() makes"
    if isinstance(bind, sessionmaker):
        return "use async_sessionmaker, on an engine that create_async_engine() makes"
    if isinstance(bind, async_scoped_session):
        return "call it, for the session of this scope"
    if isinstance(bind, AbstractAsyncContextManager):
        return "enter it with `async with`, and give what that yields"
    return "make an engine with sqlalchemy.ext.asyncio.create_async_engine()"


_turns: "WeakKeyDictionary[Session, asyncio.Lock]" = WeakKeyDictionary()


def _turn_of(session: Session) -> asyncio.Lock:
    """Return the lock by which all storages on this session take turns."""
    turn = _turns.get(session)
    if turn is None:
        turn = _turns[session] = asyncio.Lock()
    return turn


def _open(connection: AsyncConnection) -> Connection:
    """Return SQLAlchemy's own connection, or have it say that this one hasn't been opened."""
    return connection.sync_connection or connection._raise_for_not_started()  # noqa: SLF001 - SQLAlchemy's own words


@asynccontextmanager
async def _connection_of(joined: AsyncSession | AsyncConnection, *, writes: bool) -> AsyncIterator[AsyncConnection]:
    if isinstance(joined, AsyncConnection):
        _check_driver(joined.dialect.name, joined.dialect.driver)
        yield joined
        return
    async with _turn_of(joined.sync_session):
        connection = await joined.connection(bind_arguments=_bind_arguments(writes=writes))
        _check_driver(connection.dialect.name, connection.dialect.driver)
        yield connection


def _turn_on(adapted: Any, driver: str) -> AbstractAsyncContextManager[object]:  # noqa: ANN401 - of either driver
    """Return the lock that SQLAlchemy's own statements take on this connection; psycopg's have one of their own."""
    if driver != "asyncpg":
        return nullcontext()
    turn: AbstractAsyncContextManager[object] = adapted._execute_mutex  # noqa: SLF001 - there is no public way to it
    return turn


async def in_autocommit(connection: AsyncConnection) -> bool:
    raw = (await connection.get_raw_connection()).dbapi_connection
    return raw is not None and connection.dialect.detect_autocommit_setting(raw)


def _bind_arguments(*, writes: bool) -> dict[str, Any]:
    return {"mapper": _MAPPER, "clause": _WRITES if writes else _READS}


def _translated(schema: str | None, *options: Mapping[str, Any]) -> str | None:
    """Return the schema that SQLAlchemy's ``schema_translate_map`` makes of this one."""
    maps = [given["schema_translate_map"] for given in options if given.get("schema_translate_map")]
    translated: str | None = maps[-1].get(schema, schema) if maps else schema
    return translated


def _pool_target(engine: Engine, schema: str | None) -> PoolTarget:
    _check_driver(engine.dialect.name, engine.dialect.driver)
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        raise TypeError(
            f"SqlAlchemySagaStorage commits by itself, and {type(engine.pool).__name__} gives everybody the same "
            "connection, in the middle of whose transaction that might be; use another pool, such as "
            "AsyncAdaptedQueuePool with pool_size=1, or bind the storage to the connection"
        )
    return PoolTarget(engine, schema)


def _check_driver(name: str, driver: str) -> None:
    if name != "postgresql" or driver not in DRIVERS:
        raise TypeError(
            f"SqlAlchemySagaStorage needs PostgreSQL over asyncpg or psycopg, not {name}+{driver}; "
            "begin the engine's URL with postgresql+asyncpg:// or postgresql+psycopg://"
        )
