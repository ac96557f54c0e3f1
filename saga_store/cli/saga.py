"""The verbs that show sagas: saga list, show, stuck, stats, interventions. ``saga_verbs`` has those that intervene."""

import argparse
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from saga_store.cli import saga_follow, saga_verbs, sagas_shown
from saga_store.cli.blocks import Verbatim, line
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.output import Output, add_options
from saga_store.cli.saga_filters import (
    ID_HELP,
    add_filters,
    add_judging,
    add_zone,
    moment,
    query,
    time_of,
    zone_of,
)
from saga_store.cli.saga_run import on_storage
from saga_store.cli.saga_story import attempts_of, look, story, telling_of
from saga_store.cli.shards import ALL_AT_ONCE, add_shards
from saga_store.cli.storages import missing_of
from saga_store.cli.verbs import Verbs, duration
from saga_store.inspection import SagaCondition, SagaGroup
from saga_store.model import SagaStatus
from saga_store.storage import SagaStorage
from saga_store.telling import ATTENTION
from saga_store.validation import valid_count

_PAGE = 50
_LONGEST_PAGE = 1000
# However many there are, they come from 5,000 sagas of a kind at most.
_ALL_GROUPS = 100_000


def register(verbs: Verbs) -> None:
    saga = verbs.group("saga", summary="See sagas, and mend them.")
    found = saga.add("list", on_storage(_list), summary="List sagas, newest first.", database=True)
    add_filters(found)
    _add_page(found, "with --ndjson all")
    stuck = saga.add("stuck", on_storage(_stuck), summary="Group what is stuck by reason.", database=True)
    add_filters(stuck, conditions=False)
    stuck.add_argument("--limit", type=int, default=20, help="how many groups (default: 20)")
    show = saga.add("show", _show, summary="Show one saga and its history.", database=True)
    show.add_argument("id", help=ID_HELP)
    show.add_argument("--last", type=int, default=100, help="how many attempts a person sees (default: the last 100)")
    show.add_argument("--context", action="store_true", help="show its context, too, however big it is")
    show.add_argument("--follow", action="store_true", help="go on until it is finished, and print what changes")
    show.add_argument("--every", type=duration, default=timedelta(seconds=1), help="look this often (default: 1s)")
    stats = saga.add("stats", on_storage(_stats), summary="Count what is worth counting all day.", database=True)
    acts = saga.add(
        "interventions", on_storage(_interventions), summary="List what persons did to sagas.", database=True
    )
    acts.add_argument("--since", type=moment, default=timedelta(days=7), help="a time, or how long ago (default: 7d)")
    acts.add_argument("--by", help="only what this person did")
    _add_page(acts, "with --ndjson all")
    for parser in (found, stuck, show, stats):
        add_judging(parser)
    for parser in (found, stuck, show, acts):
        add_zone(parser)
    for parser in (found, stuck, show, stats, acts):
        add_options(parser)
        add_shards(parser, ALL_AT_ONCE)
    saga_verbs.register(saga)


def _add_page(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument("--limit", type=int, help=f"how many at most (default: {_PAGE}; {otherwise})")
    parser.add_argument("--after", help="where the page before ended")


async def _list(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    asked, zone = query(given), zone_of(given)
    if output.in_lines and (given.limit is None or given.limit > 0):
        left, after = given.limit, given.after
        unreadable = list[UUID]()
        is_partial = False
        while True:
            size = _LONGEST_PAGE if left is None else min(left, _LONGEST_PAGE)
            page = await storage.find_sagas(asked, limit=size, after=after)
            output.console.lines(sagas_shown.each(page.sagas))
            output.lacks(storage, page.missing)
            unreadable += page.unreadable
            is_partial = is_partial or page.is_partial
            left, after = None if left is None else left - size, page.after
            if after is None or left == 0:
                told = replace(page, missing=(), unreadable=tuple(unreadable), is_partial=is_partial)
                output.note(sagas_shown.notes(told, zone))
                return output.code(Exit.DONE)
    page = await storage.find_sagas(asked, limit=_PAGE if given.limit is None else given.limit, after=given.after)
    output.lacks(storage, page.missing)
    output.found(sagas_shown.page(page, zone), sagas_shown.plain(page))
    return output.code(Exit.DONE)


async def _stuck(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    valid_count("limit", given.limit)
    asked = query(given, ATTENTION)
    # A worker that hangs may go on renewing its lease.
    silent = max(asked.silent_for or timedelta(), asked.stale_after)
    hung = replace(asked, conditions=(SagaCondition.HELD,), silent_for=silent)
    # What was given up, or undone, while a step was in doubt: nobody works on it any more, but somebody has to look.
    doubtful = replace(asked, conditions=(), statuses=(SagaStatus.FAILED,), in_doubt=True)
    groups: list[SagaGroup] = []
    missing: set[int] = set()
    for each in (asked, hung, doubtful) if SagaStatus.FAILED in (asked.statuses or SagaStatus) else (asked, hung):
        groups += await storage.group_sagas(each, limit=_ALL_GROUPS)
        missing |= missing_of(storage).keys()
        output.lacks(storage, missing)
    groups.sort(key=lambda group: (-group.count, -group.silent_for))
    blocks = sagas_shown.groups(
        groups, given.limit, zone_of(given), stale_after=given.stale_after, max_attempts=given.max_attempts
    )
    facts = sagas_shown.plain(groups[: given.limit])
    output.found([*blocks, *sagas_shown.without(missing)], {"groups": facts, "missing": sorted(missing)}, facts)
    return output.code(Exit.ATTENTION if groups else Exit.DONE)


def _show(given: argparse.Namespace, console: Console) -> int:
    if given.follow and given.json:
        return console.fail(ValueError("--follow prints as it goes: give it --ndjson in place of --json"), Exit.USAGE)
    if given.follow and given.context:
        return console.fail(
            ValueError("--follow shows what changes, and no context: leave out one of them"), Exit.USAGE
        )
    return on_storage(saga_follow.follow if given.follow else show)(given, console)


async def show(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    """Show one saga."""
    how = telling_of(given)
    saga, history, now, archived, missing = await look(storage, given)
    output.lacks(storage, missing)
    attempts = attempts_of(saga, history, now)
    facts: dict[str, Any] = {
        "saga": sagas_shown.plain(saga),
        "attempts": sagas_shown.plain(attempts),
        "history": sagas_shown.plain(history.entries),
        "left_out": history.left_out,
        "missing": list(missing),
    }
    blocks = story(saga, history, now, how, archived)
    if archived and archived.found:
        facts["archive"] = {"file": archived.found.file, "line": archived.found.line}
    if given.context:
        if archived is None:
            _, facts["context"] = await storage.load_saga_state(saga.id)
        else:
            facts["context"] = archived.context()
        blocks += [line(), Verbatim(sagas_shown.context_text(facts["context"]))]
    lines = [{"saga": facts["saga"]}, *({"entry": entry} for entry in facts["history"])]
    lines += [{name: facts[name]} for name in ("archive", "context") if name in facts]
    output.found([*blocks, *sagas_shown.without(missing)], facts, lines)
    return output.code(Exit.DONE)


async def _stats(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    figures = await storage.get_figures(stale_after=given.stale_after, max_attempts=given.max_attempts)
    output.lacks(storage, figures.missing)
    output.found(sagas_shown.figures_as_blocks(figures), sagas_shown.figures_as_facts(figures))
    return output.code(Exit.DONE)


async def _interventions(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    since, after, left = time_of(given.since, local=given.local), given.after, given.limit
    unreadable = list[int]()
    if output.in_lines and (left is None or left > 0):
        while True:
            size = _LONGEST_PAGE if left is None else min(left, _LONGEST_PAGE)
            page = await storage.find_interventions(since=since, by=given.by, limit=size, after=after)
            output.console.lines(sagas_shown.each(page.interventions))
            output.lacks(storage, page.missing)
            unreadable += page.unreadable
            left, after = None if left is None else left - size, page.after
            if after is None or left == 0:
                told = replace(page, missing=(), unreadable=tuple(unreadable))
                output.note(sagas_shown.notes_on_interventions(told))
                return output.code(Exit.DONE)
    page = await storage.find_interventions(
        since=since, by=given.by, limit=_PAGE if left is None else left, after=after
    )
    output.lacks(storage, page.missing)
    output.found(sagas_shown.interventions(page, zone_of(given)), sagas_shown.plain(page))
    return output.code(Exit.DONE)
