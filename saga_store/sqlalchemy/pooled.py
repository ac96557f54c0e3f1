"""Connections of an engine's pool: one for a moment, and one that is held from one statement to the next.

Both are used on the driver's level, in autocommit: what SQLAlchemy would add costs more than the driver.
"""

import asyncio
import logging
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from saga_store.sqlalchemy.failures import ails_all_connections, ails_connection
from saga_store.sqlalchemy.pooler import approved, check_pooler
from saga_store.sqlalchemy.statement import Spelling
from saga_store.sqlalchemy.wire import Parameters, Rows, fetching

T = TypeVar("T")

_logger = logging.getLogger("saga_store")

# Where a connection's Liveness is kept: a place that lasts as long as the connection.
_LIVENESS = "saga_store.liveness"
# More than a pool holds: whoever talks as soon as it is connected is taken as it is.
_MOST_STALE = 100
# Then the pool sees it again: its own rules, such as when to replace it, mustn't be put off for ever.
_MOST_STATEMENTS_HELD = 100


@dataclass(slots=True)
class Attempt:
    """How far a statement got: what an error means depends on it."""

    engine: AsyncEngine | None = None
    schema: str | None = None
    reached_connection: bool = False
    commits: bool = True
    joins: bool = False


async def execute_on_pool(
    engine: Engine, spelling: Spelling, parameters: Parameters, attempt: Attempt, *, neutral: bool
) -> Rows:
    """Run a statement on a connection that is taken for it, and given back.

    If ``neutral``, the pool's events see no caller's context.
    """
    return await spawn(_execute, engine, spelling, parameters, attempt, neutral=neutral)


async def spawn(work: Callable[..., T], *arguments: object, neutral: bool = False) -> T:
    """Run in a greenlet of SQLAlchemy's, as its pools have to be."""
    if neutral:
        return await greenlet_spawn(Context().run, work, *arguments)
    return await greenlet_spawn(work, *arguments)


def _execute(engine: Engine, spelling: Spelling, parameters: Parameters, attempt: Attempt) -> Rows:
    taken = _Taken(engine)
    attempt.reached_connection = True
    fetch = fetching(engine.dialect.driver)
    try:
        rows: Rows = taken.run_async(lambda driver: fetch(driver, spelling, parameters))
    except BaseException as exc:
        taken.give_back(exc)
        raise
    taken.give_back()
    return rows


class HeldConnection:
    """A connection that isn't given back between two statements, as long as the pool has others.

    Taking it and giving it back costs the client as much as the statement itself.
    """

    def __init__(self, engine: Engine, *, neutral: bool) -> None:
        self._engine = engine
        self._neutral = neutral
        self._fetch = fetching(engine.dialect.driver)
        self._taken: _Taken | None = None
        self._statements = 0

    async def execute(self, spelling: Spelling, parameters: Parameters, attempt: Attempt) -> Rows:
        if self._taken is None or not self._taken.is_usable():
            await self.give_back()
            self._taken = await spawn(_Taken, self._engine, neutral=self._neutral)
            self._statements = 0
        attempt.reached_connection = True
        try:
            rows = await self._fetch(self._taken.driver, spelling, parameters)
        except BaseException as exc:
            await self.give_back(exc)
            raise
        self._statements += 1
        if self._statements >= _MOST_STATEMENTS_HELD or not _has_others(self._engine.pool):
            await self.give_back()
        return rows

    async def give_back(self, exc: BaseException | None = None) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            await spawn(taken.give_back, exc, neutral=self._neutral)


class _Taken:
    """A connection of the pool's, in autocommit until it is given back.

    To be made and given back in a greenlet of SQLAlchemy's.
    """

    def __init__(self, engine: Engine) -> None:
        _leave_closed_loop(engine)
        self._engine, self._pool = engine, engine.pool
        self._pooled = _live_connection(engine)
        connection: Any = self._pooled.dbapi_connection
        self.driver: Any = self._pooled.driver_connection
        self.run_async: Callable[..., Any] = connection.run_async
        self._connection = connection
        self._autocommit_before = connection.autocommit
        try:
            commit_listeners_work(connection)
            connection.autocommit = True
            if self._pool not in approved:
                connection.run_async(partial(check_pooler, self._pool))
        except BaseException as exc:
            self.give_back(exc)
            raise

    def is_usable(self) -> bool:
        """Whether the server has neither said anything nor hung up since the last statement."""
        liveness: Liveness = self._pooled.info[_LIVENESS]
        return liveness.is_usable()

    def give_back(self, exc: BaseException | None = None) -> None:
        """Return it to the pool; ``exc`` is what its last statement raised.

        What fails meanwhile is logged: the statement has had its answer.
        """
        with giving_back(self._pooled):
            if self._engine.pool is not self._pool or (exc is not None and ails_connection(exc)):
                # The engine was disposed of, and nobody would close it later; or it is of no use any more.
                self._pooled.invalidate(exc)
            elif exc is not None and ails_all_connections(exc):
                # As SQLAlchemy does: the others are as old, and lead to the server that went away or was demoted.
                self._pool._invalidate(self._pooled, exc)  # noqa: SLF001 - there is no public way to it
            else:
                try:
                    self._connection.autocommit = self._autocommit_before
                except Exception as failure:  # noqa: BLE001 - whatever it is, it is of no use any more
                    self._pooled.invalidate(failure)
            self._pooled.close()


def commit_listeners_work(connection: Any) -> None:  # noqa: ANN401 - of either driver
    """End the transaction in which a listener of the pool's ran its SQL, if one did; SQLAlchemy begins it by itself.

    What comes next would be part of it, and be rolled back by the pool. A rollback would undo what the listener set.
    """
    driver = connection.driver_connection
    if is_in_transaction(driver):
        connection.commit()
        if is_in_transaction(driver):  # begun in SQL, of which SQLAlchemy's adapter for asyncpg doesn't know
            connection.run_async(lambda driver: driver.execute("COMMIT"))


def is_in_transaction(driver: Any) -> bool:  # noqa: ANN401 - asyncpg has no types
    """Whether a driver's connection is in a transaction, as the server said last."""
    if hasattr(driver, "pgconn"):
        return bool(0 < driver.pgconn.transaction_status < 4)  # noqa: PLR2004 - libpq's: 0 is idle, 4 a lost connection
    return bool(driver.is_in_transaction())


@contextmanager
def giving_back(pooled: PoolProxiedConnection) -> Iterator[None]:
    """Around what returns a connection to its pool: no error leaves it, and the pool's place is free afterwards.

    Listeners of the pool's may raise anything; then the connection is closed, and what they raised is logged.
    """
    fairy: Any = pooled
    pool = fairy._pool  # noqa: SLF001 - here and below: there is no public way to it
    try:
        yield
    except BaseException as failure:
        record = fairy._connection_record  # noqa: SLF001
        if record is not None:  # else the pool has it back
            # Nothing may give it back once more, when somebody else has it.
            fairy._connection_record = fairy.dbapi_connection = record.fairy_ref = None  # noqa: SLF001
            with suppress(Exception):
                try:
                    record.invalidate(failure)
                finally:
                    pool._return_conn(record)  # noqa: SLF001
        if not isinstance(failure, Exception):
            raise
        _logger.warning("a connection was closed, since it couldn't be given back to its pool", exc_info=True)


_loops: "WeakKeyDictionary[Pool, asyncio.AbstractEventLoop]" = WeakKeyDictionary()


def _leave_closed_loop(engine: Engine) -> None:
    """Give the engine another pool if its own belongs to a loop that has ended, as with ``asyncio.run`` called twice.

    The connections are of no use in another loop, nor is the queue in which callers wait for one.
    """
    pool, loop = engine.pool, asyncio.get_running_loop()
    known = _loops.setdefault(pool, loop)
    if known is loop or not known.is_closed():
        return
    if isinstance(pool, QueuePool):
        for _ in range(pool.checkedin()):
            pooled = engine.raw_connection()
            _abandon(pooled.driver_connection)
            with giving_back(pooled):
                pooled.invalidate()
    engine.dispose(close=False)


def _abandon(driver: Any) -> None:  # noqa: ANN401 - asyncpg has no types
    """Have a connection of another loop closed without a word: to say goodbye would take its own loop."""
    if hasattr(driver, "terminate"):
        transport = driver._transport  # noqa: SLF001 - there is no public way to it
        with suppress(RuntimeError):  # the loop is closed; asyncpg has marked the connection as closed by then
            driver.terminate()
        # The loop would have called this, which closes the socket. Loops of other makes have nothing of the kind.
        with suppress(RuntimeError, AttributeError):
            transport._call_connection_lost(None)  # noqa: SLF001 - as above


def _live_connection(engine: Engine) -> PoolProxiedConnection:
    """Take a connection from the pool, after throwing away those that are of no use any more."""
    for _ in range(_MOST_STALE):
        pooled = engine.raw_connection()
        liveness = pooled.info.get(_LIVENESS)
        if liveness is None:
            liveness = pooled.info[_LIVENESS] = Liveness(pooled.driver_connection)
        if liveness.is_usable():
            break
        if not liveness.is_of_this_loop():
            _abandon(pooled.driver_connection)
        with giving_back(pooled):
            pooled.invalidate()
    else:
        pooled = engine.raw_connection()
        pooled.info[_LIVENESS] = Liveness(pooled.driver_connection)
    return pooled


def _has_others(pool: Pool) -> bool:
    """Whether another caller who wants a connection gets one without waiting."""
    return isinstance(pool, QueuePool) and pool.checkedout() < pool.size()


def is_closed(driver: Any) -> bool:  # noqa: ANN401 - asyncpg has no types
    """Whether a driver's connection is closed, as far as the driver knows."""
    return bool(driver.closed if hasattr(driver, "pgconn") else driver.is_closed())


class Liveness:
    """Watches one connection of a driver's, between its statements, without asking the server.

    A server that ends a connection says so, and closes it: then the socket has something to read, which nobody has
    asked for. So has one of which the server changed a setting, say; to replace that connection does no harm. Nor is
    one of any use that was made in another event loop.
    """

    def __init__(self, driver: Any) -> None:  # noqa: ANN401 - asyncpg has no types
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._is_readable: Callable[[], object] = lambda: True
        if is_closed(driver):
            return  # it has no socket any more
        if hasattr(driver, "pgconn"):
            self._is_readable = _poll(driver.pgconn.socket)
        else:
            socket = driver._transport.get_extra_info("socket")  # noqa: SLF001 - there is no public way to it
            self._is_readable = _poll(socket.fileno()) if socket else lambda: False

    def is_usable(self) -> bool:
        """Whether it is of this loop, and the server has neither said anything nor hung up; in about a microsecond."""
        # asyncpg reads by itself whenever the event loop gets to it, and then nothing is left in the socket.
        return self.is_of_this_loop() and not (is_closed(self._driver) or self._is_readable())

    def is_of_this_loop(self) -> bool:
        return self._loop is asyncio.get_running_loop()


def _poll(descriptor: int) -> Callable[[], object]:
    if not hasattr(select, "poll"):  # Windows
        return lambda: select.select([descriptor], [], [], 0)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: poll.poll(0)
