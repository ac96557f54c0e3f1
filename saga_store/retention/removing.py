"""Sagas removed from the database, in transactions so short that no writer waits long; with an archive, or without."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from uuid import UUID, uuid4

from saga_store.errors import UnknownOutcomeError
from saga_store.interface import IRetentionStorage
from saga_store.retention.reading import ledger_of
from saga_store.retention_model import MOST_MARKS, ArchiveState, Retention, SagaMark

# Rows, of sagas and of entries, that one transaction removes; and how long it may take, for who wants one waits.
_MOST_ROWS, _FEWEST_ROWS = 10_000, 200
_SLOW_SECONDS, _QUICK_SECONDS = 0.5, 0.2
_REPEATS = 3


async def make_stubs(
    storage: IRetentionStorage,
    archive_id: UUID,
    marks: Sequence[SagaMark],
    should_stop: Callable[[], bool],
    told: Callable[[int], None],
) -> bool:
    """Let go what hasn't changed, a few at a time; ``told`` how many have gone. False if it was stopped before all."""
    rows = _MOST_ROWS
    position = removed = 0
    while position < len(marks):
        if position and should_stop():
            return False
        chunk = _first(marks, position, rows)
        began = time.monotonic()
        removed += await _make_stubs(storage, archive_id, chunk)
        took = time.monotonic() - began
        position += len(chunk)
        if took > _SLOW_SECONDS:
            rows = max(rows // 2, _FEWEST_ROWS)
        elif took < _QUICK_SECONDS:
            rows = min(rows * 2, _MOST_ROWS)
        told(removed)
    return True


async def _make_stubs(storage: IRetentionStorage, archive_id: UUID, marks: Sequence[SagaMark]) -> int:
    for _ in range(_REPEATS):
        with suppress(UnknownOutcomeError):
            made = await storage.make_stubs(archive_id, marks)
            return len(made.made) + len(made.already)
    made = await storage.make_stubs(archive_id, marks)
    return len(made.made) + len(made.already)


def _first(marks: Sequence[SagaMark], position: int, rows: int) -> Sequence[SagaMark]:
    """Return the marks from there on that have no more rows than these together, and one at least."""
    end = position
    while end < len(marks) and end - position < MOST_MARKS:
        rows -= 1 + marks[end].entries
        if rows < 0 and end > position:
            break
        end += 1
    return marks[position:end]


async def purge(
    storage: IRetentionStorage,
    policy: Retention,
    *,
    by: str,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[int], None] = lambda _: None,
) -> int:
    """Remove what a policy lets go for good, archived nowhere; return how many sagas became stubs.

    Raises:
        ArchiverBusyError: An archiver is at work on this database.
        InvalidSagaDataError: The storage joins a transaction; something else is impossible.
    """
    removed = 0
    async with storage.archiving(by=by) as turn:
        await end_purges(storage)
        after = None
        while not should_stop():
            await turn.check()
            async with storage.snapshot() as snapshot:
                page = await snapshot.find_expired(policy, after=after, limit=MOST_MARKS)
            after = page.after
            if page.sagas:
                marks = [saga.mark for saga in page.sagas]
                row = await storage.begin_archive(uuid4(), uri=None, by=by)
                await storage.verify_archive(
                    row.id,
                    sha256=None,
                    sagas=len(marks),
                    entries=sum(mark.entries for mark in marks),
                    bytes=0,
                    watermark=None,
                )
                before = removed
                await make_stubs(storage, row.id, marks, should_stop, lambda made: told(before + made))  # noqa: B023 - called meanwhile
                removed = before + (await storage.finish_archive(row.id)).removed
            if after is None:
                break
    return removed


async def end_purges(storage: IRetentionStorage) -> None:
    """End in the ledger what purges left that were killed; whoever has the turn knows that none is at work."""
    for row in await ledger_of(storage, ArchiveState.WRITING, ArchiveState.VERIFIED):
        if row.uri is None and row.state is ArchiveState.WRITING:
            await storage.fail_archive(row.id, error="it was ended before it removed anything")
        elif row.uri is None:
            await storage.finish_archive(row.id)


async def forget_stubs(
    storage: IRetentionStorage, older_than: timedelta, should_stop: Callable[[], bool], told: Callable[[int], None]
) -> bool:
    """Delete the stubs that are older, a thousand at a time; ``told`` how many are gone. False if it was stopped."""
    if should_stop():
        return False
    forgotten = 0
    async for gone in storage.forget_all_stubs(older_than=older_than):
        forgotten += gone
        told(forgotten)
        if should_stop():
            return False
    return True
