"""The verbs that show sagas, and the one that settles a step in doubt: saga list, show, stuck, stats, interventions."""

import argparse
import asyncio
import getpass
import os
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.cli import sagas_shown as shown
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Run, Verbs, duration
from saga_store.errors import InvalidSagaDataError, SagaNotFoundError
from saga_store.inspection import (
    HISTORY_SEEN,
    MAX_ATTEMPTS,
    STALE_AFTER,
    SagaCondition,
    SagaPage,
    SagaQuery,
    cut,
    fold_history,
)
from saga_store.model import SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.schema.connections import opened
from saga_store.sqlalchemy import SqlAlchemySagaStorage

STUCK = (SagaCondition.EXHAUSTED, SagaCondition.ABANDONED, SagaCondition.STALE)
_FEWEST_DIGITS = 8
_Work = Callable[[SqlAlchemySagaStorage, argparse.Namespace, Console], Awaitable[Exit]]


def register(verbs: Verbs) -> None:
    saga = verbs.group("saga", summary="See sagas, and settle steps in doubt.")
    found = saga.add("list", _on(_list), summary="List sagas, newest first.", database=True)
    _add_filters(found)
    found.add_argument("--condition", action="append", type=SagaCondition, metavar="|".join(SagaCondition), default=[])
    _add_page(found)
    stuck = saga.add("stuck", _on(_stuck), summary="Group what is stuck by reason.", database=True)
    _add_filters(stuck)
    stuck.add_argument("--limit", type=int, default=20, help="how many groups (default: 20)")
    show = saga.add("show", _on(_show), summary="Show one saga and its history.", database=True)
    show.add_argument("id", help=f"its id, or {_FEWEST_DIGITS} of its first digits or more")
    stats = saga.add("stats", _on(_stats), summary="Count what is worth counting all day.", database=True)
    acts = saga.add("interventions", _on(_interventions), summary="List what persons did to sagas.", database=True)
    acts.add_argument("--since", type=_moment, default=timedelta(days=7), help="a time, or how long ago (default: 7d)")
    acts.add_argument("--by", help="only what this person did")
    _add_page(acts)
    settle = saga.add("settle", _on(_settle), summary="Say how a step in doubt ended.", database=True)
    settle.add_argument("id", help=f"the saga's id, or {_FEWEST_DIGITS} of its first digits or more")
    settle.add_argument("--entry", type=int, help="the entry in doubt, by its id; needn't be said if there is only one")
    settle.add_argument("--status", required=True, choices=[end.value for end in SagaStepStatus][1:])
    settle.add_argument("--reason", required=True, help="how you know; it is recorded")
    settle.add_argument("--by", default=_user(), help="who says so (default: the system's user)")
    settle.add_argument("--dry-run", action="store_true", help="say what would be settled, and write nothing")
    for parser in (found, stuck, show, stats):
        parser.add_argument("--stale-after", type=duration, default=STALE_AFTER, help="silent for this long is stale")
        parser.add_argument("--max-attempts", type=int, default=MAX_ATTEMPTS, help="this many exhaust a saga")
    for parser in (found, show, acts):
        parser.add_argument("--local", action="store_true", help="times in the local time zone (default: UTC)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", action="append", type=SagaStatus, metavar="|".join(SagaStatus), default=[])
    parser.add_argument("--name", help="sagas of this name")
    parser.add_argument("--step", help="whose last entry is of this step")
    parser.add_argument("--owner", help="whose lease is, or was, this owner's")
    parser.add_argument("--silent-for", type=duration, help="silent for this long: 90s, 10m, 2h, 7d")
    parser.add_argument("--created-after", type=_moment, help="a time (ISO 8601), or how long ago")
    parser.add_argument("--created-before", type=_moment, help="likewise")
    parser.add_argument("--in-doubt", action="store_true", default=None, help="with a step in doubt")


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=50, help="how many at most (default: 50)")
    parser.add_argument("--after", help="where the page before ended")


def _on(work: _Work) -> Run:
    """Run something on a storage of its own."""

    def run(given: argparse.Namespace, console: Console) -> int:
        try:
            return asyncio.run(_run(work, given, console))
        except InvalidSagaDataError as exc:
            return console.fail(exc, Exit.USAGE)

    return run


async def _run(work: _Work, given: argparse.Namespace, console: Console) -> Exit:
    async with opened(given_url(given)) as engine:
        if given.schema is not None:
            _look_in(engine, given.schema)
        return await work(SqlAlchemySagaStorage(engine, retry_for=timedelta(0)), given, console)


def _look_in(engine: AsyncEngine, schema: str) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def _(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's
        quoted = schema.replace('"', '""')
        connection.cursor().execute(f'SET search_path TO "{quoted}"')
        connection.commit()


async def _list(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    page = await storage.find_sagas(_query(given, given.condition), limit=given.limit, after=given.after)
    console.product(shown.page_as_text(page, local=given.local), **shown.page_as_facts(page))
    return Exit.DONE


async def _stuck(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    groups = await storage.group_sagas(_query(given, STUCK), limit=given.limit)
    console.product(shown.groups_as_text(groups), groups=shown.plain(groups))
    return Exit.ATTENTION if groups else Exit.DONE


async def _show(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    judged = SagaQuery(stale_after=given.stale_after, max_attempts=given.max_attempts)
    page = await _by_id(storage, given.id, judged)
    if len(page.sagas) != 1 or page.unreadable:
        return _not_one(page, given, console)
    [saga] = page.sagas
    # The last ones, however long the history is and whatever its entries hold.
    entries: deque[SagaLogEntry] = deque(maxlen=HISTORY_SEEN)
    count = 0
    async for entry in storage.iter_step_history(saga.id):
        entries.append(cut(entry))
        count += 1
    attempts = fold_history(entries, page.at, held=saga.condition is SagaCondition.HELD)
    console.product(
        shown.saga_as_text(saga, attempts, count - len(entries), local=given.local),
        saga=shown.plain(saga),
        attempts=shown.plain(attempts),
        history=shown.plain(list(entries)),
        left_out=count - len(entries),
    )
    return Exit.DONE


async def _stats(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    figures = await storage.get_figures(stale_after=given.stale_after, max_attempts=given.max_attempts)
    console.product(shown.figures_as_text(figures), **shown.figures_as_facts(figures))
    return Exit.DONE


async def _interventions(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    since = _time(given.since)
    page = await storage.find_interventions(since=since, by=given.by, limit=given.limit, after=given.after)
    console.product(shown.interventions_as_text(page, local=given.local), **shown.plain(page))
    return Exit.DONE


async def _settle(storage: SqlAlchemySagaStorage, given: argparse.Namespace, console: Console) -> Exit:
    page = await _by_id(storage, given.id, SagaQuery())
    if len(page.sagas) != 1 or page.unreadable:
        return _not_one(page, given, console)
    [saga] = page.sagas
    doubts = await storage.get_in_doubt_steps(saga.id)
    if given.entry is not None:
        doubts = [entry for entry in doubts if entry.id == given.entry]
    if len(doubts) != 1:
        problem = "several steps are in doubt; say which by --entry" if doubts else "no such step is in doubt"
        lines = [f"saga {saga.id}: {problem}", *map(shown.entry_as_text, doubts)]
        return console.fail(ValueError("\n".join(lines)), Exit.REFUSED)
    [entry] = doubts
    if not given.dry_run:
        try:
            status = SagaStepStatus(given.status)
            await storage.settle_step(saga.id, entry.id, status, by=given.by, reason=given.reason)
        except InvalidSagaDataError as exc:
            return console.fail(exc, Exit.REFUSED if exc.field == "entry_id" else Exit.USAGE)
    console.result(
        f"{'would settle' if given.dry_run else 'settled'} {shown.entry_as_text(entry)} of saga {saga.id} "
        f"as {given.status}",
        saga_id=str(saga.id),
        entry_id=entry.id,
        status=given.status,
        settled=not given.dry_run,
    )
    return Exit.DONE


async def _by_id(storage: SqlAlchemySagaStorage, given: str, judged: SagaQuery) -> SagaPage:
    digits = given.replace("-", "")
    if len(digits) < _FEWEST_DIGITS:
        raise InvalidSagaDataError("id", f"must have its first {_FEWEST_DIGITS} digits or more, not {given!r:.60}")
    query = SagaQuery(id_prefix=given, stale_after=judged.stale_after, max_attempts=judged.max_attempts)
    return await storage.find_sagas(query, limit=20)


def _not_one(page: SagaPage, given: argparse.Namespace, console: Console) -> Exit:
    """Say why an id doesn't lead to one saga."""
    ids = [str(saga.id) for saga in page.sagas] + [str(saga_id) for saga_id in page.unreadable]
    if not ids:
        with suppress(ValueError):
            return console.fail(SagaNotFoundError(UUID(given.id)), Exit.FAILED)
        return console.fail(InvalidSagaDataError("id", f"is no saga's: {given.id!r}"), Exit.FAILED)
    what = "can't be read" if len(ids) == 1 else "are several sagas; give more digits"
    return console.fail(InvalidSagaDataError("id", f"{what}: {', '.join(ids)}"), Exit.FAILED)


def _query(given: argparse.Namespace, conditions: Any) -> SagaQuery:  # noqa: ANN401 - of argparse
    return SagaQuery(
        statuses=given.status,
        conditions=conditions,
        name=given.name,
        step=given.step,
        lease_owner=given.owner,
        silent_for=given.silent_for,
        created_after=None if given.created_after is None else _time(given.created_after),
        created_before=None if given.created_before is None else _time(given.created_before),
        in_doubt=given.in_doubt,
        stale_after=given.stale_after,
        max_attempts=given.max_attempts,
    )


def _moment(value: str) -> datetime | timedelta:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return duration(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _time(moment: datetime | timedelta) -> datetime:
    return moment if isinstance(moment, datetime) else datetime.now(UTC) - moment


def _user() -> str | None:
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return os.environ.get("USER")
