"""Lets sagas go and takes them back, by the statements of ``retention_sql``, and keeps the ledger."""

import abc
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID

from saga_store.errors import (
    ArchiverBusyError,
    SagaArchivedError,
    SagaNotFoundError,
    SagaStoreError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.inspection import Cursor, read_cursor
from saga_store.model import SagaStatus
from saga_store.retention_model import (
    ArchivePage,
    ArchiveState,
    ArchivingTurn,
    ExpiredPage,
    ExpiredSaga,
    Restored,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaReading,
    SagaRecord,
    SagaStub,
    StubsMade,
)
from saga_store.retention_storage import Change, CheckedSnapshot, Hold, Terms
from saga_store.sqlalchemy import retention_sql as sql
from saga_store.sqlalchemy.binds import Transaction
from saga_store.sqlalchemy.execution import Executor, Retries
from saga_store.sqlalchemy.pooled import Attempt
from saga_store.sqlalchemy.read_sql import ARCHIVE_OF, MAY_READ_LEDGER
from saga_store.sqlalchemy.restoring import restore
from saga_store.sqlalchemy.retention_reading import Run, read_sagas
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import Parameters, Rows, lasting, read_text
from saga_store.sqlalchemy.write_parameters import ids_as_text
from saga_store.storage import SagaStorage

_T = TypeVar("_T")
_logger = logging.getLogger("saga_store")
_FOREIGN_KEY = "23503"
# What goes on for longer may be missed by the lag, and so may what comes after so many pages of what isn't due.
_LONG_SAGA = timedelta(days=1)
_PAGES_OF_LAG = 10


def as_moment(written: str) -> datetime:
    """Read a time in UTC; ValueError if Python has no such time."""
    return datetime.fromisoformat(written).replace(tzinfo=UTC)


def as_written(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()


class KeepingStorage(SagaStorage):
    """The part of the storage that lets sagas go and takes them back."""

    @abc.abstractmethod
    def _executor(self, *, writes: bool) -> Executor:
        """Decide where a call goes, in its caller's context."""

    async def _check_here(self, saga_id: UUID, archived_at: bytes | None) -> None:
        """Raise if this is the stub of a saga that was archived then."""
        if archived_at is not None:
            raise await self._with_archive(SagaArchivedError(saga_id, None, lasting(archived_at)))

    async def _with_archive(self, error: SagaArchivedError) -> SagaArchivedError:
        executor = self._executor(writes=False)
        try:
            # Who may not read the ledger would lose a transaction of their own by trying.
            [(may_read,)] = await executor.execute(MAY_READ_LEDGER, {})
            rows = await executor.execute(ARCHIVE_OF, {"saga_id": error.saga_id}) if may_read else ()
        except SagaStoreError:
            return error
        uri = rows[0][0] if rows else None
        return error if uri is None else SagaArchivedError(error.saga_id, read_text(uri), error.archived_at)

    async def _naming_archive(self, call: Awaitable[_T]) -> _T:
        """Await what may find a stub, in a transaction of which nothing is left then."""
        try:
            return await call
        except SagaArchivedError as exc:
            raise await self._with_archive(exc) from None

    async def _hold(self, hold: Hold) -> None:
        async def work(transaction: Transaction, _: Attempt) -> None:
            found = await _answers(transaction, sql.LOCK_TO_HOLD, {"saga_id": str(hold.saga_id)})
            if not found:
                raise SagaNotFoundError(hold.saga_id)
            [(status, attempts, owner, held_until, archived_at, now)] = found
            if archived_at is not None:
                raise SagaArchivedError(hold.saga_id, None, as_moment(archived_at))
            hold.check(held_until, as_moment(now))
            step = hold.step(
                {
                    "status": status,
                    "recovery_attempts": attempts,
                    "lease_owner": owner,
                    "retain_until": None if held_until is None else _zoned(held_until),
                }
            )
            until = None if hold.releases else "infinity" if hold.until is None else as_written(hold.until)
            parameters = {
                "saga_id": str(hold.saga_id),
                "until": until,
                "step_name": step.step_name,
                "details": step.details,
            }
            await transaction.execute(sql.HOLD, parameters)

        with_lock = self._executor(writes=True).transact(work, if_lost=UnknownOutcomeError(hold.saga_id))
        await self._naming_archive(with_lock)

    @asynccontextmanager
    async def _archiving(self, by: str) -> AsyncIterator[ArchivingTurn]:
        async with self._executor(writes=True).open() as run:
            [(is_mine, _)] = await run(sql.TAKE_TURN, {})
            if not is_mine:
                raise ArchiverBusyError(await _holder(run))
            _logger.info("it is the turn of %s to archive", by)
            yield _Turn(run)

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[RetentionSnapshot]:
        async with self._executor(writes=False).open(snapshot=True) as run:
            yield _Snapshot(run)

    async def _add_archive(self, archive_id: UUID, uri: str | None, by: str) -> SagaArchive:
        parameters = {"archive_id": str(archive_id), "uri": uri, "archived_by": by}
        # Twice is as good as once: whoever has the id by then is returned.
        rows = await self._executor(writes=True).execute(sql.ADD_ARCHIVE, parameters)
        found = _archive(*json.loads(rows[0][0])) if rows else await self._fetch_archive(archive_id)
        return cast("SagaArchive", found)  # no line is ever deleted

    async def _change_archive(self, change: Change) -> SagaArchive | None:
        parameters: dict[str, object] = dict.fromkeys(("sha256", "sagas", "entries", "bytes", "watermark", "error"))
        parameters |= dict(change.values)
        parameters |= {
            "archive_id": str(change.archive_id),
            "state": change.after.value,
            "states": ",".join(sorted(change.before)),
        }

        async def work(transaction: Transaction, _: Attempt) -> list[list[Any]]:
            await transaction.execute(sql.LOCK_LEDGER, {})
            return await _answers(transaction, sql.CHANGE_ARCHIVE, parameters)

        rows = await self._again(work)
        return _archive(*rows[0]) if rows else None

    async def _fetch_archive(self, archive_id: UUID) -> SagaArchive | None:
        rows = await self._read(sql.FETCH_ARCHIVE, {"archive_id": str(archive_id)})
        return _archive(*rows[0]) if rows else None

    async def _fetch_archives(self, states: Sequence[ArchiveState], limit: int, after: Cursor | None) -> ArchivePage:
        parameters: dict[str, object] = {
            "states": ",".join(states) or None,
            "limit": limit + 1,
        }
        if after is not None:
            parameters |= {"after_created_at": after.created_at, "after_id": str(after.id)}
        rows = await self._read(sql.ARCHIVES if after is None else sql.ARCHIVES_AFTER, parameters)
        found = [_archive(*row) for row in rows[:limit]]
        last = rows[limit - 1] if len(rows) > limit else None
        return ArchivePage(found, None if last is None else str(Cursor(last[4], UUID(last[0]))))

    async def _fetch_stub(self, saga_id: UUID) -> SagaStub | None:
        rows = await self._read(sql.STUB, {"saga_id": str(saga_id)})
        if not rows:
            return None
        [(name, status, version, created_at, archived_at, archive_id)] = rows
        archive = None if archive_id is None else await self._fetch_archive(UUID(archive_id))
        return SagaStub(
            saga_id, name, SagaStatus(status), version, as_moment(created_at), as_moment(archived_at), archive
        )

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        archive = {"archive_id": str(archive_id)}

        async def work(transaction: Transaction, _: Attempt) -> StubsMade | None:
            await transaction.execute(sql.PROBES, {})
            if not await transaction.execute(sql.LOCK_ARCHIVE, archive):
                return None
            [(may_delete,)] = await transaction.execute(sql.MAY_DELETE, {})
            if may_delete:
                rows = await transaction.execute(sql.LOCK_MARKED, archive | _of_marks(marks))
                locked = {saga_id.int for (saga_id,) in rows}
                mine = [mark for mark in marks if mark.id.int in locked]
                made = _ids(await transaction.execute(sql.MAKE_STUBS, archive | _of_marks(mine)) if mine else ())
            else:
                made = _ids(await transaction.execute(sql.HAVE_STUBS_MADE, archive | _of_marks(marks)))
            done = set(made)
            left = [mark.id for mark in marks if mark.id not in done]
            asked = archive | {"saga_ids": ids_as_text(left)}
            return StubsMade(made, _ids(await transaction.execute(sql.STUBS_OF, asked) if left else ()))

        return await self._again(work)

    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        async def work(transaction: Transaction, _: Attempt) -> list[Restored]:
            return await restore(transaction, records, archive_id, keep_for)

        return await self._again(work)

    async def _forget(self, older_than: timedelta, limit: int, after: Cursor | None) -> tuple[int, Cursor | None]:
        age = {"older_than": older_than.total_seconds()}
        parameters: dict[str, object] = {**age, "limit": limit}
        if after is not None:
            parameters |= {"after_created_at": after.created_at, "after_id": str(after.id)}
        (seen, last), *rows = await self._read(sql.FORGETTABLE if after is None else sql.FORGETTABLE_AFTER, parameters)
        forgotten = await self._delete([UUID(saga_id) for saga_id, _ in rows], age)
        if len(rows) == limit:
            return forgotten, Cursor(rows[-1][1], UUID(rows[-1][0]))
        return forgotten, Cursor(last[0], UUID(last[1])) if seen == sql.SEEN_AT_ONCE else None

    async def _fetch_lag(self, terms: Terms) -> timedelta:
        """Return for how long the first saga that should be gone has been so, of those that were looked at.

        These are the oldest, and those from where the last walk ended: of one that came to its end it is known when
        that was, so whatever was old enough then has been met, if that walk was by this policy.
        """
        if terms.least is None:
            return timedelta()
        starts = [None, *await self._walked_to(terms)]
        return max([await self._first_overdue(terms, start) for start in dict.fromkeys(starts)])

    async def _first_overdue(self, terms: Terms, after: Cursor | None) -> timedelta:
        parameters = _of_terms(terms) | {"limit": 1}
        for _ in range(_PAGES_OF_LAG):
            if after is not None:
                parameters |= {"after_created_at": after.created_at, "after_id": str(after.id)}
            (seen, last), *found = await self._read(sql.EXPIRED if after is None else sql.EXPIRED_AFTER, parameters)
            if found:
                return timedelta(seconds=found[0][-1])
            if seen < sql.SEEN_AT_ONCE:
                break
            after = Cursor(last[0], UUID(last[1]))
        return timedelta()

    async def _walked_to(self, terms: Terms) -> list[Cursor]:
        """Return from where on sagas may be due that the last walk didn't meet: for each term its own place.

        A saga is due by when it ended, and a walk goes by when they were created: so it is looked at from there, and
        from so much before as a saga may have taken.
        """
        archives = (await self._fetch_archives([ArchiveState.VERIFIED, ArchiveState.REMOVED], 1, None)).archives
        if not archives:
            return []
        [last] = archives
        if last.watermark is not None or last.archived_at is None:
            watermark = read_cursor(last.watermark)
            return [watermark] if watermark else []
        return [
            Cursor(as_written(last.archived_at - timedelta(seconds=term) - took), UUID(int=0))
            for term in terms.finite
            for took in (timedelta(), _LONG_SAGA)
        ]

    async def _delete(self, saga_ids: Sequence[UUID], age: Parameters) -> int:
        """Delete stubs, but for those that are referred to: by an application's table, or by entries that came late."""
        if not saga_ids:
            return 0
        parameters = {**age, "saga_ids": ids_as_text(saga_ids)}
        executor = self._executor(writes=True)
        [(may_delete,)] = await executor.execute(sql.MAY_DELETE, {})
        try:
            # Twice is as good as once, but for the count.
            return len(await executor.execute(sql.FORGET if may_delete else sql.HAVE_FORGOTTEN, parameters))
        except StorageUnavailableError as exc:
            if exc.sqlstate != _FOREIGN_KEY:
                raise
        if len(saga_ids) == 1:
            return 0
        middle = len(saga_ids) // 2
        return await self._delete(saga_ids[:middle], age) + await self._delete(saga_ids[middle:], age)

    async def _read(self, statement: Statement, parameters: Parameters) -> list[list[Any]]:
        rows = await self._executor(writes=False).execute(statement, parameters)
        return [json.loads(answer) for (answer,) in rows]

    async def _again(self, work: Callable[[Transaction, Attempt], Awaitable[_T]]) -> _T:
        """Do in one transaction what may be done twice, and once more if the answer to it was lost."""
        retries: Retries | None = None
        while True:
            executor = self._executor(writes=True)
            try:
                return await executor.transact(work, if_lost=UnknownOutcomeError(None))
            except UnknownOutcomeError:
                retries = retries or Retries(executor.retry_for)
                if not await retries.pause():
                    raise


class _Turn(ArchivingTurn):
    def __init__(self, run: Run) -> None:
        self._run = run

    async def check(self) -> None:
        await self._run(sql.ALIVE, {})


@dataclass(frozen=True, slots=True)
class _Snapshot(CheckedSnapshot):
    run: Run

    async def _find(self, terms: Terms, after: Cursor | None, limit: int) -> ExpiredPage:
        parameters = _of_terms(terms) | {"limit": limit}
        if after is not None:
            parameters |= {"after_created_at": after.created_at, "after_id": str(after.id)}
        rows = await self.run(sql.EXPIRED if after is None else sql.EXPIRED_AFTER, parameters)
        (seen, last), *found = (json.loads(answer) for (answer,) in rows)
        sagas: list[ExpiredSaga] = []
        unreadable: list[UUID] = []
        for row in found:
            try:
                sagas.append(_expired(*row))
            except (ValueError, OverflowError):
                unreadable.append(UUID(row[0]))
        goes_on = None
        if len(found) == limit:
            goes_on = str(Cursor(found[-1][6], UUID(found[-1][0])))
        elif seen == sql.SEEN_AT_ONCE:
            goes_on = str(Cursor(last[0], UUID(last[1])))
        return ExpiredPage(sagas, goes_on, tuple(unreadable))

    def read(self, sagas: Sequence[ExpiredSaga]) -> AsyncIterator[SagaReading]:
        return read_sagas(self.run, sagas)


def _expired(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    saga_id: str,
    version: int,
    entries: int,
    last_id: int,
    name: str,
    status: str,
    created_at: str,
    updated_at: str,
    size: int,
    overdue: float,
) -> ExpiredSaga:
    return ExpiredSaga(
        SagaMark(UUID(saga_id), version, entries, last_id),
        name,
        SagaStatus(status),
        as_moment(created_at),
        as_moment(updated_at),
        int(size),
        timedelta(seconds=overdue),
    )


def _archive(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    archive_id: str,
    uri: str | None,
    state: str,
    by: str,
    begun_at: str,
    archived_at: str | None,
    removed_at: str | None,
    sha256: str | None,
    sagas: int,
    entries: int,
    size: int,
    removed: int,
    watermark: str | None,
    error: str | None,
) -> SagaArchive:
    return SagaArchive(
        UUID(archive_id),
        uri,
        ArchiveState(state),
        by,
        as_moment(begun_at),
        None if archived_at is None else as_moment(archived_at),
        None if removed_at is None else as_moment(removed_at),
        sha256,
        sagas,
        entries,
        size,
        removed,
        watermark,
        error,
    )


async def _answers(transaction: Transaction, statement: Statement, parameters: Parameters) -> list[list[Any]]:
    return [json.loads(answer) for (answer,) in await transaction.execute(statement, parameters)]


async def _holder(run: Run) -> str:
    rows = await run(sql.TURN_HOLDER, {})
    if not rows:
        return "it has just finished"
    pid, application = rows[0]
    named = read_text(application) if application else ""
    return f"PostgreSQL's process {pid}{f', {named}' if named else ''}"


def _ids(rows: Rows) -> list[UUID]:
    return [UUID(int=saga_id.int) for (saga_id,) in rows]  # asyncpg's own UUID class stays inside


def _of_terms(terms: Terms) -> dict[str, object]:
    return {
        "names": list(terms.names) or None,
        "terms": ",".join("" if term is None else str(term) for term in terms.names.values()),
        "completed": terms.completed,
        "failed": terms.failed,
        "least": terms.least,
    }


def _of_marks(marks: Sequence[SagaMark]) -> dict[str, object]:
    return {
        "saga_ids": ids_as_text([mark.id for mark in marks]),
        "versions": ",".join([str(mark.version) for mark in marks]),
        "entries": ",".join([str(mark.entries) for mark in marks]),
        "last_ids": ",".join([str(mark.last_entry_id) for mark in marks]),
    }


def _zoned(written: str) -> str:
    return written if written == "infinity" else as_moment(written).isoformat()
