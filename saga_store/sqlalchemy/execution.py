"""Runs statements, again where that is safe, and translates what the database says into the errors of the contract."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio.exc import AsyncContextNotStarted

from saga_store.errors import (
    InvalidSagaDataError,
    SagaStoreError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.binds import Target, Transaction
from saga_store.sqlalchemy.failures import (
    FEATURE_NOT_SUPPORTED,
    PERMISSION_DENIED,
    READ_ONLY,
    cannot_connect_now,
    is_drivers,
    is_lost,
    is_unsendable,
    reason,
    sqlstate,
)
from saga_store.sqlalchemy.observation import Observer
from saga_store.sqlalchemy.pooled import Attempt, execute_on_pool
from saga_store.sqlalchemy.read_sql import REVISION
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import REVISION as NEEDED_REVISION
from saga_store.sqlalchemy.wire import Parameters, Rows, read_text

_T = TypeVar("_T")

# PostgreSQL's codes: a table, column or schema isn't there.
_SCHEMA_CODES = {"42P01", "42703", "3F000"}
# The statement was rolled back, and may well succeed next time: a serialization failure, a deadlock, and a standby,
# which may be about to become the primary, or whose name to mean another server.
_PASSING = {"40001", "40P01", READ_ONLY}
_REVISION_TIMEOUT_SECONDS = 5
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5


class Retry(Enum):
    """Whether a statement that failed may be sent again."""

    SAFE = auto()
    """Nothing was written, and the next attempt may fare better."""
    IF_RECOGNISED = auto()
    """It may have been executed, or be executed yet: only what the row recognises when it comes twice."""
    ONCE = auto()
    """Nothing was written, and another connection may fare better."""
    NEVER = auto()
    """No attempt would fare better; or it was in the caller's transaction, which is gone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a statement that failed means to its caller; ``error`` has its cause."""

    error: SagaStoreError
    retry: Retry


def pauses(longest: float = _LONGEST_PAUSE_SECONDS) -> Iterator[float]:
    """Yield growing pauses in seconds, drawn at random, or those who failed together would come back together."""
    bound = _FIRST_PAUSE_SECONDS
    while True:
        yield random.uniform(0, bound)  # noqa: S311 - jitter, not a secret
        bound = min(2 * bound, longest)


class Retries:
    """The pauses of one call; its time begins now, when something has failed for the first time."""

    __slots__ = ("_deadline", "_pauses")

    def __init__(self, seconds: float, longest_pause: float = _LONGEST_PAUSE_SECONDS) -> None:
        self._deadline = time.monotonic() + seconds
        self._pauses = pauses(longest_pause)

    async def pause(self, *, until: "News | None" = None) -> bool:
        """Wait a little before the next attempt, or ``until`` there is news; False, at once, if there is no time."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return False
        seconds = min(next(self._pauses), left)
        await (until.wait(seconds) if until else asyncio.sleep(seconds))
        return True


class News:
    """That a statement got through: whoever waits for the server needn't wait any longer."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        if self._waiting:
            loop = asyncio.get_running_loop()
            for waiting in list(self._waiting):
                if waiting.get_loop() is loop and not waiting.done():
                    waiting.set_result(None)

    async def wait(self, seconds: float) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await asyncio.wait([waiting], timeout=seconds)
        finally:
            self._waiting.discard(waiting)


class Executor:
    """Runs statements at a target.

    ``retry_for`` is how many seconds a call goes on trying after its first failure; ``news`` and ``observer`` are the
    whole storage's.
    """

    def __init__(self, target: Target, retry_for: float, news: News, observer: Observer | None = None) -> None:
        self._target = target
        self.retry_for = retry_for
        self.news = news
        self.observer = observer

    @property
    def joins(self) -> bool:
        """Whether statements are part of a transaction of the caller's."""
        return self._target.joins

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Executor"]:
        """Give an executor for statements that follow each other closely; it may keep its connection meanwhile."""
        async with self._target.holding() as target:
            yield Executor(target, self.retry_for, self.news, self.observer)

    async def execute(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows:
        """Return the rows; ``if_lost`` is raised if the connection dies in a statement that commits by itself."""
        answer = await self.settle(statement, parameters, if_lost=if_lost)
        if isinstance(answer, Failure):
            raise self.told(answer.error) from answer.error.__cause__
        return answer

    async def settle(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows | Failure:
        """Try as long as that is safe and there is time."""
        return await self._again(lambda attempt: self._target.execute(statement, parameters, attempt), if_lost)

    async def attempt(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows | Failure:
        return await self._once(lambda attempt: self._target.execute(statement, parameters, attempt), if_lost)

    async def transact(
        self, work: Callable[[Transaction, Attempt], Awaitable[_T]], *, if_lost: UnknownOutcomeError | None = None
    ) -> _T:
        """Do something in one transaction, again as long as that is safe; ``work`` begins anew each time.

        Raises:
            InvalidSagaDataError: It writes, as ``if_lost`` says, and the caller's connection is in autocommit, where
                no lock lasts from one statement to the next.
        """

        async def once(attempt: Attempt) -> _T:
            async with self._target.transaction(attempt) as transaction:
                if if_lost is not None and attempt.joins and attempt.commits:
                    raise InvalidSagaDataError(
                        "bind",
                        "must be a transaction for what takes several statements, and this connection is in "
                        "autocommit; give it another isolation level, or use a storage that is bound to the engine",
                    )
                return await work(transaction, attempt)

        answer = await self._again(once, if_lost)
        if isinstance(answer, Failure):
            raise self.told(answer.error) from answer.error.__cause__
        return answer

    def told(self, error: SagaStoreError, *, writes: int = 1) -> SagaStoreError:
        """Return the error that writes end with; if their answer got lost, that is told."""
        if self.observer is not None and isinstance(error, UnknownOutcomeError):
            for _ in range(writes):
                self.observer.resolved(error)
        return error

    @asynccontextmanager
    async def open(
        self, *, snapshot: bool = False
    ) -> AsyncIterator[Callable[[Statement, Parameters], Awaitable[Rows]]]:
        """Give what runs statements in one transaction, which lasts; nothing is tried again.

        Args:
            snapshot: Whether it reads one moment, and writes nothing.
        """
        attempt = Attempt()
        begin = self._target.snapshot if snapshot else self._target.transaction
        async with AsyncExitStack() as stack:
            async with _translated(attempt):
                transaction = await stack.enter_async_context(begin(attempt))

            async def run(statement: Statement, parameters: Parameters) -> Rows:
                async with _translated(attempt):
                    return await transaction.execute(statement, parameters)

            try:
                yield run
            except BaseException as exc:
                # It says more than that a connection that has died can't be rolled back.
                with suppress(Exception):
                    await stack.__aexit__(type(exc), exc, exc.__traceback__)
                raise
            async with _translated(attempt):
                await stack.aclose()

    async def _again(
        self, call: Callable[[Attempt], Awaitable[_T]], if_lost: UnknownOutcomeError | None
    ) -> _T | Failure:
        answer = await self._once(call, if_lost)
        if isinstance(answer, Failure) and answer.retry is Retry.ONCE and self.retry_for:
            answer = await self._retry(answer, call, if_lost)
        if isinstance(answer, Failure):
            retries = Retries(self.retry_for)
            while isinstance(answer, Failure) and answer.retry is Retry.SAFE and await retries.pause():
                answer = await self._retry(answer, call, if_lost)
        return answer

    async def _retry(
        self, failure: Failure, call: Callable[[Attempt], Awaitable[_T]], if_lost: UnknownOutcomeError | None
    ) -> _T | Failure:
        if self.observer is not None:
            self.observer.retried(failure.error)
        return await self._once(call, if_lost)

    async def _once(
        self, call: Callable[[Attempt], Awaitable[_T]], if_lost: UnknownOutcomeError | None
    ) -> _T | Failure:
        attempt = Attempt()
        try:
            answer = await call(attempt)
        except SagaStoreError:
            raise  # the bind refused what it was bound to
        except Exception as exc:
            if isinstance(exc, TypeError) and attempt.engine is None:
                raise  # the bind is of a kind that can't be used
            failure = await _failure(exc, attempt, if_lost)
            failure.error.__cause__ = exc
            return failure
        self.news.tell()
        return answer


@asynccontextmanager
async def _translated(attempt: Attempt) -> AsyncIterator[None]:
    try:
        yield
    except SagaStoreError:
        raise
    except Exception as exc:
        failure = await _failure(exc, attempt, None)
        raise failure.error from exc


async def _failure(exc: Exception, attempt: Attempt, if_lost: UnknownOutcomeError | None) -> Failure:
    if not attempt.reached_connection:
        return _may_pass(_no_connection(exc), attempt, may_pass=cannot_connect_now(exc))
    if is_lost(exc):
        if if_lost and attempt.commits:
            return Failure(if_lost, Retry.NEVER if attempt.joins else Retry.IF_RECOGNISED)
        lost = StorageUnavailableError(f"the connection was lost: {reason(exc)}", sqlstate(exc))
        return _may_pass(lost, attempt, may_pass=True)
    error = await _refusal(exc, attempt)
    if sqlstate(exc) == FEATURE_NOT_SUPPORTED and not attempt.joins:
        return Failure(error, Retry.ONCE)
    return _may_pass(error, attempt, may_pass=sqlstate(exc) in _PASSING)


def _may_pass(error: SagaStoreError, attempt: Attempt, *, may_pass: bool) -> Failure:
    return Failure(error, Retry.SAFE if may_pass and not attempt.joins else Retry.NEVER)


def _no_connection(exc: Exception) -> SagaStoreError:
    """Drivers fail to connect in ways of their own; in none of them has anything been sent."""
    if isinstance(exc, PoolTimeoutError):
        return StorageUnavailableError(
            f"no connection of the engine's pool became free in time: {reason(exc)}; give the engine a larger "
            "pool_size or a longer pool_timeout, and see to it that connections are given back"
        )
    if isinstance(exc, AsyncContextNotStarted):
        return StorageUnavailableError(
            "the connection that the storage is bound to isn't open: enter it with `async with engine.connect() as "
            "connection`, and use the storage inside"
        )
    if not isinstance(exc, SQLAlchemyError | OSError) and not is_drivers(exc):
        return StorageUnavailableError(
            f"couldn't get a connection: {type(exc).__name__}: {reason(exc)}; {_advice(exc)}"
        )
    return StorageUnavailableError(
        f"couldn't get a connection: {reason(exc)}; look whether the server is up, and the engine's URL right",
        sqlstate(exc),
    )


def _advice(exc: Exception) -> str:
    """Return where to look if no driver raised this, but what is around it."""
    if isinstance(exc, RuntimeError):
        return "an engine can't be shared between event loops that are open: make an engine and a storage for each"
    if isinstance(exc, TypeError):
        return (
            "look at the engine's connect_args; and if the client encoding is SQL_ASCII, psycopg gives SQLAlchemy "
            "bytes: have it be another, by connect_args={'client_encoding': 'utf8'}"
        )
    return (
        "no driver raised this, so look at what the engine and its pool call, such as event listeners: where callers "
        "share a statement they see no caller's context, unless the storage is told by group_by= which ones may"
    )


async def _refusal(exc: Exception, attempt: Attempt) -> SagaStoreError:
    """Return what it means that the server, or the driver before it, refused a statement: nothing was written."""
    code = sqlstate(exc)
    if code in _SCHEMA_CODES and attempt.engine is not None:
        return SchemaError(await _read_revision(attempt.engine, attempt.schema), NEEDED_REVISION, schema=attempt.schema)
    if is_unsendable(exc):
        return InvalidSagaDataError("the input", f"can't be stored: {reason(exc)}")
    if code == PERMISSION_DENIED:
        return StorageUnavailableError(
            f"{reason(exc)}: the connection's role lacks a privilege; who only reads needs GRANT USAGE ON SCHEMA and "
            "GRANT SELECT ON saga_executions, saga_logs, saga_archives, saga_shard, saga_store_version, as "
            "`saga-store grants --role ROLE --read-only` prints it, and without --read-only what who writes needs",
            code,
        )
    if code == READ_ONLY:
        return StorageUnavailableError(
            f"{reason(exc)}: the server is a standby, or default_transaction_read_only is on; check the engine's URL, "
            "or let the driver look for the primary by target_session_attrs=read-write",
            code,
        )
    return StorageUnavailableError(reason(exc), code)


async def _read_revision(engine: AsyncEngine, schema: str | None) -> str | None:
    """Read the recorded revision over another connection: the failed one may be in an aborted transaction."""
    try:
        async with asyncio.timeout(_REVISION_TIMEOUT_SECONDS):
            rows = await execute_on_pool(engine.sync_engine, REVISION.spelled(schema), {}, Attempt(), neutral=False)
        return read_text(rows[0][0]) if rows else None
    except Exception:  # noqa: BLE001 - there is a worse error to report, and this one is told as "none found"
        return None
