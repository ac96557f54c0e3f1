"""The storage: its writes through ``writer``, its reads and claims as statements of their own."""

from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError, UnknownOutcomeError
from saga_store.inspection import Cursor, InterventionPage, SagaCount, SagaFigures, SagaPage, SagaQuery, SagaSummary
from saga_store.joining import Part
from saga_store.model import SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.sqlalchemy.binds import BindTarget, JoinedBind, make_bind
from saga_store.sqlalchemy.execution import Executor
from saga_store.sqlalchemy.following import take_part
from saga_store.sqlalchemy.group_commit import GroupCommit
from saga_store.sqlalchemy.read_sql import (
    CLAIM,
    EXHAUSTED,
    HISTORY,
    HISTORY_PAGE,
    HOLDS,
    IN_DOUBT,
    RECENT_WRITES,
    SAGA,
    STALE,
)
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.views import Views
from saga_store.sqlalchemy.writer import Writer
from saga_store.storage import SagaStorage
from saga_store.validation import DEFAULT_MAX_CONTEXT_BYTES, decode_context, valid_max_context_bytes, valid_period
from saga_store.write import Claim, Outcome, Settlement, Write

# A restart of the server is over by then; a failover often isn't.
RETRY_FOR = timedelta(seconds=5)


class SqlAlchemySagaStorage(SagaStorage):
    """Saga storage in PostgreSQL.

    Args:
        bind: Decides the unit of work. An ``AsyncEngine`` or ``async_sessionmaker``: every call is one
            statement, committed when it returns; one instance serves the whole application, from many
            tasks at once. An ``AsyncSession`` or ``AsyncConnection``: the storage joins that transaction,
            so that saga state and business rows commit together; the caller commits. The dialect is
            ``postgresql+asyncpg`` or ``postgresql+psycopg``.
        group_commit: With an engine or a sessionmaker, let concurrent calls share statements (see
            ``group_commit``). As long as there are more to come, they may keep up to two connections of the
            engine's pool, if it has others. Without, every call is a statement of its own.
        retry_for: With an engine or a sessionmaker, for how long a call goes on trying after a failure that may
            pass: no connection to be had, the server restarting or read-only after a failover, a deadlock, a
            serialization failure, the connection lost while reading. Only what can't write twice is tried
            again: a write whose answer got lost, if it expects a version (``save``, ``update_context`` and
            ``update_status`` with ``expected_version``, runs). Then the true outcome is found out. Zero means
            never: every failure is raised, and every lost answer is UnknownOutcomeError. An attempt that has
            begun isn't cut short; for that, drivers have timeouts of their own.
        max_context_bytes: How big a context may be as JSON text, in which what isn't ASCII is escaped; at most
            512 MiB. A bigger one is refused with InvalidSagaDataError; one that is stored already can be read.

    Raises:
        TypeError: The bind is none of these.
        InvalidSagaDataError: ``retry_for`` is no timedelta, or negative; an impossible ``max_context_bytes``.

    A refused write (exists, missing, stale version, bad input) leaves a joined transaction usable. Any
    other error of the database aborts it, and the caller has to roll back.
    """

    def __init__(
        self,
        bind: BindTarget,
        *,
        group_commit: bool = True,
        retry_for: timedelta = RETRY_FOR,
        max_context_bytes: int = DEFAULT_MAX_CONTEXT_BYTES,
    ) -> None:
        self._max_context_bytes = valid_max_context_bytes(max_context_bytes)
        self._bind = make_bind(bind)
        seconds = valid_period("retry_for", retry_for).total_seconds()
        joins = self._joins = isinstance(self._bind, JoinedBind)
        # If a run of another storage writes in this transaction: what database that one is on.
        self._home: str | None = None
        self._executor = Executor(self._bind, seconds)
        self._views = Views(self._executor)
        self._writer = Writer(self._executor, resolves=seconds > 0 and not joins)
        self._group = GroupCommit(self._writer) if group_commit and not joins else None

    @property
    def session(self) -> AsyncSession:
        """The session that the storage is bound to; AttributeError if it is bound to something else."""
        if isinstance(self._bind, JoinedBind) and isinstance(self._bind.joined, AsyncSession):
            return self._bind.joined
        raise AttributeError("this storage isn't bound to an AsyncSession")

    def _apply(self, write: Write) -> Awaitable[Outcome]:
        if write.repeats:
            return self._writer.repeat(write)
        return self._writer.write(write) if self._group is None else self._group.write(write)

    def _joined(self, into: object) -> "SqlAlchemySagaStorage":
        if self._joins:
            raise InvalidSagaDataError(
                "into",
                "can't be given to a run whose storage is bound to a session or connection: its commit() writes "
                "in that transaction",
            )
        if not isinstance(into, AsyncSession | AsyncConnection):
            raise InvalidSagaDataError("into", f"must be an AsyncSession or AsyncConnection, not {type(into).__name__}")
        joined = SqlAlchemySagaStorage(into, max_context_bytes=self._max_context_bytes)
        joined._home = self._bind.database
        return joined

    async def _take_part(self) -> Part:
        assert isinstance(self._bind, JoinedBind)  # noqa: S101 - see _joined
        return await take_part(self._bind, self._home)

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        rows = await self._executor.execute(SAGA, {"saga_id": saga_id})
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
        return [_execution(*row) for row in await self._executor.execute(STALE, parameters)]

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        parameters = {"limit": limit, "name": name, "max_attempts": max_attempts}
        return [_execution(*row) for row in await self._executor.execute(EXHAUSTED, parameters)]

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_entries(IN_DOUBT, saga_id, {})

    async def _fetch_entries(
        self, statement: Statement, saga_id: UUID, parameters: Mapping[str, object]
    ) -> list[SagaLogEntry]:
        rows = await self._executor.execute(statement, {"saga_id": saga_id, **parameters})
        if not rows:
            raise SagaNotFoundError(saga_id)
        # A saga without such entries comes as one row of NULLs.
        return [_log_entry(saga_id, *row) for row in rows if row[0] is not None]

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        rows = await self._executor.execute(HOLDS, {"saga_id": saga_id, "owner": owner, "version": version})
        return any(held for (held,) in rows)

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:
        rows = await self._executor.execute(RECENT_WRITES, {"saga_ids": [saga_id]})
        return [write_id for (_, _, recent) in rows for write_id in recent or ()]

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
        rows = await self._executor.execute(CLAIM, parameters, if_lost=UnknownOutcomeError(None))
        return [_execution(*row) for row in rows]

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        return await self._views.find(query, limit, after)

    async def _count(self, query: SagaQuery) -> SagaCount:
        return await self._views.count(query)

    async def _sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        return await self._views.sample(query)

    async def _find_interventions(
        self, since: datetime, by: str | None, limit: int, after: int | None
    ) -> InterventionPage:
        return await self._views.interventions(since, by, limit, after)

    async def _fetch_figures(self, query: SagaQuery) -> SagaFigures:
        return await self._views.figures(query)

    async def _settle(self, settlement: Settlement) -> None:
        await self._views.settle(settlement)


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
