"""Reads sagas whole for an archive: small ones many at once, and big ones piece by piece."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from saga_store.errors import SagaUnreadableError
from saga_store.model import SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.retention_model import ExpiredSaga, SagaHead, SagaMark, SagaReading
from saga_store.retention_storage import check_is_object
from saga_store.sqlalchemy import retention_sql as sql
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import Parameters, Rows, read_moment, read_text
from saga_store.sqlalchemy.write_parameters import ids_as_text
from saga_store.validation import valid_action, valid_count, valid_name

_logger = logging.getLogger("saga_store")

Run: TypeAlias = Callable[[Statement, Parameters], Awaitable[Rows]]
"""Runs a statement in a transaction that lasts."""

_MOST_AT_ONCE = 500
_MOST_BYTES_AT_ONCE = 2**22
_MOST_ENTRIES_AT_ONCE = 5000
_LONGEST_PIECE = 2**20
_BEFORE_ALL = -(2**63)


async def read_sagas(run: Run, sagas: Sequence[ExpiredSaga]) -> AsyncIterator[SagaReading]:
    """Yield the sagas in their order; those that Python can't hold are left out, and the log names them."""
    for group in _groups(sagas):
        if _is_big(group[0]):
            reading = await _open(run, group[0])
            if reading is not None:
                yield reading
            continue
        for small in await _read_many(run, group):
            yield small


def _is_big(saga: ExpiredSaga) -> bool:
    return saga.bytes > sql.SMALL_CONTEXT_BYTES or saga.mark.entries > sql.PAGE_ENTRIES


def _groups(sagas: Sequence[ExpiredSaga]) -> Iterator[list[ExpiredSaga]]:
    """Put together what is read at once; a big one comes alone."""
    group: list[ExpiredSaga] = []
    size = entries = 0
    for saga in sagas:
        is_full = (
            len(group) >= _MOST_AT_ONCE
            or size + saga.bytes > _MOST_BYTES_AT_ONCE
            or entries + saga.mark.entries > _MOST_ENTRIES_AT_ONCE
        )
        if group and (is_full or _is_big(saga) or _is_big(group[0])):
            yield group
            group, size, entries = [], 0, 0
        group.append(saga)
        size, entries = size + saga.bytes, entries + saga.mark.entries
    if group:
        yield group


class _Small(SagaReading):
    def __init__(self, head: SagaHead, context: str, entries: Sequence[SagaLogEntry]) -> None:
        self.head = head
        self._context = context
        self._entries = entries

    async def context(self) -> AsyncIterator[str]:
        yield self._context

    async def entries(self) -> AsyncIterator[Sequence[SagaLogEntry]]:
        if self._entries:
            yield self._entries


class _Big(SagaReading):
    def __init__(self, head: SagaHead, run: Run) -> None:
        self.head = head
        self._run = run

    async def context(self) -> AsyncIterator[str]:
        first = 1
        while True:
            asked = {"saga_id": str(self.head.mark.id), "first": first}
            [(sent,)] = await self._run(sql.CONTEXT_PIECE, asked)
            try:
                piece = read_text(sent)
                if first == 1:
                    check_is_object(piece)
            except ValueError as exc:
                raise _unreadable(self.head.mark.id, exc) from exc
            del sent
            for start in range(0, len(piece), _LONGEST_PIECE):
                yield piece[start : start + _LONGEST_PIECE]
            if len(piece) < sql.PIECE_CHARACTERS:
                return
            first += len(piece)

    async def entries(self) -> AsyncIterator[Sequence[SagaLogEntry]]:
        saga_id, after, left = self.head.mark.id, _BEFORE_ALL, self.head.mark.entries
        while left > 0:
            rows = await self._run(sql.ENTRIES_PAGE, {"saga_id": str(saga_id), "after": after})
            try:
                page = [_archivable(as_entry(saga_id, *row)) for row in rows]
            except ValueError as exc:
                raise _unreadable(saga_id, exc) from exc
            if not page:
                return
            after, left = page[-1].id, left - len(page)
            yield page


async def _open(run: Run, saga: ExpiredSaga) -> SagaReading | None:
    rows = await run(sql.ROWS, {"saga_ids": ids_as_text([saga.mark.id])})
    heads = [head for head in (_head(saga.mark, row) for row in rows) if head is not None]
    return _Big(heads[0], run) if heads else None


async def _read_many(run: Run, group: Sequence[ExpiredSaga]) -> list[SagaReading]:
    asked = {"saga_ids": ids_as_text([saga.mark.id for saga in group])}
    rows = await run(sql.ROWS, asked)
    histories: dict[int, list[Sequence[Any]]] = {}
    for saga_id, *entry in await run(sql.ENTRIES, asked):
        histories.setdefault(saga_id.int, []).append(entry)
    marks = {saga.mark.id.int: saga.mark for saga in group}
    found: list[SagaReading] = []
    for row in rows:
        mark = marks[row[0].int]
        head = _head(mark, row)
        if head is None:
            continue
        try:
            entries = [_archivable(as_entry(mark.id, *entry)) for entry in histories.get(mark.id.int, ())]
            context = read_text(row[7])
            check_is_object(context)
            found.append(_Small(head, context, entries))
        except ValueError as exc:
            _left_out(mark.id, exc)
    return found


def _head(mark: SagaMark, row: Sequence[Any]) -> SagaHead | None:
    _, name, status, version, attempts, created_at, updated_at, _ = row
    try:
        return SagaHead(
            SagaMark(mark.id, valid_count("version", version, least=1), mark.entries, mark.last_entry_id),
            valid_name("name", read_text(name)),
            SagaStatus(read_text(status)),
            valid_count("recovery_attempts", attempts),
            read_moment(created_at),
            read_moment(updated_at),
        )
    except ValueError as exc:
        _left_out(mark.id, exc)
        return None


def _unreadable(saga_id: UUID, exc: ValueError) -> SagaUnreadableError:
    _left_out(saga_id, exc)
    return SagaUnreadableError(saga_id, str(exc))


def _left_out(saga_id: UUID, exc: ValueError) -> None:
    _logger.warning("saga %s can't be read, and is left out: %s", saga_id, exc, extra={"saga_id": saga_id})


def _archivable(entry: SagaLogEntry) -> SagaLogEntry:
    """Return an entry; ValueError if an archive couldn't be read that has it."""
    valid_name("step_name", entry.step_name)
    if entry.id < 1:
        raise ValueError(f"entry {entry.id} has no id greater than zero")
    return entry


def as_entry(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statements
    saga_id: UUID, entry_id: int, step_name: bytes, action: bytes, status: bytes, details: bytes | None, at: bytes
) -> SagaLogEntry:
    """Read an entry; ValueError if Python can't hold it."""
    return SagaLogEntry(
        entry_id,
        saga_id,
        read_text(step_name),
        valid_action(read_text(action)),
        SagaStepStatus(read_text(status)),
        None if details is None else read_text(details),
        read_moment(at),
    )
