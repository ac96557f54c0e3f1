"""Runs statements, again where that is safe, and translates what the database says into the errors of the contract."""

import asyncio
from dataclasses import dataclass
from typing import cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.errors import (
    InvalidSagaDataError,
    SagaStoreError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.binds import Attempt, Bind, Parameters, Rows
from saga_store.sqlalchemy.failures import READ_ONLY, cannot_connect_now, is_lost, reason, sqlstate
from saga_store.sqlalchemy.retries import Retries
from saga_store.sqlalchemy.statements import REVISION, Statement
from saga_store.sqlalchemy.tables import REVISION as NEEDED_REVISION

# PostgreSQL's codes: a table, column or schema isn't there.
_SCHEMA_CODES = {"42P01", "42703", "3F000"}
_DATA_CLASS = "22"
# The statement was rolled back, and may well succeed next time: a serialization failure, a deadlock, and a standby,
# which may be about to become the primary, or whose name to mean another server.
_PASSING = {"40001", "40P01", READ_ONLY}
_REVISION_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """What a statement that failed means to its caller, and whether the next attempt may fare better.

    ``passes`` is False wherever another attempt could write twice, or is somebody else's transaction.
    """

    error: SagaStoreError
    passes: bool


class Executor:
    """Runs statements on a bind; ``retry_for`` is how many seconds a call goes on trying after its first failure."""

    def __init__(self, bind: Bind, retry_for: float) -> None:
        self._bind = bind
        self.retry_for = retry_for

    async def execute(
        self,
        statement: Statement,
        parameters: Parameters,
        *,
        if_lost: UnknownOutcomeError | None = None,
        retries: Retries | None = None,
    ) -> Rows:
        """Return the rows; ``if_lost`` is raised if the connection dies in a statement that commits by itself."""
        while isinstance(answer := await self.attempt(statement, parameters, if_lost=if_lost), Failure):
            retries = retries or Retries(self.retry_for)
            if not (answer.passes and await retries.pause()):
                raise answer.error from answer.error.__cause__
        return answer

    async def attempt(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows | Failure:
        attempt = Attempt()
        try:
            return await self._bind.execute(statement, parameters, attempt)
        except SagaStoreError:
            raise  # the bind refused what it was bound to
        except Exception as exc:
            if isinstance(exc, TypeError) and attempt.engine is None:
                raise  # the bind is of a kind that can't be used
            failure = await _failure(exc, attempt, if_lost)
            failure.error.__cause__ = exc
            return failure


async def _failure(exc: Exception, attempt: Attempt, if_lost: UnknownOutcomeError | None) -> Failure:
    is_ours = not attempt.joins
    if isinstance(exc, PoolTimeoutError):
        return Failure(_exhausted_pool(exc), passes=False)
    if not attempt.reached_connection:
        # Drivers fail to connect in ways of their own; in none of them has anything been sent.
        error = StorageUnavailableError(f"couldn't get a connection: {reason(exc)}", sqlstate(exc))
        return Failure(error, passes=is_ours and cannot_connect_now(exc))
    if is_lost(exc):
        if if_lost and attempt.commits:
            return Failure(if_lost, passes=False)
        error = StorageUnavailableError(f"the connection was lost: {reason(exc)}", sqlstate(exc))
        return Failure(error, passes=is_ours)
    return Failure(await _refusal(exc, attempt), passes=is_ours and sqlstate(exc) in _PASSING)


async def _refusal(exc: Exception, attempt: Attempt) -> SagaStoreError:
    """Return what it means that the server answered by an error: nothing was written."""
    code = sqlstate(exc)
    if code in _SCHEMA_CODES and attempt.engine is not None:
        return SchemaError(await _read_revision(attempt.engine), NEEDED_REVISION)
    if code is not None and code.startswith(_DATA_CLASS):
        return InvalidSagaDataError("the input", f"was refused by PostgreSQL: {reason(exc)}")
    if code == READ_ONLY:
        return StorageUnavailableError(
            f"{reason(exc)}: the server is a standby, or default_transaction_read_only is on; check the engine's URL, "
            "or let the driver look for the primary by target_session_attrs=read-write",
            code,
        )
    return StorageUnavailableError(reason(exc), code)


def _exhausted_pool(exc: PoolTimeoutError) -> StorageUnavailableError:
    return StorageUnavailableError(
        f"no connection of the engine's pool became free in time: {reason(exc)}; give the engine a larger pool_size "
        "or a longer pool_timeout, and see to it that connections are given back"
    )


async def _read_revision(engine: AsyncEngine) -> str | None:
    """Read the recorded revision over another connection: the failed one may be in an aborted transaction."""
    try:
        async with asyncio.timeout(_REVISION_TIMEOUT_SECONDS), engine.connect() as connection:
            return cast("str | None", (await connection.execute(REVISION.text)).scalar_one_or_none())
    except Exception:  # noqa: BLE001 - there is a worse error to report, and this one is told as "none found"
        return None
