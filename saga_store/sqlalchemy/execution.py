"""Runs statements, again where that is safe, and translates what the database says into the errors of the contract."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from saga_store.errors import (
    InvalidSagaDataError,
    SagaStoreError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.binds import Bind
from saga_store.sqlalchemy.failures import READ_ONLY, cannot_connect_now, is_lost, reason, sqlstate
from saga_store.sqlalchemy.pooled import Attempt
from saga_store.sqlalchemy.read_sql import REVISION
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import REVISION as NEEDED_REVISION
from saga_store.sqlalchemy.wire import Parameters, Rows

# PostgreSQL's codes: a table, column or schema isn't there.
_SCHEMA_CODES = {"42P01", "42703", "3F000"}
_DATA_CLASS = "22"
# The statement was rolled back, and may well succeed next time: a serialization failure, a deadlock, and a standby,
# which may be about to become the primary, or whose name to mean another server.
_PASSING = {"40001", "40P01", READ_ONLY}
_REVISION_TIMEOUT_SECONDS = 5
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5
_PERMISSION_DENIED = "42501"

_T = TypeVar("_T")


class Retry(Enum):
    """Whether a statement that failed may be sent again."""

    SAFE = auto()
    """Nothing was written, and the next attempt may fare better."""
    IF_RECOGNISED = auto()
    """It may have been executed, or be executed yet: only what the row recognises when it comes twice."""
    NEVER = auto()
    """No attempt would fare better; or it was in somebody else's transaction, which is gone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a statement that failed means to its caller; ``error`` has its cause."""

    error: SagaStoreError
    retry: Retry


class Retries:
    """The pauses of one call; its time begins when something fails for the first time."""

    __slots__ = ("_deadline", "_pause", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    async def pause(self) -> bool:
        """Wait a little before the next attempt; False, at once, if there is no time for one."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._seconds
        left = self._deadline - now
        if left <= 0:
            return False
        # Random, lest those who failed together come back together.
        await asyncio.sleep(min(random.uniform(0, self._pause), left))  # noqa: S311 - jitter, not a secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return True


class Executor:
    """Runs statements on a bind; ``retry_for`` is how many seconds a call goes on trying after its first failure."""

    def __init__(self, bind: Bind, retry_for: float) -> None:
        self._bind = bind
        self.retry_for = retry_for

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Executor"]:
        """Give an executor for statements that follow each other closely; it may keep its connection meanwhile."""
        async with self._bind.holding() as bind:
            yield Executor(bind, self.retry_for)

    async def execute(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows:
        """Return the rows; ``if_lost`` is raised if the connection dies in a statement that commits by itself."""
        answer = await self.settle(statement, parameters, if_lost=if_lost)
        if isinstance(answer, Failure):
            raise answer.error from answer.error.__cause__
        return answer

    async def settle(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows | Failure:
        """Try as long as that is safe and there is time."""
        return await self._again(lambda attempt: self._bind.execute(statement, parameters, attempt), if_lost)

    async def attempt(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows | Failure:
        return await _once(lambda attempt: self._bind.execute(statement, parameters, attempt), if_lost)

    async def transact(
        self, work: Callable[[AsyncConnection, Attempt], Awaitable[_T]], *, if_lost: UnknownOutcomeError | None = None
    ) -> _T:
        """Do something in one transaction, again as long as that is safe; ``work`` begins anew each time."""

        async def once(attempt: Attempt) -> _T:
            async with self._bind.transaction(attempt) as connection:
                return await work(connection, attempt)

        answer = await self._again(once, if_lost)
        if isinstance(answer, Failure):
            raise answer.error from answer.error.__cause__
        return answer

    async def _again(
        self, call: Callable[[Attempt], Awaitable[_T]], if_lost: UnknownOutcomeError | None
    ) -> _T | Failure:
        answer = await _once(call, if_lost)
        if isinstance(answer, Failure):
            retries = Retries(self.retry_for)
            while isinstance(answer, Failure) and answer.retry is Retry.SAFE and await retries.pause():
                answer = await _once(call, if_lost)
        return answer


async def _once(call: Callable[[Attempt], Awaitable[_T]], if_lost: UnknownOutcomeError | None) -> _T | Failure:
    attempt = Attempt()
    try:
        return await call(attempt)
    except SagaStoreError:
        raise  # the bind refused what it was bound to
    except Exception as exc:
        if isinstance(exc, TypeError) and attempt.engine is None:
            raise  # the bind is of a kind that can't be used
        failure = await _failure(exc, attempt, if_lost)
        failure.error.__cause__ = exc
        return failure


async def _failure(exc: Exception, attempt: Attempt, if_lost: UnknownOutcomeError | None) -> Failure:
    if not attempt.reached_connection:
        error, may_pass = _no_connection(exc), cannot_connect_now(exc)
    elif is_lost(exc):
        if if_lost and attempt.commits:
            return Failure(if_lost, Retry.NEVER if attempt.joins else Retry.IF_RECOGNISED)
        error, may_pass = StorageUnavailableError(f"the connection was lost: {reason(exc)}", sqlstate(exc)), True
    else:
        error, may_pass = await _refusal(exc, attempt), sqlstate(exc) in _PASSING
    return Failure(error, Retry.SAFE if may_pass and not attempt.joins else Retry.NEVER)


def _no_connection(exc: Exception) -> SagaStoreError:
    """Drivers fail to connect in ways of their own; in none of them has anything been sent."""
    if isinstance(exc, PoolTimeoutError):
        return StorageUnavailableError(
            f"no connection of the engine's pool became free in time: {reason(exc)}; give the engine a larger "
            "pool_size or a longer pool_timeout, and see to it that connections are given back"
        )
    return StorageUnavailableError(f"couldn't get a connection: {reason(exc)}", sqlstate(exc))


async def _refusal(exc: Exception, attempt: Attempt) -> SagaStoreError:
    """Return what it means that the server answered by an error: nothing was written."""
    code = sqlstate(exc)
    if code in _SCHEMA_CODES and attempt.engine is not None:
        return SchemaError(await _read_revision(attempt.engine), NEEDED_REVISION)
    if code is not None and code.startswith(_DATA_CLASS):
        return InvalidSagaDataError("the input", f"was refused by PostgreSQL: {reason(exc)}")
    if code == _PERMISSION_DENIED:
        return StorageUnavailableError(
            f"{reason(exc)}: the connection's role lacks a privilege; who only reads needs GRANT USAGE ON SCHEMA and "
            "GRANT SELECT ON saga_executions, saga_logs, and who writes all that `saga-store grants ROLE` prints",
            code,
        )
    if code == READ_ONLY:
        return StorageUnavailableError(
            f"{reason(exc)}: the server is a standby, or default_transaction_read_only is on; check the engine's URL, "
            "or let the driver look for the primary by target_session_attrs=read-write",
            code,
        )
    return StorageUnavailableError(reason(exc), code)


async def _read_revision(engine: AsyncEngine) -> str | None:
    """Read the recorded revision over another connection: the failed one may be in an aborted transaction."""
    try:
        async with asyncio.timeout(_REVISION_TIMEOUT_SECONDS), engine.connect() as connection:
            return cast("str | None", (await connection.execute(REVISION.text)).scalar_one_or_none())
    except Exception:  # noqa: BLE001 - there is a worse error to report, and this one is told as "none found"
        return None
