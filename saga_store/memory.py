"""The storage in memory: PostgreSQL's twin for tests, with the same transactions, row locks and clock rules."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError
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
    cut,
    in_doubt,
)
from saga_store.joining import Part
from saga_store.memory_database import MemoryDatabase, MemorySession, Row, by_urgency
from saga_store.memory_retention import MemoryKeepingStorage
from saga_store.model import UNFINISHED, SagaExecution, SagaLogEntry
from saga_store.remedies import show
from saga_store.shard_records import ShardRecord, ShardState
from saga_store.validation import DEFAULT_MAX_CONTEXT_BYTES, decode_context, valid_max_context_bytes
from saga_store.write import Claim, Outcome, Settlement, Write

__all__ = ["MemoryDatabase", "MemorySagaStorage", "MemorySession"]


class MemorySagaStorage(MemoryKeepingStorage):
    """Saga storage in memory, with the contract of ``SqlAlchemySagaStorage``; nothing survives the process.

    Args:
        bind: A ``MemoryDatabase`` (default: one of its own): every call is committed when it returns. A
            ``MemorySession``: the storage joins that transaction, and the caller commits.
        max_context_bytes: As in ``SqlAlchemySagaStorage``.
    """

    _seconds_between_looks = 0.005

    def __init__(
        self,
        bind: MemoryDatabase | MemorySession | None = None,
        *,
        max_context_bytes: int = DEFAULT_MAX_CONTEXT_BYTES,
    ) -> None:
        self._bind = MemoryDatabase() if bind is None else bind
        if not isinstance(self._bind, MemoryDatabase | MemorySession):
            raise TypeError(
                f"MemorySagaStorage takes a MemoryDatabase or a MemorySession, not {show(bind)}; leave it out for a "
                "database of its own, or make a SqlAlchemySagaStorage for PostgreSQL"
            )
        self._joins = isinstance(self._bind, MemorySession)
        self._max_context_bytes = valid_max_context_bytes(max_context_bytes)

    @property
    def session(self) -> MemorySession:
        """The session that the storage is bound to; AttributeError if it is bound to a database."""
        if isinstance(self._bind, MemorySession):
            return self._bind
        raise AttributeError("this storage is bound to no session: it commits every call itself")

    async def _apply(self, write: Write) -> Outcome:
        if isinstance(self._bind, MemorySession):
            return await self._bind._apply(write)
        async with MemorySession(self._bind) as session:
            outcome = await session._apply(write)
            await session.commit()
            return outcome

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        return self._here(saga_id).as_execution()

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return self._view()._history(self._here(saga_id).id)

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        history = await self._fetch_history(saga_id)
        start = bisect_right(history, after, key=attrgetter("id"))
        return history[start : start + limit]

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        view = self._view()
        now = view._database._clock()
        stale = [
            row
            for row in view._unleased(name, now)
            if row.updated_at <= now - stale_after and row.recovery_attempts < max_attempts
        ]
        return [row.as_execution() for row in sorted(stale, key=by_urgency)[:limit]]

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        view = self._view()
        rows = view._unleased(name, view._database._clock())
        exhausted = [row for row in rows if row.recovery_attempts >= max_attempts]
        exhausted.sort(key=lambda row: (row.updated_at, row.id))
        return [row.as_execution() for row in exhausted[:limit]]

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        return in_doubt(await self._fetch_history(saga_id))

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        view = self._view()
        row = view._row(saga_id)
        held = row is not None and row.is_leased(view._database._clock())
        return held and row is not None and (row.lease_owner, row.version) == (owner, version)

    async def _fetch_unfinished(self, saga_ids: Sequence[UUID]) -> Collection[UUID]:
        rows = (self._view()._row(saga_id) for saga_id in saga_ids)
        return {row.id for row in rows if row is not None and row.status in UNFINISHED}

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:
        row = self._view()._row(saga_id)
        return row.recent_writes if row else ()

    async def _fetch_shard_state(self) -> ShardState:
        database = self._view()._database
        return ShardState(next(iter(database._shard_records), None), not database._rows, id(database))

    async def _record_shard(self, record: ShardRecord) -> None:
        database = self._view()._database
        database._shard_records = database._shard_records or [record]

    def _joined(self, into: object) -> "MemorySagaStorage":
        if isinstance(self._bind, MemorySession):
            raise InvalidSagaDataError(
                "into", "can't be given to a run whose storage is bound to a session: its commit() writes in that one"
            )
        if not isinstance(into, MemorySession):
            raise InvalidSagaDataError(
                "into", f"must be a MemorySession, not {show(into)}; open one on the same database"
            )
        if into._database is not self._bind:
            raise InvalidSagaDataError("into", "must be on the run's database, and is on another MemoryDatabase")
        return MemorySagaStorage(into, max_context_bytes=self._max_context_bytes)

    async def _take_part(self) -> Part:
        return self.session._take_part()

    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        if isinstance(self._bind, MemorySession):
            return [row.as_execution() for row in self._bind._claim(claim)]
        async with MemorySession(self._bind) as session:
            claimed = session._claim(claim)
            await session.commit()
            return [row.as_execution() for row in claimed]

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        return self._view()._views().find(query, limit, after)

    async def _count(self, query: SagaQuery) -> SagaCount:
        return self._view()._views().count(query)

    async def _sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        views = self._view()._views()
        sagas, is_partial = views.look(query, samples=True)
        return sagas, views.now, is_partial

    async def _find_interventions(
        self, since: datetime, by: str | None, limit: int, after: int | None
    ) -> InterventionPage:
        return self._view()._views().interventions(since, by, limit, after)

    async def _fetch_recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        history = await self._fetch_history(saga_id)
        newer = history[bisect_right(history, after, key=attrgetter("id")) :]
        return RecentHistory([cut(entry) for entry in newer[-limit:]], max(len(newer) - limit, 0))

    async def _peek(self, saga_id: UUID, most: int) -> ContextPeek:
        row = self._here(saga_id)
        size = len(row.context.encode())
        return ContextPeek(size, decode_context(row.context) if size <= most else None)

    async def _fetch_figures(self, query: SagaQuery) -> SagaFigures:
        return self._view()._views().figures(query)

    async def _settle(self, settlement: Settlement) -> None:
        if isinstance(self._bind, MemorySession):
            await self._bind._settle(settlement)
            return
        async with MemorySession(self._bind) as session:
            await session._settle(settlement)
            await session.commit()

    def _here(self, saga_id: UUID) -> Row:
        """Return the row, and no stub."""
        view = self._view()
        row = view._row(saga_id)
        if row is None:
            raise SagaNotFoundError(saga_id)
        if row.archived_at is not None:
            raise view._database.archived(row)
        return row

    def _view(self) -> MemorySession:
        return self._bind if isinstance(self._bind, MemorySession) else MemorySession(self._bind)
