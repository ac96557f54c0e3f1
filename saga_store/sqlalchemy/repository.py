"""The storage: its writes through ``writer``, its reads and claims as statements of their own."""

import logging
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from saga_store.errors import (
    InvalidSagaDataError,
    SagaNotFoundError,
    SagaStoreError,
    SagaUnreadableError,
    UnknownOutcomeError,
)
from saga_store.inspection import (
    ContextPeek,
    Cursor,
    InterventionPage,
    RecentHistory,
    SagaCount,
    SagaFigures,
    SagaPage,
    SagaQuery,
    SagaSummary,
)
from saga_store.joining import Part
from saga_store.model import Context, SagaExecution, SagaLogEntry, SagaStatus
from saga_store.remedies import show
from saga_store.shard_records import ShardRecord, ShardState
from saga_store.sqlalchemy.binds import BindTarget, JoinedBind, PoolTarget, Target, make_bind
from saga_store.sqlalchemy.execution import Executor, News
from saga_store.sqlalchemy.following import take_part
from saga_store.sqlalchemy.group_commit import GroupCommit
from saga_store.sqlalchemy.lost_answers import read_ids
from saga_store.sqlalchemy.observation import Observer, copy_detached_context
from saga_store.sqlalchemy.read_sql import (
    CLAIM,
    EXHAUSTED,
    HISTORY,
    HISTORY_PAGE,
    HOLDS,
    IN_DOUBT,
    RECENT_WRITES,
    RECORD_SHARD,
    SAGA,
    SHARD_STATE,
    STALE,
    STATE,
    UNFINISHED,
)
from saga_store.sqlalchemy.retention import KeepingStorage
from saga_store.sqlalchemy.retention_reading import as_entry
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.views import Views
from saga_store.sqlalchemy.wire import Parameters, Rows, read_moment, read_text
from saga_store.sqlalchemy.write_parameters import ids_as_text
from saga_store.sqlalchemy.writer import Writer
from saga_store.storage import SagaState
from saga_store.telemetry import Telemetry
from saga_store.validation import (
    DEFAULT_MAX_CONTEXT_BYTES,
    decode_context,
    valid_max_context_bytes,
    valid_period,
    valid_schema,
)
from saga_store.waiting import Look
from saga_store.write import Claim, Outcome, Settlement, Write

_logger = logging.getLogger("saga_store")

# A restart of the server is over by then; a failover often isn't.
RETRY_FOR = timedelta(seconds=5)


class SqlAlchemySagaStorage(KeepingStorage):
    """Saga storage in PostgreSQL.

    Args:
        bind: Decides the unit of work. An ``AsyncEngine`` or ``async_sessionmaker``: every call is one
            statement, committed when it returns; one instance serves the whole application, from many
            tasks at once. An ``AsyncSession`` or ``AsyncConnection``: the storage joins that transaction,
            so that saga state and business rows commit together; the caller commits. The dialect is
            ``postgresql+asyncpg`` or ``postgresql+psycopg``. A sessionmaker is asked for each call, in the caller's
            context, where a session of its own would send the statement (``get_bind``, ``binds``); the session
            sends nothing, so its events, such as ``after_begin``, don't fire. One that leads to a connection
            joins that connection's transaction. docs/binds.md tells it all, and what to do for row-level security.
        schema: Where the tables are. None: along the connection's search path. SQLAlchemy's
            ``schema_translate_map``, of the engine, connection or session, applies to either.
        group_by: Which calls may share a statement and its connection: those for which this function, called in
            the caller's context, returns equal keys. For an application whose connections are made ready by what
            the context holds, such as a pool's ``checkout`` event that sets a tenant by a ContextVar: that event
            then sees the context of a caller of that key. Without it, where calls share a statement, events see no
            caller's context at all.
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
        telemetry: Is told what the storage does while it does it, such as ``OpenTelemetry`` of
            ``saga_store.telemetry.opentelemetry``; what goes wrong there is logged, and nothing else comes of it.

    Raises:
        TypeError: The bind is none of these, or of a kind that can't be used; ``group_by`` can't be called;
            ``telemetry`` is none.
        InvalidSagaDataError: ``retry_for`` is no timedelta, or negative; an impossible ``schema`` or
            ``max_context_bytes``.

    A refused write (exists, missing, stale version, bad input) leaves a joined transaction usable. Any
    other error of the database aborts it, and the caller has to roll back.
    """

    def __init__(  # noqa: PLR0913 - a storage's settings, all with defaults
        self,
        bind: BindTarget,
        *,
        schema: str | None = None,
        group_by: Callable[[], Hashable] | None = None,
        group_commit: bool = True,
        retry_for: timedelta = RETRY_FOR,
        max_context_bytes: int = DEFAULT_MAX_CONTEXT_BYTES,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._max_context_bytes = valid_max_context_bytes(max_context_bytes)
        self._bind = make_bind(bind, None if schema is None else valid_schema(schema))
        if group_by is not None and not callable(group_by):
            raise TypeError(f"group_by must be a function that returns a key, not {group_by!r}, such as tenant.get")
        self._retry_seconds = valid_period("retry_for", retry_for).total_seconds()
        self._group_by = group_by
        self._news = News()
        self._schema = schema
        self._joins = isinstance(self._bind, JoinedBind)
        # If a run of another storage writes in this transaction: what database that one is on.
        self._home: str | None = None
        self._views = Views(self._executor)
        if telemetry is not None and (isinstance(telemetry, type) or not isinstance(telemetry, Telemetry)):
            raise TypeError(
                f"telemetry must be a saga_store.telemetry.Telemetry, not {telemetry!r}; such as OpenTelemetry()"
            )
        self._telemetry = telemetry
        self._observer = None if telemetry is None else Observer(telemetry)
        self._group: GroupCommit[PoolTarget] | None = (
            GroupCommit(self._writer, group_by, self._observer) if group_commit else None
        )
        if self._observer is not None:
            self._observer.watch_calls(self, self._bind.url, schema)

    @property
    def session(self) -> AsyncSession:
        """The session that the storage is bound to; AttributeError if it is bound to something else."""
        if isinstance(self._bind, JoinedBind) and isinstance(self._bind.joined, AsyncSession):
            return self._bind.joined
        raise AttributeError("this storage isn't bound to an AsyncSession")

    def _apply(self, write: Write) -> Awaitable[Outcome]:
        target = self._bind.target(writes=True)
        if write.repeats:
            return self._writer(target).repeat(write)
        if self._group is None or not isinstance(target, PoolTarget):
            return self._writer(target).write(write)
        return self._group.write(write, target)

    def _writer(self, target: Target) -> Writer:
        return Writer(self._at(target), resolves=self._retry_seconds > 0 and not target.joins)

    def _execute(
        self,
        statement: Statement,
        parameters: Parameters,
        *,
        writes: bool = False,
        if_lost: UnknownOutcomeError | None = None,
    ) -> Awaitable[Rows]:
        return self._executor(writes=writes).execute(statement, parameters, if_lost=if_lost)

    def _executor(self, *, writes: bool) -> Executor:
        return self._at(self._bind.target(writes=writes))

    def _at(self, target: Target) -> Executor:
        return Executor(target, self._retry_seconds, self._news, self._observer)

    def _call_joins(self) -> bool:
        # A sessionmaker may lead to a connection, now or for this caller only.
        return self._bind.target(writes=True).joins

    def _joined(self, into: object) -> "SqlAlchemySagaStorage":
        if self._call_joins():
            raise InvalidSagaDataError(
                "into",
                "can't be given to a run whose storage is bound to a session or connection: its commit() writes "
                "in that transaction",
            )
        if not isinstance(into, AsyncSession | AsyncConnection):
            raise InvalidSagaDataError(
                "into", f"must be an AsyncSession or AsyncConnection, not {show(into)}; open one on the same database"
            )
        joined = SqlAlchemySagaStorage(
            into, schema=self._schema, max_context_bytes=self._max_context_bytes, telemetry=self._telemetry
        )
        joined._home = self._bind.database
        return joined

    async def _take_part(self) -> Part:
        assert isinstance(self._bind, JoinedBind)  # noqa: S101 - see _joined
        return await take_part(self._bind, self._home)

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        rows = await self._execute(SAGA, {"saga_id": saga_id})
        if not rows:
            raise SagaNotFoundError(saga_id)
        *row, archived_at = rows[0]
        await self._check_here(saga_id, archived_at)
        return _execution(*row)

    async def _fetch_state(self, saga_id: UUID) -> SagaState:
        rows = await self._execute(STATE, {"saga_id": saga_id})
        if not rows:
            raise SagaNotFoundError(saga_id)
        status, attempts, owner, version, archived_at = rows[0]
        await self._check_here(saga_id, archived_at)
        return SagaState(_replaced(status), attempts, None if owner is None else _replaced(owner), version)

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_entries(HISTORY, saga_id, {})

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        return await self._fetch_entries(HISTORY_PAGE, saga_id, {"after": after, "limit": limit})

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        parameters = {
            "stale_after": stale_after.total_seconds(),
            "limit": limit,
            "name": name,
            "max_attempts": max_attempts,
        }
        return _readable(await self._execute(STALE, parameters))

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        parameters = {"limit": limit, "name": name, "max_attempts": max_attempts}
        return _readable(await self._execute(EXHAUSTED, parameters))

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_entries(IN_DOUBT, saga_id, {})

    async def _fetch_entries(
        self, statement: Statement, saga_id: UUID, parameters: Mapping[str, object]
    ) -> list[SagaLogEntry]:
        rows = await self._execute(statement, {"saga_id": saga_id, **parameters})
        if not rows:
            raise SagaNotFoundError(saga_id)
        await self._check_here(saga_id, rows[0][-1])
        # A saga without such entries comes as one row of NULLs.
        return [_log_entry(saga_id, entry) for *entry, _ in rows if entry[0] is not None]

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        rows = await self._execute(HOLDS, {"saga_id": saga_id, "owner": owner, "version": version})
        return any(held for (held,) in rows)

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:
        rows = await self._execute(RECENT_WRITES, {"saga_ids": ids_as_text([saga_id])})
        return [write_id for (_, _, recent, _) in rows for write_id in read_ids(recent)]

    def _where_to_look(self) -> Look:
        target = self._bind.target(writes=False)
        if self._group_by is not None:
            return Look(
                partial(self._fetch_unfinished, at=self._at(target)),
                (target.key, self._group_by()),
                partial(copy_detached_context, self._observer),
            )
        if isinstance(target, PoolTarget):
            target = target.neutral()
        return Look(partial(self._fetch_unfinished, at=self._at(target)), target.key)

    async def _fetch_unfinished(self, saga_ids: Sequence[UUID], *, at: Executor | None = None) -> Collection[UUID]:
        at = at or self._executor(writes=False)
        rows = await at.execute(UNFINISHED, {"saga_ids": ids_as_text(saga_ids)})
        return [UUID(int=saga_id.int) for saga_id, is_unfinished in rows if is_unfinished]

    async def _fetch_shard_state(self) -> ShardState:
        [(cluster, index, count, name, is_empty, database)] = await self._execute(SHARD_STATE, {})
        record = None if cluster is None else ShardRecord(UUID(read_text(cluster)), index, count, read_text(name))
        return ShardState(record, is_empty, read_text(database))

    async def _record_shard(self, record: ShardRecord) -> None:
        parameters = {
            "cluster": str(record.cluster),
            "shard": record.index,
            "shards": record.count,
            "hash": record.hash,
        }
        await self._execute(RECORD_SHARD, parameters, writes=True)

    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        """Claim until there are as many as asked for that can be read, or no more.

        One that can't be read is claimed as well, and left out: so it isn't in the way of the others until its lease
        has expired, and comes after them then.
        """
        claimed: list[SagaExecution] = []
        while True:
            try:
                rows = await self._claim_rows(claim, claim.limit - len(claimed))
            except SagaStoreError as exc:
                if not claimed:
                    raise
                _logger.warning("sagas were claimed, and then no more could be: %s", exc)
                return claimed
            readable = _readable(rows)
            claimed += readable
            if len(readable) == len(rows) or len(claimed) >= claim.limit:
                return claimed

    async def _claim_rows(self, claim: Claim, limit: int) -> Rows:
        parameters = {
            "owner": claim.owner,
            "lease": claim.lease.total_seconds(),
            "limit": limit,
            "stale_after": claim.stale_after.total_seconds(),
            "backoff": claim.backoff.total_seconds(),
            "max_backoff": claim.max_backoff.total_seconds(),
            "name": claim.name,
            "max_attempts": claim.max_attempts,
        }
        return await self._execute(CLAIM, parameters, writes=True, if_lost=UnknownOutcomeError(None))

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

    async def _fetch_recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        return await self._naming_archive(self._views.recent(saga_id, limit, after))

    async def _peek(self, saga_id: UUID, most: int) -> ContextPeek:
        return await self._naming_archive(self._views.peek(saga_id, most))

    async def _fetch_figures(self, query: SagaQuery) -> SagaFigures:
        return await self._views.figures(query)

    async def _settle(self, settlement: Settlement) -> None:
        await self._naming_archive(self._views.settle(settlement))


def _readable(rows: Rows) -> list[SagaExecution]:
    """Return the sagas, without those that can't be read: they stop nobody, and the log names them."""
    readable = []
    for row in rows:
        try:
            readable.append(_execution(*row))
        except SagaUnreadableError as exc:
            _logger.warning("%s", exc, extra={"saga_id": exc.saga_id})
    return readable


def _execution(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statements
    saga_id: UUID,
    name: bytes,
    status: bytes,
    context: bytes,
    version: int,
    recovery_attempts: int,
    lease_owner: bytes | None,
    lease_expires_at: bytes | None,
    created_at: bytes,
    updated_at: bytes,
) -> SagaExecution:
    saga_id = UUID(int=saga_id.int)  # asyncpg's own UUID class stays inside
    with _read(saga_id):
        return SagaExecution(
            id=saga_id,
            name=read_text(name),
            status=SagaStatus(read_text(status)),
            context=_read_context(context),
            version=version,
            recovery_attempts=recovery_attempts,
            lease_owner=None if lease_owner is None else read_text(lease_owner),
            lease_expires_at=None if lease_expires_at is None else read_moment(lease_expires_at),
            created_at=read_moment(created_at),
            updated_at=read_moment(updated_at),
        )


def _read_context(sent: bytes) -> Context:
    context = decode_context(read_text(sent))
    if not isinstance(context, dict):
        raise ValueError(f"its context is no object, but a {type(context).__name__}")  # noqa: TRY004 - of what is stored
    return context


def _log_entry(saga_id: UUID, row: Sequence[Any]) -> SagaLogEntry:
    with _read(saga_id, f"entry {row[0]} of its history: "):
        return as_entry(saga_id, *row)


@contextmanager
def _read(saga_id: UUID, what: str = "") -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as exc:
        raise SagaUnreadableError(saga_id, f"{what}{exc}") from exc


def _replaced(sent: bytes) -> str:
    return sent.decode(errors="replace")
