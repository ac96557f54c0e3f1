"""What a person looks for, read by the statements of ``inspection_sql``; and the step that they settle."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from saga_store.errors import (
    SagaArchivedError,
    SagaNotFoundError,
    SagaUnreadableError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.inspection import (
    FINISHED_WINDOW,
    MOST_COUNTED,
    SAGAS_SEEN,
    ContextPeek,
    Cursor,
    Intervention,
    InterventionPage,
    RecentHistory,
    SagaCondition,
    SagaCount,
    SagaFigures,
    SagaPage,
    SagaQuery,
    SagaSummary,
    cut_between,
    id_range,
    intervention,
    is_windowed,
    kinds,
    record_prefix,
)
from saga_store.model import UNFINISHED, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.sqlalchemy import inspection_sql as sql
from saga_store.sqlalchemy.binds import Transaction
from saga_store.sqlalchemy.execution import Executor
from saga_store.sqlalchemy.pooled import Attempt
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import Parameters
from saga_store.sqlalchemy.write_parameters import of_one
from saga_store.sqlalchemy.write_sql import write_one
from saga_store.validation import decode_context, encode_context
from saga_store.write import Lease, Settlement, Write

_QUERY_CANCELED = "57014"


class MakeExecutor(Protocol):
    """Decides where a view looks, in its caller's context."""

    def __call__(self, *, writes: bool) -> Executor: ...


class Views:
    """The views, each one statement; where the storage owns the transaction, a read-only one with a timeout."""

    def __init__(self, make_executor: MakeExecutor) -> None:
        self._make_executor = make_executor

    async def find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        parameters = _parameters(query)
        if is_windowed(query):
            parameters["window"] = FINISHED_WINDOW.total_seconds()
        if after is not None:
            parameters |= {"after_created_at": after.created_at, "after_id": str(after.id)}
        (now, is_partial), *rows = await self._find(query, parameters, limit + 1, samples=query.asks_histories)
        sagas, unreadable = _summaries(rows[:limit], now)
        goes_on = len(rows) > limit
        return SagaPage(
            sagas,
            at=_moment(now),
            after=str(Cursor(rows[limit - 1][2], UUID(rows[limit - 1][0]))) if goes_on else None,
            unreadable=unreadable,
            finished_since=_moment(now) - FINISHED_WINDOW if is_windowed(query) else None,
            is_partial=is_partial,
        )

    async def sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        parameters = _parameters(query)
        if is_windowed(query):
            parameters["window"] = FINISHED_WINDOW.total_seconds()
        asked = kinds(query)
        (now, is_partial), *rows = await self._find(query, parameters, SAGAS_SEEN * max(len(asked), 1), samples=True)
        sagas, _ = _summaries(rows, now)
        return sagas, _moment(now), is_partial

    async def _find(
        self, query: SagaQuery, parameters: dict[str, object], limit: int, *, samples: bool
    ) -> list[list[Any]]:
        asked = _kinds(query)
        if not asked:
            return [[_written(datetime.now(UTC)), False]]
        statement = sql.find(frozenset(parameters), asked, samples=samples)
        return await self._look(statement, parameters | {"limit": limit, **_judging(query)})

    async def count(self, query: SagaQuery) -> SagaCount:
        parameters, asked = _parameters(query), _kinds(query)
        if not asked:
            return SagaCount(0)
        is_partial = is_windowed(query, counts=True)
        if is_partial:
            parameters["window"] = FINISHED_WINDOW.total_seconds()
        statement = sql.count(frozenset(parameters), asked, samples=query.asks_histories)
        if query.asks_histories:
            parameters["limit"] = SAGAS_SEEN * len(asked)
        [(count, is_sample)] = await self._look(statement, parameters | _judging(query))
        return SagaCount(min(count, MOST_COUNTED), is_partial=is_partial or is_sample or count > MOST_COUNTED)

    async def interventions(self, since: datetime, by: str | None, limit: int, after: int | None) -> InterventionPage:
        parameters: dict[str, object] = {"since": _written(since), "limit": limit + 1}
        if by is not None:
            parameters["prefix"] = record_prefix(by)
        if after is not None:
            parameters["after"] = after
        statement = sql.interventions(asks_who=by is not None, goes_on=after is not None)
        rows = await self._look(statement, parameters)
        found: list[Intervention] = []
        unreadable: list[int] = []
        for row in rows[:limit]:
            try:
                found.append(_intervention(*row))
            except ValueError:
                unreadable.append(row[0])
        after_this = str(rows[limit - 1][0]) if len(rows) > limit else None
        return InterventionPage(found, after_this, tuple(unreadable))

    async def recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        parameters = {"saga_id": str(saga_id), "limit": limit, "after": after}
        (archived, count), *rows = await self._look(sql.RECENT_HISTORY, parameters)
        _check_here(saga_id, archived)
        try:
            entries = [_entry(saga_id, *row) for (row,) in rows]
        except ValueError as exc:
            raise SagaUnreadableError(saga_id, f"of an entry of its history: {exc}") from exc
        return RecentHistory(entries, count - len(entries))

    async def peek(self, saga_id: UUID, most: int) -> ContextPeek:
        rows = await self._look(sql.CONTEXT, {"saga_id": str(saga_id), "most": most})
        archived, size, text = rows[0] if rows else (None, 0, None)
        _check_here(saga_id, archived)
        try:
            context = None if text is None else decode_context(text)
        except (ValueError, RecursionError) as exc:
            raise SagaUnreadableError(saga_id, f"its context: {exc}") from exc
        if not isinstance(context, dict | None):
            raise SagaUnreadableError(saga_id, f"its context is no object, but a {type(context).__name__}")
        return ContextPeek(size, context)

    async def figures(self, query: SagaQuery) -> SagaFigures:
        parameters = {"window": FINISHED_WINDOW.total_seconds(), **_judging(query)}
        [row] = await self._look(sql.FIGURES, parameters)
        groups, oldest, now, in_doubt, failed, living, all_rows, last_entry, executions, logs, may_read_ledger = row
        archived, size, failures, last, open_for = (0, 0, 0, None, None)
        if may_read_ledger:
            [(archived, size, failures, last, open_for)] = await self._look(
                sql.LEDGER, {"window": FINISHED_WINDOW.total_seconds()}
            )
        estimated = ["finished"]
        if living > SAGAS_SEEN:
            estimated += ["unfinished", "in_doubt_steps"]
        elif failed > SAGAS_SEEN:
            estimated.append("in_doubt_steps")
        if failed > MOST_COUNTED:
            estimated.append("failed_24h")
        try:
            age = _moment(now) - _moment(oldest) if oldest else timedelta()
        except ValueError:  # created at -infinity, which is older than anything
            age = timedelta.max
        tables = {"saga_executions": executions, "saga_logs": logs}
        return SagaFigures(
            unfinished={(name, SagaCondition(condition)): count for name, condition, count in groups},
            oldest_unfinished=max(age, timedelta()),
            in_doubt_steps=in_doubt,
            failed_24h=min(failed, MOST_COUNTED),
            finished=None if all_rows < 0 or living > MOST_COUNTED else max(all_rows - living, 0),
            log_entries=last_entry or 0,
            table_bytes={
                (table, part): size
                for table, sizes in tables.items()
                for part, size in zip(("heap", "toast", "indexes"), sizes, strict=False)
            },
            dead_tuples={table: figures[3] for table, figures in tables.items()},
            estimated=tuple(estimated),
            hot_share={table: figures[5] / figures[4] if figures[4] else None for table, figures in tables.items()},
            last_vacuum={
                table: None if figures[6] is None else _moment(figures[6]) for table, figures in tables.items()
            },
            archived_sagas=archived,
            archived_bytes=size,
            archives_failed_24h=failures,
            last_archived_at=None if last is None else _moment(last),
            oldest_open_archive=timedelta(seconds=max(open_for or 0, 0)),
        )

    async def settle(self, settlement: Settlement) -> None:
        saga_id = settlement.saga_id

        async def settle(transaction: Transaction, _: Attempt) -> None:
            asked: dict[str, object] = {"saga_id": str(saga_id), "entry_id": settlement.entry_id}
            locked = await _fetch(transaction, sql.LOCK, {"saga_id": asked["saga_id"]})
            archived, status, attempts, owner, version = locked[0] if locked else (None, None, 0, None, 0)
            _check_here(saga_id, archived)
            settlement.check_version(version)
            doubt = await _fetch(transaction, sql.DOUBT, asked)
            if not doubt:
                raise settlement.refusal()
            [(step_name, action, later)] = doubt
            if later is not None:
                raise settlement.refusal(later)
            before = {"status": status, "recovery_attempts": attempts, "lease_owner": owner}
            steps = settlement.steps(step_name, action, before)
            parameters = of_one(Write(saga_id, lease=Lease(), steps=steps))
            await transaction.execute(write_one(frozenset(parameters), waits=True), parameters)

        await self._make_executor(writes=True).transact(settle, if_lost=UnknownOutcomeError(saga_id))

    async def _look(self, statement: Statement, parameters: Parameters) -> list[list[Any]]:
        async def look(transaction: Transaction, attempt: Attempt) -> list[list[Any]]:
            if not attempt.joins:
                await transaction.execute(sql.READ_ONLY, {})
            return await _fetch(transaction, statement, parameters)

        try:
            return await self._make_executor(writes=False).transact(look)
        except StorageUnavailableError as error:
            if error.sqlstate != _QUERY_CANCELED:
                raise
            raise StorageUnavailableError(
                f"the view took longer than it may ({sql.VIEW_SECONDS} s, or the transaction's own statement_timeout); "
                "ask for less: a shorter time, a name, a status",
                error.sqlstate,
            ) from error.__cause__


def _check_here(saga_id: UUID, archived: Sequence[str | None] | None) -> None:
    """Raise if there is no such saga, or a stub of it: an array of when it was archived, which is NULL otherwise."""
    if archived is None:
        raise SagaNotFoundError(saga_id)
    if archived[0] is not None:
        raise SagaArchivedError(saga_id, None, _last_moment(archived[0]))


async def _fetch(transaction: Transaction, statement: Statement, parameters: Parameters) -> list[list[Any]]:
    return [json.loads(answer) for (answer,) in await transaction.execute(statement, parameters)]


def _kinds(query: SagaQuery) -> tuple[SagaStatus, ...]:
    """Return the kinds that are asked for, by the first status of each."""
    return tuple(SagaStatus.PENDING if kind[0] in UNFINISHED else kind[0] for kind in kinds(query))


def _judging(query: SagaQuery) -> dict[str, object]:
    return {"max_attempts": query.max_attempts, "stale_after": query.stale_after.total_seconds()}


def _parameters(query: SagaQuery) -> dict[str, object]:
    """Return what the query asks, by the names of the conditions."""
    parameters: dict[str, object] = {
        "name": query.name,
        "step": query.step,
        "lease_owner": query.lease_owner,
        "silent_for": None if query.silent_for is None else query.silent_for.total_seconds(),
        "created_after": query.created_after and _written(query.created_after),
        "created_before": query.created_before and _written(query.created_before),
        "context": None if query.context is None else encode_context(query.context),
        "in_doubt": query.in_doubt,
    }
    if query.statuses:
        parameters["statuses"] = [status.value for status in query.statuses]
    if query.conditions:
        conditions = {condition.value for condition in query.conditions}
        told_by_rows = conditions - {"stale"} | ({"active"} if "stale" in conditions else set())
        parameters |= {"conditions": sorted(conditions), "standings": sorted(told_by_rows)}
    if query.id_prefix is not None:
        first, last = id_range(query.id_prefix)
        parameters |= {"first_id": str(first), "last_id": str(last)}
    return {name: value for name, value in parameters.items() if value is not None}


def _summaries(rows: Sequence[Sequence[Any]], now: str) -> tuple[list[SagaSummary], tuple[UUID, ...]]:
    """Return the sagas whose rows can be read, and the ids of the others."""
    sagas: list[SagaSummary] = []
    unreadable: list[UUID] = []
    moment = _moment(now)
    for row in rows:
        try:
            sagas.append(_summary(moment, *row))
        except (ValueError, OverflowError):
            unreadable.append(UUID(row[0]))
    return sagas, tuple(unreadable)


def _summary(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    now: datetime,
    saga_id: str,
    lease_expires_at: str | None,
    created_at: str,
    updated_at: str,
    since: str,
    archived_at: str | None,
    retain_until: str | None,
    name: str,
    status: str,
    version: int,
    recovery_attempts: int,
    lease_owner: str | None,
    condition: str,
    in_doubt: int,
    last: Sequence[Any] | None,
    error: Sequence[Any] | None,
) -> SagaSummary:
    own_id = UUID(saga_id)
    return SagaSummary(
        id=own_id,
        name=name,
        status=SagaStatus(status),
        version=version,
        recovery_attempts=recovery_attempts,
        lease_owner=lease_owner,
        lease_expires_at=None if lease_expires_at is None else _moment(lease_expires_at),
        created_at=_moment(created_at),
        updated_at=_moment(updated_at),
        condition=SagaCondition(condition),
        in_doubt=in_doubt > 0 and condition != "held",
        silent_for=max(now - _moment(since), timedelta()),
        last_entry=None if last is None else _entry(own_id, *last),
        last_error=None if error is None else _entry(own_id, *error),
        archived_at=None if archived_at is None else _last_moment(archived_at),
        retain_until=None if retain_until is None else _last_moment(retain_until),
    )


def _entry(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    saga_id: UUID,
    entry_id: int,
    step_name: str,
    action: StepAction,
    status: str,
    details: str | list[str] | None,
    created_at: str,
) -> SagaLogEntry:
    shown = cut_between(*details) if isinstance(details, list) else details
    return SagaLogEntry(entry_id, saga_id, step_name, action, SagaStepStatus(status), shown, _moment(created_at))


def _intervention(  # noqa: PLR0913, PLR0917 - a row's columns, in the order of the statement
    entry_id: int, saga_id: str, name: str, step_name: str, details: str | None, created_at: str
) -> Intervention:
    entry = SagaLogEntry(
        entry_id, UUID(saga_id), step_name, "act", SagaStepStatus.COMPLETED, details, _moment(created_at)
    )
    return intervention(entry, name)


def _moment(written: str) -> datetime:
    """Read a time in UTC; ValueError if Python has no such time."""
    return datetime.fromisoformat(written).replace(tzinfo=UTC)


def _last_moment(written: str) -> datetime:
    """Read a time that may never come, or that Python doesn't know."""
    try:
        return _moment(written)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()
