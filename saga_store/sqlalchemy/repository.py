"""Runs the statements, and translates what the database says into the errors of the contract."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, cast
from uuid import UUID

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
from saga_store.model import SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.sqlalchemy.binds import Attempt, BindTarget, JoinedBind, Parameters, Rows, make_bind
from saga_store.sqlalchemy.failures import is_lost, reason, sqlstate
from saga_store.sqlalchemy.group_commit import GroupCommit
from saga_store.sqlalchemy.statements import (
    CLAIM,
    EXHAUSTED,
    HISTORY,
    HISTORY_PAGE,
    HOLDS,
    IN_DOUBT,
    REVISION,
    SAGA,
    SAVE,
    SAVE_UNLOCKED,
    STALE,
    Statement,
)
from saga_store.sqlalchemy.tables import REVISION as NEEDED_REVISION
from saga_store.storage import SagaStorage
from saga_store.validation import DEFAULT_MAX_CONTEXT_BYTES, decode_context, valid_max_context_bytes
from saga_store.write import Claim, Outcome, Write

# PostgreSQL's codes: a table, column or schema isn't there.
_SCHEMA_CODES = {"42P01", "42703", "3F000"}
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
        max_context_bytes: How big a context may be as JSON text, in which what isn't ASCII is escaped; at most
            512 MiB. A bigger one is refused with InvalidSagaDataError; one that is stored already can be read.

    Raises:
        TypeError: The bind is none of these.
        InvalidSagaDataError: An impossible ``max_context_bytes``.

    A refused write (exists, missing, stale version, bad input) leaves a joined transaction usable. Any
    other error of the database aborts it, and the caller has to roll back.
    """

    def __init__(
        self, bind: BindTarget, *, group_commit: bool = True, max_context_bytes: int = DEFAULT_MAX_CONTEXT_BYTES
    ) -> None:
        self._max_context_bytes = valid_max_context_bytes(max_context_bytes)
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
        if len(writes) == 1:
            return [await self._group.write(writes[0])]
        return await asyncio.gather(*map(self._group.write, writes))

    async def _save(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        rows = await self._execute_save(SAVE, writes)
        return [_outcome(write, row) for write, row in zip(writes, rows, strict=True)]

    async def _save_unlocked(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        rows = await self._execute_save(SAVE_UNLOCKED, writes)
        return [_outcome_unless_locked(write, row) for write, row in zip(writes, rows, strict=True)]

    async def _execute_save(self, statement: Statement, writes: Sequence[Write]) -> Rows:
        """Return a row for each write, in their order."""
        rows = await self._execute_retrying(
            statement, _save_parameters(writes), if_lost=UnknownOutcomeError(writes[0].saga_id)
        )
        return sorted(rows, key=itemgetter(0))

    async def _execute_retrying(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError
    ) -> Rows:
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
        return _execution(*rows[0])

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_entries(HISTORY, saga_id, {})

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        return await self._fetch_entries(HISTORY_PAGE, saga_id, {"after": after, "limit": limit})

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        parameters = {"stale_after": stale_after, "limit": limit, "name": name, "max_attempts": max_attempts}
        return [_execution(*row) for row in await self._execute(STALE, parameters)]

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        parameters = {"limit": limit, "name": name, "max_attempts": max_attempts}
        return [_execution(*row) for row in await self._execute(EXHAUSTED, parameters)]

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_entries(IN_DOUBT, saga_id, {})

    async def _fetch_entries(
        self, statement: Statement, saga_id: UUID, parameters: Mapping[str, object]
    ) -> list[SagaLogEntry]:
        rows = await self._execute(statement, {"saga_id": saga_id, **parameters})
        if not rows:
            raise SagaNotFoundError(saga_id)
        # A saga without such entries comes as one row of NULLs.
        return [_log_entry(saga_id, *row) for row in rows if row[0] is not None]

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        rows = await self._execute(HOLDS, {"saga_id": saga_id, "owner": owner, "version": version})
        return any(held for (held,) in rows)

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
        return [_execution(*row) for row in rows]

    async def _execute(
        self, statement: Statement, parameters: Parameters, *, if_lost: UnknownOutcomeError | None = None
    ) -> Rows:
        """Return the rows; ``if_lost`` is raised if the connection dies in a statement that commits by itself."""
        attempt = Attempt()
        try:
            return await self._bind.execute(statement, parameters, attempt)
        except SagaStoreError:
            raise  # the bind refused what it was bound to
        except Exception as exc:
            if isinstance(exc, TypeError) and attempt.engine is None:
                raise  # the bind is of a kind that can't be used
            raise await _translated(exc, attempt, if_lost) from exc


async def _translated(exc: Exception, attempt: Attempt, if_lost: UnknownOutcomeError | None) -> SagaStoreError:
    code = sqlstate(exc)
    if not attempt.reached_connection:
        # Drivers fail to connect in ways of their own; in none of them has anything been sent.
        return StorageUnavailableError(f"couldn't get a connection: {reason(exc)}", code)
    if is_lost(exc):
        if if_lost and attempt.commits:
            return if_lost
        return StorageUnavailableError(f"the connection was lost: {reason(exc)}", code)
    if code in _SCHEMA_CODES and attempt.engine is not None:
        return SchemaError(await _read_revision(attempt.engine), NEEDED_REVISION)
    if code is not None and code.startswith(_DATA_CLASS):
        return InvalidSagaDataError("the input", f"was refused by PostgreSQL: {reason(exc)}")
    return StorageUnavailableError(reason(exc), code)


async def _read_revision(engine: AsyncEngine) -> str | None:
    """Read the recorded revision over another connection: the failed one may be in an aborted transaction."""
    try:
        async with asyncio.timeout(_REVISION_TIMEOUT_SECONDS), engine.connect() as connection:
            return cast("str | None", (await connection.execute(REVISION.text)).scalar_one_or_none())
    except Exception:  # noqa: BLE001 - there is a worse error to report, and this one is told as "none found"
        return None


def _save_parameters(writes: Sequence[Write]) -> dict[str, object]:
    now = time.monotonic()
    steps = [(write.saga_id, step) for write in writes for step in write.steps]
    columns: dict[str, list[Any]] = {
        "saga_ids": [write.saga_id for write in writes],
        "names": [write.name for write in writes],
        "statuses": [_plain(write.status) for write in writes],
        "contexts": [write.context for write in writes],
        "attempts": [write.recovery_attempts for write in writes],
        "expected": [write.expected_version for write in writes],
        "lease_owners": [write.lease and write.lease.owner for write in writes],
        "lease_seconds": [write.lease and write.lease.seconds for write in writes],
        "releases": [write.lease and write.lease.releases for write in writes],
        "step_saga_ids": [saga_id for saga_id, _ in steps],
        "step_names": [step.step_name for _, step in steps],
        "step_actions": [step.action for _, step in steps],
        "step_statuses": [_plain(step.status) for _, step in steps],
        "step_details": [step.details for _, step in steps],
        "step_ages": [age or None for write in writes for age in write.ages(now)],
    }
    # To unnest, no array is as good as one of NULLs, and to the drivers, which look at every element, far cheaper.
    return {name: None if column.count(None) == len(column) else column for name, column in columns.items()}


def _plain(status: SagaStatus | SagaStepStatus | None) -> str | None:
    """Return a plain str: psycopg would take an enum for a type of the database's."""
    return None if status is None else status.value


def _outcome(write: Write, row: Sequence[Any]) -> Outcome:
    _, written, found, holder, held_until, _ = row
    if written is not None:
        return cast("int", written)
    if write.creates:
        return SagaAlreadyExistsError(write.saga_id)
    if found is None:
        return SagaNotFoundError(write.saga_id)
    if write.expected_version not in (None, found):
        return SagaConcurrencyError(write.saga_id, write.expected_version, found)
    return SagaLeasedError(write.saga_id, holder, _in_utc(held_until))


def _outcome_unless_locked(write: Write, row: Sequence[Any]) -> Outcome | None:
    _, written, _, _, _, is_there = row
    return None if is_there and written is None and not write.creates else _outcome(write, row)


def _execution(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statements
    saga_id: UUID,
    name: str,
    status: str,
    context: str,
    version: int,
    recovery_attempts: int,
    lease_owner: str | None,
    lease_expires_at: datetime | None,
    created_at: datetime,
    updated_at: datetime,
) -> SagaExecution:
    return SagaExecution(
        id=UUID(int=saga_id.int),  # asyncpg's own UUID class stays inside
        name=name,
        status=SagaStatus(status),
        context=decode_context(context),
        version=version,
        recovery_attempts=recovery_attempts,
        lease_owner=lease_owner,
        lease_expires_at=None if lease_expires_at is None else _in_utc(lease_expires_at),
        created_at=_in_utc(created_at),
        updated_at=_in_utc(updated_at),
    )


def _log_entry(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    saga_id: UUID,
    entry_id: int,
    step_name: str,
    action: StepAction,
    status: str,
    details: str | None,
    created_at: datetime,
) -> SagaLogEntry:
    return SagaLogEntry(entry_id, saga_id, step_name, action, SagaStepStatus(status), details, _in_utc(created_at))


def _in_utc(moment: datetime) -> datetime:
    # psycopg answers in the session's time zone, asyncpg in UTC.
    return moment.astimezone(UTC)
