"""The twin's part that lets sagas go and takes them back."""

import abc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from saga_store.errors import ArchiverBusyError
from saga_store.inspection import Cursor
from saga_store.memory_database import MemoryDatabase, MemorySession, Row
from saga_store.model import UNFINISHED, SagaLogEntry
from saga_store.retention_model import (
    ArchivePage,
    ArchiveState,
    ArchivingTurn,
    ExpiredPage,
    ExpiredSaga,
    Restored,
    RetentionSnapshot,
    SagaArchive,
    SagaHead,
    SagaMark,
    SagaReading,
    SagaRecord,
    SagaStub,
    StubsMade,
)
from saga_store.retention_storage import Change, CheckedSnapshot, Hold, Terms, same_content
from saga_store.storage import SagaStorage
from saga_store.validation import decode_context

_LONGEST_PIECE = 2**20
_PAGE_ENTRIES = 1000


class MemoryKeepingStorage(SagaStorage):
    """The part of the storage that lets sagas go and takes them back."""

    _bind: MemoryDatabase | MemorySession

    @abc.abstractmethod
    def _view(self) -> MemorySession:
        """Return the session, or one that sees what is committed."""

    @property
    def _database(self) -> MemoryDatabase:
        return self._view()._database

    async def _hold(self, hold: Hold) -> None:
        if isinstance(self._bind, MemorySession):
            await self._bind._hold(hold)
            return
        async with MemorySession(self._bind) as session:
            await session._hold(hold)
            await session.commit()

    @asynccontextmanager
    async def _archiving(self, by: str) -> AsyncIterator[ArchivingTurn]:
        if self._database._archiver is not None:
            raise ArchiverBusyError(self._database._archiver)
        self._database._archiver = by
        try:
            yield _Turn()
        finally:
            self._database._archiver = None

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[RetentionSnapshot]:
        database = self._database
        logs = {saga_id: tuple(log) for saga_id, log in database._logs.items()}
        yield _Snapshot(dict(database._rows), logs, database._clock())

    async def _add_archive(self, archive_id: UUID, uri: str | None, by: str) -> SagaArchive:
        new = SagaArchive(archive_id, uri, ArchiveState.WRITING, by, self._database._clock())
        return self._database._archives.setdefault(archive_id, new)

    async def _change_archive(self, change: Change) -> SagaArchive | None:
        archives = self._database._archives
        archive = archives.get(change.archive_id)
        if archive is None or archive.state not in change.before:
            return None
        now = self._database._clock()
        values: dict[str, Any] = dict(change.values)
        if change.after is ArchiveState.VERIFIED:
            last = max((one.archived_at for one in archives.values() if one.archived_at), default=None)
            values["archived_at"] = now if last is None else max(now, last + timedelta(microseconds=1))
        if change.after is ArchiveState.REMOVED:
            values["removed_at"] = now
        archives[archive.id] = replace(archive, state=change.after, **values)
        return archives[archive.id]

    async def _fetch_archive(self, archive_id: UUID) -> SagaArchive | None:
        return self._database._archives.get(archive_id)

    async def _fetch_archives(self, states: Sequence[ArchiveState], limit: int, after: Cursor | None) -> ArchivePage:
        found = [archive for archive in self._database._archives.values() if not states or archive.state in states]
        found.sort(key=_begun, reverse=True)
        if after is not None:
            found = [archive for archive in found if _begun(archive) < _key(after)]
        page = found[:limit]
        return ArchivePage(page, str(_cursor(page[-1].begun_at, page[-1].id)) if len(found) > limit else None)

    async def _fetch_stub(self, saga_id: UUID) -> SagaStub | None:
        row = self._view()._row(saga_id)
        if row is None or row.archived_at is None:
            return None
        archives = self._database._archives.values()
        archive = next((archive for archive in archives if archive.archived_at == row.archived_at), None)
        return SagaStub(row.id, row.name, row.status, row.version, row.created_at, row.archived_at, archive)

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        database = self._database
        archive = database._archives.get(archive_id)
        if archive is None or archive.archived_at is None or archive.state is not ArchiveState.VERIFIED:
            return None
        now = database._clock()
        made: list[UUID] = []
        already: list[UUID] = []
        for mark in marks:
            row = database._rows.get(mark.id)
            if row is not None and row.archived_at == archive.archived_at:
                already.append(mark.id)
            elif (
                row is not None
                and mark.id not in database._holders  # SKIP LOCKED
                and may_go(row, now)
                and row.updated_at <= archive.archived_at
                and _mark(row, database._logs.get(mark.id, ())) == mark
            ):
                stub = replace(
                    row,
                    context="{}",
                    archived_at=archive.archived_at,
                    retain_until=None,
                    lease_owner=None,
                    lease_expires_at=None,
                )
                database._rows[mark.id] = stub
                database._logs.pop(mark.id, None)
                made.append(mark.id)
        database._archives[archive_id] = replace(archive, removed=archive.removed + len(made))
        return StubsMade(made, already)

    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        for record in records:
            decode_context(record.context)  # what isn't JSON is refused before anything is stored
        async with MemorySession(self._database) as session:
            for record in sorted(records, key=lambda record: record.id.int):
                await session._lock(record.id)
            until = self._database._clock() + keep_for if keep_for else None
            return [_restored(self._database, record, archive_id, until) for record in records]

    async def _forget(self, older_than: timedelta, limit: int, after: Cursor | None) -> tuple[int, Cursor | None]:
        database = self._database
        until = database._clock() - older_than
        stubs = [
            row
            for row in database._rows.values()
            if row.archived_at is not None
            and row.archived_at <= until
            and row.id not in database._holders
            and not database._logs.get(row.id)
            and (after is None or _created(row) > _key(after))
        ]
        stubs.sort(key=_created)
        gone = stubs[:limit]
        for row in gone:
            del database._rows[row.id]
        goes_on = len(stubs) > limit
        return len(gone), _cursor(gone[-1].created_at, gone[-1].id) if goes_on else None

    async def _fetch_lag(self, terms: Terms) -> timedelta:
        async with self._snapshot() as snapshot:
            assert isinstance(snapshot, _Snapshot)  # noqa: S101 - it is ours
            return max((saga.expired_for for saga in snapshot.expired(terms)), default=timedelta())


class _Turn(ArchivingTurn):
    async def check(self) -> None:
        """Nothing takes it away."""


@dataclass(frozen=True, slots=True)
class _Snapshot(CheckedSnapshot):
    rows: dict[UUID, Row]
    logs: dict[UUID, tuple[SagaLogEntry, ...]]
    now: datetime

    def expired(self, terms: Terms) -> Iterator[ExpiredSaga]:
        for row in sorted(self.rows.values(), key=_created):
            kept = terms.seconds(row.name, row.status)
            unchanged = (self.now - row.updated_at).total_seconds()
            if may_go(row, self.now) and kept is not None and unchanged >= kept:
                log = self.logs.get(row.id, ())
                size = len(row.context.encode()) + sum(len((entry.details or "").encode()) for entry in log)
                yield ExpiredSaga(
                    _mark(row, log),
                    row.name,
                    row.status,
                    row.created_at,
                    row.updated_at,
                    size,
                    timedelta(seconds=unchanged - kept),
                )

    async def _find(self, terms: Terms, after: Cursor | None, limit: int) -> ExpiredPage:
        found = [saga for saga in self.expired(terms) if after is None or (saga.created_at, saga.mark.id) > _key(after)]
        page = found[:limit]
        return ExpiredPage(page, str(_cursor(page[-1].created_at, page[-1].mark.id)) if len(page) == limit else None)

    async def read(self, sagas: Sequence[ExpiredSaga]) -> AsyncIterator[SagaReading]:
        for saga in sagas:
            if saga.mark.id in self.rows:
                yield _Reading(self.rows[saga.mark.id], self.logs.get(saga.mark.id, ()))


class _Reading(SagaReading):
    def __init__(self, row: Row, log: Sequence[SagaLogEntry]) -> None:
        self.head = SagaHead(
            _mark(row, log), row.name, row.status, row.recovery_attempts, row.created_at, row.updated_at
        )
        self._context = row.context
        self._log = log

    async def context(self) -> AsyncIterator[str]:
        for start in range(0, len(self._context), _LONGEST_PIECE):
            yield self._context[start : start + _LONGEST_PIECE]

    async def entries(self) -> AsyncIterator[Sequence[SagaLogEntry]]:
        for start in range(0, len(self._log), _PAGE_ENTRIES):
            yield self._log[start : start + _PAGE_ENTRIES]


def may_go(row: Row, now: datetime) -> bool:
    """Whether a saga may be let go, if its time has come."""
    is_held = row.retain_until is not None and row.retain_until > now
    return row.status not in UNFINISHED and row.archived_at is None and not is_held and not row.is_leased(now)


def _restored(
    database: MemoryDatabase, record: SagaRecord, archive_id: UUID | None, until: datetime | None
) -> Restored:
    row, log = database._rows.get(record.id), database._logs.get(record.id, [])
    if row is not None and row.archived_at is None:
        return Restored.SAME if same_content(record, _record(row, log)) else Restored.OTHER
    if row is not None and (row.name, row.version, row.created_at) != (record.name, record.version, record.created_at):
        return Restored.OTHER
    if row is not None and archive_id is not None:
        of = [archive.id for archive in database._archives.values() if archive.archived_at == row.archived_at]
        if of and archive_id not in of:
            return Restored.OTHER
    # A stub's ids are free; elsewhere they may be those of others.
    entries = [
        replace(entry, saga_id=record.id, id=next(database._sequence) if row is None else entry.id)
        for entry in record.entries
    ]
    database._rows[record.id] = Row(
        record.id,
        record.name,
        record.status,
        record.context,
        record.version,
        record.recovery_attempts,
        None,
        None,
        record.created_at,
        record.updated_at,
        () if row is None else row.recent_writes,
        retain_until=until,
    )
    database._logs[record.id] = entries + log
    return Restored.RESTORED


def _record(row: Row, log: Sequence[SagaLogEntry]) -> SagaRecord:
    return SagaRecord(
        row.id,
        row.name,
        row.status,
        row.context,
        row.version,
        row.recovery_attempts,
        row.created_at,
        row.updated_at,
        log,
    )


def _mark(row: Row, log: Sequence[SagaLogEntry]) -> SagaMark:
    return SagaMark(row.id, row.version, len(log), log[-1].id if log else 0)


def _created(row: Row) -> tuple[datetime, UUID]:
    return row.created_at, row.id


def _begun(archive: SagaArchive) -> tuple[datetime, UUID]:
    return archive.begun_at, archive.id


def _cursor(moment: datetime, key: UUID) -> Cursor:
    return Cursor(moment.astimezone(UTC).replace(tzinfo=None).isoformat(), key)


def _key(cursor: Cursor) -> tuple[datetime, UUID]:
    return datetime.fromisoformat(cursor.created_at).replace(tzinfo=UTC), cursor.id
