"""Puts sagas back: into their stubs, or as new rows, in one transaction."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from saga_store.model import SagaLogEntry
from saga_store.retention_model import ExpiredSaga, Restored, SagaMark, SagaRecord
from saga_store.retention_storage import same_content
from saga_store.sqlalchemy import retention_sql as sql
from saga_store.sqlalchemy.binds import Transaction
from saga_store.sqlalchemy.retention_reading import read_sagas
from saga_store.sqlalchemy.wire import read_moment, read_text
from saga_store.sqlalchemy.write_parameters import ids_as_text, unless_empty

_MOST_ENTRIES_AT_ONCE = 5000
_MOST_BYTES_AT_ONCE = 2**22
# Of a context; a longer one goes in pieces, each of which has the server write all of them again.
_MOST_CHARACTERS = 2**23


async def restore(
    transaction: Transaction, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
) -> list[Restored]:
    """Return what came of each record, in their order."""
    await transaction.execute(sql.PROBES, {})
    keep = {"keep_for": keep_for.total_seconds()}
    outcomes: dict[UUID, Restored] = {}
    left = sorted(records, key=lambda record: record.id.int)
    # Somebody may create a saga that is missing, or forget a stub, between two statements.
    while left:
        for some in _batches(left):
            rows = await transaction.execute(sql.ADD_ROWS, keep | _of_records(some))
            added = {saga_id.int for (saga_id,) in rows}
            new = [record for record in some if record.id.int in added]
            await _add_contexts(transaction, new)
            await _add_entries(transaction, new, keeps_ids=False)
            outcomes |= dict.fromkeys([record.id for record in new], Restored.RESTORED)
        left = [record for record in left if record.id not in outcomes]
        if left:
            outcomes |= await _restore_existing(transaction, left, archive_id, keep)
            left = [record for record in left if record.id not in outcomes]
    return [outcomes[record.id] for record in records]


async def _restore_existing(
    transaction: Transaction, records: Sequence[SagaRecord], archive_id: UUID | None, keep: dict[str, float]
) -> dict[UUID, Restored]:
    asked = {"saga_ids": ids_as_text([record.id for record in records])}
    await transaction.execute(sql.LOCK_ROWS, asked)
    found = {row[0].int: row for row in await transaction.execute(sql.LOCKED_ROWS, asked)}
    outcomes: dict[UUID, Restored] = {}
    stubs: list[SagaRecord] = []
    for record in records:
        row = found.get(record.id.int)
        if row is None:
            continue
        *_, is_stub, entries, size, archived_in = row
        is_elsewhere = archive_id is not None and archived_in is not None and archived_in.int != archive_id.int
        if is_stub and _is_of(row, record) and not is_elsewhere:
            stubs.append(record)
        elif is_stub:
            outcomes[record.id] = Restored.OTHER
        else:
            is_same = await _is_same(transaction, record, entries, size)
            outcomes[record.id] = Restored.SAME if is_same else Restored.OTHER
    for some in _batches(stubs):
        are_free = [await _ids_are_free(transaction, record) for record in some]
        kept = [record for record, is_free in zip(some, are_free, strict=True) if is_free]
        # What came late to a history has to come after what is restored.
        others = [
            record
            for record, is_free in zip(some, are_free, strict=True)
            if not is_free and not found[record.id.int][5]
        ]
        outcomes |= dict.fromkeys([record.id for record in some], Restored.OTHER)
        back = kept + others
        if back:
            await transaction.execute(sql.FILL_STUBS, keep | _of_records(back))
            await _add_contexts(transaction, back)
            await _add_entries(transaction, kept, keeps_ids=True)
            await _add_entries(transaction, others, keeps_ids=False)
        outcomes |= dict.fromkeys([record.id for record in back], Restored.RESTORED)
    return outcomes


def _is_of(row: Sequence[Any], record: SagaRecord) -> bool:
    """Whether a stub is that of the record."""
    _, name, version, created_at, *_ = row
    try:
        return (read_text(name), version, read_moment(created_at)) == (
            record.name,
            record.version,
            record.created_at,
        )
    except ValueError:
        return False


async def _ids_are_free(transaction: Transaction, record: SagaRecord) -> bool:
    if not record.entries:
        return True
    ids = ",".join([str(entry.id) for entry in record.entries])
    [(last_drawn, is_taken)] = await transaction.execute(sql.FREE_IDS, {"entry_ids": ids})
    return last_drawn is not None and record.entries[-1].id <= last_drawn and not is_taken


async def _is_same(transaction: Transaction, record: SagaRecord, entries: int, size: int) -> bool:
    if entries != len(record.entries) or size != len(record.context.encode()):
        return False
    asked = ExpiredSaga(
        SagaMark(record.id, record.version, entries, 0),
        record.name,
        record.status,
        record.created_at,
        record.updated_at,
        size,
        timedelta(),
    )
    async for reading in read_sagas(transaction.execute, [asked]):
        position = 0
        async for piece in reading.context():
            if not record.context.startswith(piece, position):
                return False
            position += len(piece)
        return position == len(record.context) and same_content(record, await reading.rest(record.context))
    return False


async def _add_contexts(transaction: Transaction, records: Sequence[SagaRecord]) -> None:
    """Put in what ``_of_records`` left out."""
    for record in records:
        if len(record.context) > _MOST_CHARACTERS:
            asked = {"saga_id": str(record.id)}
            for start in range(0, len(record.context), _MOST_CHARACTERS):
                piece = record.context[start : start + _MOST_CHARACTERS]
                await transaction.execute(sql.APPEND_TO_CONTEXT, asked | {"piece": piece})
            await transaction.execute(sql.END_CONTEXT, asked)


async def _add_entries(transaction: Transaction, records: Sequence[SagaRecord], *, keeps_ids: bool) -> None:
    for entries in _pages(records):
        parameters = {
            "saga_ids": ids_as_text([entry.saga_id for entry in entries]),
            "entry_ids": ",".join([str(entry.id) for entry in entries]) if keeps_ids else None,
            "step_names": [entry.step_name for entry in entries],
            "actions": ",".join([entry.action for entry in entries]),
            "statuses": ",".join([entry.status.value for entry in entries]),
            "details": unless_empty([entry.details for entry in entries]),
            "created": ",".join([_written(entry.created_at) for entry in entries]),
        }
        await transaction.execute(sql.ADD_ENTRIES_WITH_IDS if keeps_ids else sql.ADD_ENTRIES, parameters)


def _pages(records: Sequence[SagaRecord]) -> Iterator[list[SagaLogEntry]]:
    page: list[SagaLogEntry] = []
    size = 0
    for record in records:
        for entry in record.entries:
            if page and (len(page) >= _MOST_ENTRIES_AT_ONCE or size > _MOST_BYTES_AT_ONCE):
                yield page
                page, size = [], 0
            # It goes by the record's id, whatever the entry says.
            page.append(
                SagaLogEntry(
                    entry.id,
                    record.id,
                    entry.step_name,
                    entry.action,
                    entry.status,
                    entry.details,
                    entry.created_at,
                )
            )
            size += len(entry.details or "")
    if page:
        yield page


def _batches(records: Sequence[SagaRecord]) -> Iterator[list[SagaRecord]]:
    """Put together what is sent at once; a big context goes alone."""
    batch: list[SagaRecord] = []
    size = 0
    for record in records:
        if batch and size + len(record.context) > _MOST_BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record.context)
    if batch:
        yield batch


def _of_records(records: Sequence[SagaRecord]) -> dict[str, object]:
    return {
        "saga_ids": ids_as_text([record.id for record in records]),
        "names": [record.name for record in records],
        "statuses": ",".join([record.status.value for record in records]),
        "contexts": [record.context if len(record.context) <= _MOST_CHARACTERS else '""' for record in records],
        "versions": ",".join([str(record.version) for record in records]),
        "attempts": ",".join([str(record.recovery_attempts) for record in records]),
        "created": ",".join([_written(record.created_at) for record in records]),
        "updated": ",".join([_written(record.updated_at) for record in records]),
    }


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()
