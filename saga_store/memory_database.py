"""The twin's database: its rows, histories, ledger, sequence, row locks and clock, and transactions on them."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self
from uuid import UUID

from saga_store.errors import (
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStoreError,
)
from saga_store.inspection import in_doubt
from saga_store.joining import Fate, Part
from saga_store.memory_views import MemoryViews
from saga_store.model import UNFINISHED, SagaExecution, SagaLogEntry, SagaStatus
from saga_store.remedies import show
from saga_store.retention_model import SagaArchive
from saga_store.retention_storage import Hold
from saga_store.shard_records import ShardRecord
from saga_store.validation import decode_context
from saga_store.write import Claim, Lease, Outcome, Settlement, Write
from saga_store.write_ids import leads_to

# As many ids of its last writes a row keeps.
_MOST_RECENT_WRITES = 32
FOR_EVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Row:
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
    archived_at: datetime | None = None
    retain_until: datetime | None = None

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
    """What several storages and sessions share: the tables, the sequence, the row locks and the clock.

    Args:
        clock: The database's clock, returning aware datetimes; a test may pass one that it can move.
    """

    def __init__(self, *, clock: Callable[[], datetime] = _now) -> None:
        self._clock = clock
        self._rows: dict[UUID, Row] = {}
        self._logs: dict[UUID, list[SagaLogEntry]] = {}
        self._sequence = itertools.count(1)
        self._archives = dict[UUID, SagaArchive]()
        self._shard_records = list[ShardRecord]()
        self._archiver: str | None = None
        self._holders: dict[UUID, MemorySession] = {}
        self._waiters: dict[UUID, deque[asyncio.Future[None]]] = {}

    def count_rows(self) -> tuple[int, int]:
        """Return how many sagas and how many log entries are committed."""
        return len(self._rows), sum(len(log) for log in self._logs.values())

    def archived(self, row: Row) -> SagaArchivedError:
        """Return the error that this row is a stub."""
        assert row.archived_at is not None  # noqa: S101 - whoever asks has seen that
        found = (archive.uri for archive in self._archives.values() if archive.archived_at == row.archived_at)
        return SagaArchivedError(row.id, next(found, None), row.archived_at)

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
        if not isinstance(database, MemoryDatabase):
            raise TypeError(f"MemorySession takes a MemoryDatabase, not {show(database)}; make one, and share it")
        self._database = database
        self._rows: dict[UUID, Row] = {}
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

    def _row(self, saga_id: UUID) -> Row | None:
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

    async def _apply(self, write: Write) -> Outcome:  # noqa: PLR0911 - an outcome a line, as SQL would tell them apart
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
        row = self._row(write.saga_id)
        if row is None:  # it was a stub, and has been forgotten meanwhile
            self._unlock(write.saga_id)
            return SagaNotFoundError(write.saga_id)
        if row.archived_at is not None:
            return _recognised(row, write, self._database.archived(row))
        if write.write_id in row.recent_writes or write.expected_version not in (None, row.version):
            refusal = SagaConcurrencyError(row.id, write.expected_version or 0, row.version)
            return _recognised(row, write, refusal)
        taker = write.lease and write.lease.owner
        if taker and row.lease_owner and row.lease_expires_at and row.is_leased(now) and taker != row.lease_owner:
            return SagaLeasedError(write.saga_id, row.lease_owner, row.lease_expires_at)
        return self._update(row, write, now)

    def _claim(self, claim: Claim) -> list[Row]:
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
            for row in sorted(free, key=by_urgency)[: claim.limit]
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
        if row is not None and row.archived_at is not None:
            raise self._database.archived(row)
        if row is not None:
            settlement.check_version(row.version)
        doubts = in_doubt(self._history(saga_id))
        started = next((entry for entry in doubts if entry.id == settlement.entry_id), None)
        if row is None or started is None:
            raise settlement.refusal()
        lane = started.step_name, started.action
        last = max(entry.id for entry in doubts if (entry.step_name, entry.action) == lane)
        if last != started.id:
            raise settlement.refusal(later=last)
        before = {
            "status": row.status.value,
            "recovery_attempts": row.recovery_attempts,
            "lease_owner": row.lease_owner,
        }
        steps = settlement.steps(started.step_name, started.action, before)
        self._update(row, Write(saga_id, lease=Lease(), steps=steps), self._database._clock())

    async def _hold(self, hold: Hold) -> None:
        row = self._row(hold.saga_id)
        if row is not None:
            await self._lock(hold.saga_id)
            row = self._row(hold.saga_id)
        if row is None:
            raise SagaNotFoundError(hold.saga_id)
        if row.archived_at is not None:
            raise self._database.archived(row)
        now = self._database._clock()
        held_until = None if row.retain_until is None else written(row.retain_until)
        hold.check(held_until, now)
        before = {
            "status": row.status.value,
            "recovery_attempts": row.recovery_attempts,
            "lease_owner": row.lease_owner,
            "retain_until": held_until,
        }
        until = None if hold.releases else hold.until or FOR_EVER
        step = hold.step(before)
        self._store(replace(row, retain_until=until), Write(row.id, steps=(step,)), now)

    def _views(self) -> MemoryViews:
        rows = (self._database._rows | self._rows).values()
        archives = tuple(self._database._archives.values())
        return MemoryViews(list(rows), self._history, self._database._clock(), archives)

    def _unleased(self, name: str | None, now: datetime) -> list[Row]:
        rows = (self._database._rows | self._rows).values()
        return [row for row in rows if row.status in UNFINISHED and name in (None, row.name) and not row.is_leased(now)]

    def _insert(self, write: Write, now: datetime) -> int:
        assert write.name is not None  # noqa: S101 - tells mypy what `creates` means
        row = Row(
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

    def _update(self, row: Row, write: Write, now: datetime) -> int:
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

    def _store(self, row: Row, write: Write, now: datetime) -> int:
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


def written(moment: datetime) -> str:
    return "infinity" if moment == FOR_EVER else moment.isoformat()


def _recognised(row: Row, write: Write, refusal: SagaStoreError) -> Outcome:
    return leads_to(write) if write.write_id in row.recent_writes else refusal


def _with_lease(row: Row, write: Write, now: datetime) -> Row:
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


def by_urgency(row: Row) -> tuple[int, datetime, UUID]:
    return row.recovery_attempts, row.updated_at, row.id
