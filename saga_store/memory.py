"""The storage in memory: PostgreSQL's twin for tests, with the same transactions, row locks and clock rules."""

import asyncio
import itertools
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from types import TracebackType
from typing import Self
from uuid import UUID

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStoreError,
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
    cut,
    in_doubt,
)
from saga_store.joining import Fate, Part
from saga_store.memory_views import MemoryViews
from saga_store.model import UNFINISHED, SagaExecution, SagaLogEntry, SagaStatus
from saga_store.storage import SagaStorage
from saga_store.validation import DEFAULT_MAX_CONTEXT_BYTES, decode_context, valid_max_context_bytes
from saga_store.write import Claim, Lease, Outcome, Settlement, Write
from saga_store.write_ids import leads_to

# As many ids of its last writes a row keeps.
_MOST_RECENT_WRITES = 32


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of saga_executions; the context is text, so nobody can hold a live piece of it."""

    id: UUID
    name: str
    status: SagaStatus
    context: str
    version: int
    recovery_attempts: int
    lease_owner: str | None
    lease_expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    recent_writes: tuple[int, ...] = ()

    def is_leased(self, now: datetime) -> bool:
        return self.lease_expires_at is not None and self.lease_expires_at > now

    def as_execution(self) -> SagaExecution:
        return SagaExecution(
            id=self.id,
            name=self.name,
            status=self.status,
            context=decode_context(self.context),
            version=self.version,
            recovery_attempts=self.recovery_attempts,
            lease_owner=self.lease_owner,
            lease_expires_at=self.lease_expires_at,
            created_at=self.created_at,
            updated_at=self.updated_at,
        )


def _now() -> datetime:
    return datetime.now(UTC)


class MemoryDatabase:
    """What several storages and sessions share: both tables, the sequence, the row locks and the clock.

    Args:
        clock: The database's clock, returning aware datetimes; a test may pass one that it can move.
    """

    def __init__(self, *, clock: Callable[[], datetime] = _now) -> None:
        self._clock = clock
        self._rows: dict[UUID, _Row] = {}
        self._logs: dict[UUID, list[SagaLogEntry]] = {}
        self._sequence = itertools.count(1)
        self._holders: dict[UUID, MemorySession] = {}
        self._waiters: dict[UUID, deque[asyncio.Future[None]]] = {}

    def count_rows(self) -> tuple[int, int]:
        """Return how many sagas and how many log entries are committed."""
        return len(self._rows), sum(len(log) for log in self._logs.values())

    def age(self, saga_id: UUID, by: timedelta) -> None:
        """Make a committed saga older: it last changed so much longer ago, and its lease ends so much sooner."""
        row = self._rows[saga_id]
        expires = row.lease_expires_at and row.lease_expires_at - by
        self._rows[saga_id] = replace(row, updated_at=row.updated_at - by, lease_expires_at=expires)


class MemorySession:
    """A transaction on a MemoryDatabase, after the manner of SQLAlchemy's AsyncSession at READ COMMITTED.

    What a storage bound to it writes is seen by others after ``commit()``, and is gone after ``rollback()``
    or on leaving ``async with``. Until then the sagas written are locked: other writers wait.
    """

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database
        self._rows: dict[UUID, _Row] = {}
        self._logs: dict[UUID, list[SagaLogEntry]] = {}
        self._parts: list[Part] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.rollback()

    async def commit(self) -> None:
        """Make everything written since the last commit or rollback visible to all, at once."""
        self._database._rows.update(self._rows)
        for saga_id, entries in self._logs.items():
            self._database._logs.setdefault(saga_id, []).extend(entries)
        self._end(Fate.COMMITTED)

    async def rollback(self) -> None:
        """Drop everything written since the last commit or rollback."""
        self._end(Fate.ROLLED_BACK)

    def _take_part(self) -> Part:
        self._parts.append(Part(self))
        return self._parts[-1]

    def _end(self, fate: Fate) -> None:
        for part in self._parts:
            part.fate = fate
        self._parts.clear()
        self._rows.clear()
        self._logs.clear()
        for saga_id in [held for held, holder in self._database._holders.items() if holder is self]:
            self._unlock(saga_id)

    def _row(self, saga_id: UUID) -> _Row | None:
        return self._rows.get(saga_id) or self._database._rows.get(saga_id)

    def _history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return self._database._logs.get(saga_id, []) + self._logs.get(saga_id, [])

    async def _lock(self, saga_id: UUID) -> None:
        database = self._database
        while database._holders.setdefault(saga_id, self) is not self:
            waiter = asyncio.get_running_loop().create_future()
            database._waiters.setdefault(saga_id, deque()).append(waiter)
            await waiter

    def _unlock(self, saga_id: UUID) -> None:
        del self._database._holders[saga_id]
        for waiter in self._database._waiters.pop(saga_id, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def _apply(self, write: Write) -> Outcome:
        now = self._database._clock()
        # As in PostgreSQL, a row that can't be seen isn't waited for, and one that exists isn't inserted.
        row = self._row(write.saga_id)
        if write.creates:
            if row is None:
                await self._lock(write.saga_id)
                row = self._row(write.saga_id)
                if row is not None:
                    self._unlock(write.saga_id)  # somebody was faster; ON CONFLICT DO NOTHING locks nothing
            return self._insert(write, now) if row is None else _recognised(row, write, SagaAlreadyExistsError(row.id))
        if row is None:
            return SagaNotFoundError(write.saga_id)
        await self._lock(write.saga_id)
        row = self._row(write.saga_id) or row
        if write.write_id in row.recent_writes or write.expected_version not in (None, row.version):
            refusal = SagaConcurrencyError(row.id, write.expected_version or 0, row.version)
            return _recognised(row, write, refusal)
        taker = write.lease and write.lease.owner
        if taker and row.lease_owner and row.lease_expires_at and row.is_leased(now) and taker != row.lease_owner:
            return SagaLeasedError(write.saga_id, row.lease_owner, row.lease_expires_at)
        return self._update(row, write, now)

    def _claim(self, claim: Claim) -> list[_Row]:
        now = self._database._clock()
        free = [
            row
            for row in self._unleased(claim.name, now)
            if row.recovery_attempts < claim.max_attempts
            and row.updated_at <= now - claim.stale_after - _pause(claim, row.recovery_attempts)
            and self._database._holders.get(row.id, self) is self  # SKIP LOCKED
        ]
        claimed = [
            replace(
                row,
                version=row.version + 1,
                recovery_attempts=row.recovery_attempts + 1,
                lease_owner=claim.owner,
                lease_expires_at=now + claim.lease,
                updated_at=now,
            )
            for row in sorted(free, key=_by_urgency)[: claim.limit]
        ]
        for row in claimed:
            self._database._holders[row.id] = self
            self._rows[row.id] = row
        return claimed

    async def _settle(self, settlement: Settlement) -> None:
        saga_id = settlement.saga_id
        if self._row(saga_id) is None:
            raise SagaNotFoundError(saga_id)
        await self._lock(saga_id)
        row = self._row(saga_id)
        if row is not None:
            settlement.check_version(row.version)
        started = next((entry for entry in in_doubt(self._history(saga_id)) if entry.id == settlement.entry_id), None)
        if row is None or started is None:
            raise settlement.refusal()
        before = {
            "status": row.status.value,
            "recovery_attempts": row.recovery_attempts,
            "lease_owner": row.lease_owner,
        }
        steps = settlement.steps(started.step_name, started.action, before)
        self._update(row, Write(saga_id, lease=Lease(), steps=steps), self._database._clock())

    def _views(self) -> MemoryViews:
        rows = (self._database._rows | self._rows).values()
        return MemoryViews(list(rows), self._history, self._database._clock())

    def _unleased(self, name: str | None, now: datetime) -> list[_Row]:
        rows = (self._database._rows | self._rows).values()
        return [row for row in rows if row.status in UNFINISHED and name in (None, row.name) and not row.is_leased(now)]

    def _insert(self, write: Write, now: datetime) -> int:
        assert write.name is not None  # noqa: S101 - tells mypy what `creates` means
        row = _Row(
            id=write.saga_id,
            name=write.name,
            status=write.status or SagaStatus.PENDING,
            context=write.context or "{}",
            version=1,
            recovery_attempts=write.recovery_attempts or 0,
            lease_owner=None,
            lease_expires_at=None,
            created_at=now,
            updated_at=now,
        )
        return self._store(_with_lease(row, write, now), write, now)

    def _update(self, row: _Row, write: Write, now: datetime) -> int:
        if write.changes_row:
            row = replace(
                row,
                status=write.status or row.status,
                context=write.context or row.context,
                version=row.version + 1,
                recovery_attempts=row.recovery_attempts if write.recovery_attempts is None else write.recovery_attempts,
                updated_at=now,
            )
        return self._store(_with_lease(row, write, now), write, now)

    def _store(self, row: _Row, write: Write, now: datetime) -> int:
        database = self._database
        if write.write_id is not None:
            row = replace(row, recent_writes=(*row.recent_writes, write.write_id)[-_MOST_RECENT_WRITES:])
        self._rows[row.id] = row
        self._logs.setdefault(row.id, []).extend(
            SagaLogEntry(
                id=next(database._sequence),
                saga_id=row.id,
                step_name=step.step_name,
                action=step.action,
                status=step.status,
                details=step.details,
                created_at=now - timedelta(seconds=age),
            )
            for step, age in zip(write.steps, write.ages(time.monotonic()), strict=True)
        )
        return row.version


def _recognised(row: _Row, write: Write, refusal: SagaStoreError) -> Outcome:
    return leads_to(write) if write.write_id in row.recent_writes else refusal


def _with_lease(row: _Row, write: Write, now: datetime) -> _Row:
    lease = write.lease
    owner = (lease and lease.owner) or row.lease_owner
    finishes = write.status is not None and write.status not in UNFINISHED
    if finishes or owner is None or (lease and lease.releases):
        return replace(row, lease_owner=None, lease_expires_at=None)
    if lease is None or lease.lasts is None:
        return row
    return replace(row, lease_owner=owner, lease_expires_at=now + lease.lasts)


def _pause(claim: Claim, attempts: int) -> timedelta:
    doubled = claim.backoff.total_seconds() * (2.0 ** min(attempts, 60) - 1)
    return timedelta(seconds=min(doubled, claim.max_backoff.total_seconds()))


def _by_urgency(row: _Row) -> tuple[int, datetime, UUID]:
    return row.recovery_attempts, row.updated_at, row.id


class MemorySagaStorage(SagaStorage):
    """Saga storage in memory, with the contract of ``SqlAlchemySagaStorage``; nothing survives the process.

    Args:
        bind: A ``MemoryDatabase`` (default: one of its own): every call is committed when it returns. A
            ``MemorySession``: the storage joins that transaction, and the caller commits.
        max_context_bytes: As in ``SqlAlchemySagaStorage``.
    """

    def __init__(
        self,
        bind: MemoryDatabase | MemorySession | None = None,
        *,
        max_context_bytes: int = DEFAULT_MAX_CONTEXT_BYTES,
    ) -> None:
        self._bind = MemoryDatabase() if bind is None else bind
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
        row = self._view()._row(saga_id)
        if row is None:
            raise SagaNotFoundError(saga_id)
        return row.as_execution()

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        view = self._view()
        if view._row(saga_id) is None:
            raise SagaNotFoundError(saga_id)
        return view._history(saga_id)

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
        return [row.as_execution() for row in sorted(stale, key=_by_urgency)[:limit]]

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

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:
        row = self._view()._row(saga_id)
        return row.recent_writes if row else ()

    def _joined(self, into: object) -> "MemorySagaStorage":
        if isinstance(self._bind, MemorySession):
            raise InvalidSagaDataError(
                "into", "can't be given to a run whose storage is bound to a session: its commit() writes in that one"
            )
        if not isinstance(into, MemorySession):
            raise InvalidSagaDataError("into", f"must be a MemorySession, not {type(into).__name__}")
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
        row = self._view()._row(saga_id)
        if row is None:
            raise SagaNotFoundError(saga_id)
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

    def _view(self) -> MemorySession:
        return self._bind if isinstance(self._bind, MemorySession) else MemorySession(self._bind)
