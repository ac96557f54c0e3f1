"""The twin's views: what ``IInspectionStorage`` tells, worked out from rows and histories in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

from saga_store.inspection import (
    FINISHED_WINDOW,
    HISTORY_SEEN,
    INTERVENTION,
    MOST_COUNTED,
    SAGAS_SEEN,
    Cursor,
    InterventionPage,
    SagaCondition,
    SagaCount,
    SagaFigures,
    SagaPage,
    SagaQuery,
    SagaSummary,
    digest,
    history_seen,
    id_range,
    intervention,
    is_equal_json,
    is_windowed,
    kinds,
    record_prefix,
)
from saga_store.model import UNFINISHED, SagaLogEntry, SagaStatus
from saga_store.retention_model import OPEN, ArchiveState, SagaArchive
from saga_store.validation import decode_context


class Row(Protocol):
    """What a view reads of a saga's row."""

    @property
    def id(self) -> UUID: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> SagaStatus: ...
    @property
    def context(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def recovery_attempts(self) -> int: ...
    @property
    def lease_owner(self) -> str | None: ...
    @property
    def lease_expires_at(self) -> datetime | None: ...
    @property
    def created_at(self) -> datetime: ...
    @property
    def updated_at(self) -> datetime: ...
    @property
    def archived_at(self) -> datetime | None: ...
    @property
    def retain_until(self) -> datetime | None: ...


@dataclass(frozen=True, slots=True)
class MemoryViews:
    """The views of one moment."""

    rows: Sequence[Row]
    history: Callable[[UUID], Sequence[SagaLogEntry]]
    now: datetime
    archives: Sequence[SagaArchive] = ()

    def find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        found, is_partial = self.look(query)
        found.sort(key=_age, reverse=True)
        if after is not None:
            key = datetime.fromisoformat(after.created_at).replace(tzinfo=UTC), after.id
            found = [saga for saga in found if _age(saga) < key]
        page = found[:limit]
        goes_on = len(found) > limit
        return SagaPage(
            page,
            at=self.now,
            after=str(Cursor(page[-1].created_at.replace(tzinfo=None).isoformat(), page[-1].id)) if goes_on else None,
            finished_since=self.now - FINISHED_WINDOW if is_windowed(query) else None,
            is_partial=is_partial,
        )

    def count(self, query: SagaQuery) -> SagaCount:
        found, is_partial = self.look(query, counts=True)
        is_partial |= is_windowed(query, counts=True) or len(found) > MOST_COUNTED
        return SagaCount(min(len(found), MOST_COUNTED), is_partial=is_partial)

    def look(self, query: SagaQuery, *, samples: bool = False, counts: bool = False) -> tuple[list[SagaSummary], bool]:
        """Return what is asked for, and whether not all was looked at; ``samples`` if it never should be."""
        since = self.now - FINISHED_WINDOW if is_windowed(query, counts=counts) else None
        seen: list[Row] = []
        is_partial = False
        for kind in kinds(query):
            lives = kind[0] in UNFINISHED
            rows = [
                row
                for row in self.rows
                if row.status in kind and self._fits(row, query) and (lives or since is None or row.created_at >= since)
            ]
            if samples or query.asks_histories:
                rows.sort(key=_age, reverse=not lives)
                is_partial |= len(rows) > SAGAS_SEEN
                rows = rows[:SAGAS_SEEN]
            seen += rows
        entries = history_seen(len(seen)) if samples or query.asks_histories else HISTORY_SEEN
        summaries = (self.summary(row, query, entries) for row in seen)
        return [saga for saga in summaries if self._is_asked(saga, query)], is_partial

    def summary(self, row: Row, query: SagaQuery, entries: int = HISTORY_SEEN) -> SagaSummary:
        seen = digest(self.history(row.id), entries)
        since = seen.silent_since(row.created_at, row.updated_at)
        condition = self._condition(row, query.max_attempts)
        if condition is SagaCondition.ACTIVE and since <= self.now - query.stale_after:
            condition = SagaCondition.STALE
        return SagaSummary(
            id=row.id,
            name=row.name,
            status=row.status,
            version=row.version,
            recovery_attempts=row.recovery_attempts,
            lease_owner=row.lease_owner,
            lease_expires_at=row.lease_expires_at,
            created_at=row.created_at,
            updated_at=row.updated_at,
            condition=condition,
            in_doubt=seen.in_doubt > 0 and condition is not SagaCondition.HELD,
            silent_for=max(self.now - since, timedelta()),
            last_entry=seen.last,
            last_error=seen.error,
            archived_at=row.archived_at,
            retain_until=row.retain_until,
        )

    def interventions(self, since: datetime, by: str | None, limit: int, after: int | None) -> InterventionPage:
        prefix = "" if by is None else record_prefix(by)
        found = [
            intervention(entry, row.name)
            for row in self.rows
            for entry in self.history(row.id)
            if entry.step_name.startswith(INTERVENTION)
            and entry.created_at >= since
            and (entry.details or "").startswith(prefix)
            and (after is None or entry.id < after)
        ]
        found.sort(key=lambda one: -one.entry_id)
        page = found[:limit]
        return InterventionPage(page, str(page[-1].entry_id) if len(found) > limit else None)

    def figures(self, query: SagaQuery) -> SagaFigures:
        living = [row for row in self.rows if row.status in UNFINISHED]
        failed = [
            row for row in self.rows if row.status is SagaStatus.FAILED and row.created_at >= self.now - FINISHED_WINDOW
        ]
        summaries = [self.summary(row, query) for row in living]
        doubts = [row for row in living + failed if self._condition(row, query.max_attempts) is not SagaCondition.HELD]
        entries = [entry.id for row in self.rows for entry in self.history(row.id)]
        return SagaFigures(
            unfinished=Counter((saga.name, saga.condition) for saga in summaries),
            oldest_unfinished=self.now - min((row.created_at for row in living), default=self.now),
            in_doubt_steps=sum(digest(self.history(row.id)).in_doubt for row in doubts),
            failed_24h=len(failed),
            finished=len(self.rows) - len(living),
            log_entries=max(entries, default=0),
            table_bytes={},
            dead_tuples={},
            archived_sagas=sum(archive.removed for archive in self.archives),
            archived_bytes=sum(archive.bytes for archive in self.archives if archive.state is not ArchiveState.FAILED),
            archives_failed_24h=sum(
                archive.state is ArchiveState.FAILED and archive.begun_at >= self.now - FINISHED_WINDOW
                for archive in self.archives
            ),
            last_archived_at=max(
                (archive.archived_at for archive in self.archives if archive.archived_at is not None), default=None
            ),
            oldest_open_archive=self.now
            - min((archive.begun_at for archive in self.archives if archive.state in OPEN), default=self.now),
        )

    def _condition(self, row: Row, max_attempts: int) -> SagaCondition:
        """Return the condition as far as the row alone tells it; what is stale is called active."""
        if row.status not in UNFINISHED:
            return SagaCondition.FINISHED
        if row.lease_expires_at is not None and row.lease_expires_at > self.now:
            return SagaCondition.HELD
        if row.recovery_attempts >= max_attempts:
            return SagaCondition.EXHAUSTED
        return SagaCondition.ACTIVE if row.lease_expires_at is None else SagaCondition.ABANDONED

    def _fits(self, row: Row, query: SagaQuery) -> bool:
        """Whether the row may be asked for; histories have to tell the rest."""
        conditions = set(query.conditions)
        if SagaCondition.STALE in conditions:
            conditions.add(SagaCondition.ACTIVE)
        return (
            (not conditions or self._condition(row, query.max_attempts) in conditions)
            and query.name in {None, row.name}
            and query.lease_owner in {None, row.lease_owner}
            and (query.created_after is None or row.created_at >= query.created_after)
            and (query.created_before is None or row.created_at < query.created_before)
            and (query.id_prefix is None or _is_between(row.id, *id_range(query.id_prefix)))
            and (query.context is None or _has_fields(decode_context(row.context), query.context.items()))
        )

    def _is_asked(self, saga: SagaSummary, query: SagaQuery) -> bool:
        return (
            (not query.conditions or saga.condition in query.conditions)
            and (query.step is None or (saga.last_entry is not None and saga.last_entry.step_name == query.step))
            and (query.silent_for is None or saga.silent_for >= query.silent_for)
            and query.in_doubt in {None, saga.in_doubt}
        )


def _age(saga: Row | SagaSummary) -> tuple[datetime, UUID]:
    return saga.created_at, saga.id


def _is_between(saga_id: UUID, first: UUID, last: UUID) -> bool:
    return first <= saga_id <= last


def _has_fields(context: object, fields: Iterable[tuple[str, object]]) -> bool:
    return isinstance(context, dict) and all(
        key in context and is_equal_json(context[key], value) for key, value in fields
    )
