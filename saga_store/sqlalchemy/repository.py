"""Runs the statements, and translates what the database says into the errors of the contract."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

from sqlalchemy import Row, TextClause
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStoreError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.model import SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.sqlalchemy.binds import BindTarget, JoinedBind, make_bind
from saga_store.sqlalchemy.group_commit import GroupCommit
from saga_store.sqlalchemy.statements import (
    CLAIM,
    EXHAUSTED,
    HISTORY,
    HOLDS,
    IN_DOUBT,
    REVISION,
    SAGA,
    SAVE,
    SAVE_UNLOCKED,
    STALE,
)
from saga_store.sqlalchemy.tables import REVISION as NEEDED_REVISION
from saga_store.storage import SagaStorage
from saga_store.validation import decode_context
from saga_store.write import Claim, Outcome, Write

# PostgreSQL's codes: a table, column or schema isn't there.
_SCHEMA_CODES = {"42P01", "42703", "3F000"}
# The server ended the connection; whether it had committed by then can't be told.
_DISCONNECT_CODES = {"57P01", "57P02", "57P03"}
_CONNECTION_CLASS = "08"
_DATA_CLASS = "22"
# Serialization failure and deadlock: the statement was rolled back, and may well succeed next time.
_RETRIABLE_CODES = {"40001", "40P01"}
_RETRY_DELAYS_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0)
_REVISION_TIMEOUT_SECONDS = 5


class SqlAlchemySagaStorage(SagaStorage):
    """Saga storage in PostgreSQL.

    Args:
        bind: Decides the unit of work. An ``AsyncEngine`` or ``async_sessionmaker``: every call is one
            statement, committed when it returns; one instance serves the whole application, from many
            tasks at once. An ``AsyncSession`` or ``AsyncConnection``: the storage joins that transaction,
            so that saga state and business rows commit together; the caller commits. The dialect is
            ``postgresql+asyncpg`` or ``postgresql+psycopg``.

        group_commit: With an engine or a sessionmaker, let concurrent calls share statements (see
            ``group_commit``). Without, every call is a statement of its own.

    Raises:
        TypeError: The bind is none of these.

    A refused write (exists, missing, stale version, bad input) leaves a joined transaction usable. Any
    other error of the database aborts it, and the caller has to roll back.
    """

    def __init__(self, bind: BindTarget, *, group_commit: bool = True) -> None:
        self._bind = make_bind(bind)
        joins = isinstance(self._bind, JoinedBind)
        self._group = (
            GroupCommit(save=self._save, save_unlocked=self._save_unlocked) if group_commit and not joins else None
        )

    @property
    def session(self) -> AsyncSession:
        """The session that the storage is bound to; AttributeError if it is bound to something else."""
        if isinstance(self._bind, JoinedBind) and isinstance(self._bind.joined, AsyncSession):
            return self._bind.joined
        raise AttributeError("this storage isn't bound to an AsyncSession")

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        if self._group is None:
            return await self._save(writes)
        answers = [self._group.submit(write) for write in writes]
        return [await answer for answer in answers]

    async def _save(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        rows = await self._execute_save(SAVE, writes)
        return [_outcome(write, row) for write, row in zip(writes, rows, strict=True)]

    async def _save_unlocked(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        rows = await self._execute_save(SAVE_UNLOCKED, writes)
        return [
            None if row.is_there and not write.creates and row.written is None else _outcome(write, row)
            for write, row in zip(writes, rows, strict=True)
        ]

    async def _execute_save(self, statement: TextClause, writes: Sequence[Write]) -> Sequence[Row[Any]]:
        rows = await self._execute_retrying(
            statement, _save_parameters(writes), if_lost=UnknownOutcomeError(writes[0].saga_id)
        )
        found = {row.saga_id: row for row in rows}
        return [found[write.saga_id] for write in writes]

    async def _execute_retrying(
        self, statement: TextClause, parameters: Mapping[str, object], *, if_lost: UnknownOutcomeError
    ) -> Sequence[Row[Any]]:
        """Execute, and again what PostgreSQL asks to be tried again, if nobody's transaction is lost."""
        for delay in _RETRY_DELAYS_SECONDS:
            try:
                return await self._execute(statement, parameters, if_lost=if_lost)
            except StorageUnavailableError as exc:
                if exc.sqlstate not in _RETRIABLE_CODES or isinstance(self._bind, JoinedBind):
                    raise
            await asyncio.sleep(random.uniform(0, delay))  # noqa: S311 - jitter, not a secret
        return await self._execute(statement, parameters, if_lost=if_lost)

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        rows = await self._execute(SAGA, {"saga_id": saga_id})
        if not rows:
            raise SagaNotFoundError(saga_id)
        return _execution(rows[0])

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        rows = await self._execute(HISTORY, {"saga_id": saga_id})
        if not rows:
            raise SagaNotFoundError(saga_id)
        return [_log_entry(saga_id, row) for row in rows if row.id is not None]

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        parameters = {"stale_after": stale_after, "limit": limit, "name": name, "max_attempts": max_attempts}
        return [_execution(row) for row in await self._execute(STALE, parameters)]

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        parameters = {"limit": limit, "name": name, "max_attempts": max_attempts}
        return [_execution(row) for row in await self._execute(EXHAUSTED, parameters)]

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        rows = await self._execute(IN_DOUBT, {"saga_id": saga_id})
        if not rows:
            raise SagaNotFoundError(saga_id)
        return [_log_entry(saga_id, row) for row in rows if row.id is not None]

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        rows = await self._execute(HOLDS, {"saga_id": saga_id, "owner": owner, "version": version})
        return any(row.held for row in rows)

    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        parameters = {
            "owner": claim.owner,
            "lease": claim.lease,
            "limit": claim.limit,
            "stale_after": claim.stale_after,
            "backoff": claim.backoff.total_seconds(),
            "max_backoff": claim.max_backoff.total_seconds(),
            "name": claim.name,
            "max_attempts": claim.max_attempts,
        }
        rows = await self._execute_retrying(CLAIM, parameters, if_lost=UnknownOutcomeError(None))
        return [_execution(row) for row in rows]

    async def _execute(
        self, statement: TextClause, parameters: Mapping[str, object], *, if_lost: UnknownOutcomeError | None = None
    ) -> Sequence[Row[Any]]:
        """Return the rows; ``if_lost`` is raised if the connection dies in a statement that commits by itself."""
        lent = None
        try:
            async with self._bind.connection() as lent:
                return (await lent.connection.execute(statement, parameters)).all()
        except Exception as exc:
            if lent is None:
                # Drivers fail to connect in ways of their own; in none of them has anything been sent.
                raise StorageUnavailableError(f"couldn't get a connection: {_reason(exc)}", _sqlstate(exc)) from exc
            if not isinstance(exc, SQLAlchemyError | OSError):
                raise
            raise await self._translated(exc, lent.connection.engine, if_lost if lent.commits else None) from exc

    async def _translated(
        self, exc: Exception, engine: AsyncEngine, if_lost: UnknownOutcomeError | None
    ) -> SagaStoreError:
        sqlstate = _sqlstate(exc)
        if _is_lost(exc, sqlstate):
            return if_lost or StorageUnavailableError(f"the connection was lost: {_reason(exc)}", sqlstate)
        if sqlstate in _SCHEMA_CODES:
            return SchemaError(await _read_revision(engine), NEEDED_REVISION)
        if sqlstate is not None and sqlstate.startswith(_DATA_CLASS):
            return InvalidSagaDataError("the input", f"was refused by PostgreSQL: {_reason(exc)}")
        return StorageUnavailableError(_reason(exc), sqlstate)


def _is_lost(exc: Exception, sqlstate: str | None) -> bool:
    """Whether the connection died, so that the server's verdict on the statement is unknown."""
    if sqlstate is None:
        return isinstance(exc, DBAPIError | OSError)  # SQLAlchemy's other errors are raised before anything is sent
    if sqlstate in _DISCONNECT_CODES or sqlstate.startswith(_CONNECTION_CLASS):
        return True
    return isinstance(exc, DBAPIError) and exc.connection_invalidated


def _sqlstate(exc: BaseException) -> str | None:
    code = getattr(getattr(exc, "orig", exc), "sqlstate", None)
    return code if isinstance(code, str) else None


def _reason(exc: BaseException) -> str:
    """What the database or the driver said, without SQLAlchemy's wrapping and our statement."""
    said = getattr(exc, "orig", None) or exc
    return str(said.__cause__ or said).strip() or type(said).__name__


async def _read_revision(engine: AsyncEngine) -> str | None:
    """Read the recorded revision over another connection: the failed one may be in an aborted transaction."""
    try:
        async with asyncio.timeout(_REVISION_TIMEOUT_SECONDS), engine.connect() as connection:
            return cast("str | None", (await connection.execute(REVISION)).scalar_one_or_none())
    except (SQLAlchemyError, OSError):
        return None


def _save_parameters(writes: Sequence[Write]) -> dict[str, object]:
    now = time.monotonic()
    steps = [(write.saga_id, step) for write in writes for step in write.steps]
    return {
        "saga_ids": [write.saga_id for write in writes],
        "names": [write.name for write in writes],
        "statuses": [_plain(write.status) for write in writes],
        "contexts": [write.context for write in writes],
        "attempts": [write.recovery_attempts for write in writes],
        "expected": [write.expected_version for write in writes],
        "lease_owners": [write.lease and write.lease.owner for write in writes],
        "lease_seconds": [
            None if write.lease is None or write.lease.lasts is None else write.lease.lasts.total_seconds()
            for write in writes
        ],
        "releases": [write.lease is not None and write.lease.releases for write in writes],
        "step_saga_ids": [saga_id for saga_id, _ in steps],
        "step_names": [step.step_name for _, step in steps],
        "step_actions": [step.action for _, step in steps],
        "step_statuses": [_plain(step.status) for _, step in steps],
        "step_details": [step.details for _, step in steps],
        "step_ages": [age for write in writes for age in write.ages(now)],
    }


def _plain(status: SagaStatus | SagaStepStatus | None) -> str | None:
    """Return a plain str: psycopg would take an enum for a type of the database's."""
    return None if status is None else status.value


def _outcome(write: Write, row: Row[Any]) -> Outcome:
    if row.written is not None:
        return cast("int", row.written)
    if write.creates:
        return SagaAlreadyExistsError(write.saga_id)
    if row.found is None:
        return SagaNotFoundError(write.saga_id)
    if write.expected_version not in (None, row.found):
        return SagaConcurrencyError(write.saga_id, write.expected_version, row.found)
    return SagaLeasedError(write.saga_id, row.holder, _in_utc(row.held_until))


def _execution(row: Row[Any]) -> SagaExecution:
    return SagaExecution(
        id=UUID(int=row.id.int),  # asyncpg's own UUID class stays inside
        name=row.name,
        status=SagaStatus(row.status),
        context=decode_context(row.context),
        version=row.version,
        recovery_attempts=row.recovery_attempts,
        lease_owner=row.lease_owner,
        lease_expires_at=None if row.lease_expires_at is None else _in_utc(row.lease_expires_at),
        created_at=_in_utc(row.created_at),
        updated_at=_in_utc(row.updated_at),
    )


def _log_entry(saga_id: UUID, row: Row[Any]) -> SagaLogEntry:
    return SagaLogEntry(
        id=row.id,
        saga_id=saga_id,
        step_name=row.step_name,
        action=row.action,
        status=SagaStepStatus(row.status),
        details=row.details,
        created_at=_in_utc(row.created_at),
    )


def _in_utc(moment: datetime) -> datetime:
    # psycopg answers in the session's time zone, asyncpg in UTC.
    return moment.astimezone(UTC)
