"""What the verbs of ``saga`` show: facts for a machine, and blocks for a person."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from enum import Enum
from typing import Any
from uuid import UUID

from saga_store import telling
from saga_store.cli.blocks import Block, Cell, Column, Line, Row, Table, Verbatim, cell, line
from saga_store.inspection import (
    INTERVENTION,
    InterventionPage,
    SagaCondition,
    SagaFigures,
    SagaGroup,
    SagaPage,
    SagaSummary,
    visible,
)
from saga_store.model import SagaLogEntry, SagaStepStatus, StepAction

_DASH = Cell("\N{EM DASH}", "dim")
CONDITION_KINDS = {
    SagaCondition.FINISHED: "dim",
    SagaCondition.HELD: "held",
    SagaCondition.EXHAUSTED: "bad",
    SagaCondition.ABANDONED: "bad",
    SagaCondition.STALE: "warning",
    SagaCondition.ACTIVE: "good",
}
MARKS = {
    "good": "\N{HEAVY CHECK MARK}",
    "bad": "\N{HEAVY MULTIPLICATION X}",
    "doubt": "?",
    "held": "\N{BLACK RIGHT-POINTING TRIANGLE}",
    "person": "\N{BLACK DIAMOND}",
    "": "\N{MIDDLE DOT}",
}
_LEVELS = [chr(0x2581 + level) for level in range(8)]
_HISTOGRAM_BINS = 48


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return a value as JSON has it: enumerations by value, durations as seconds, instants as ISO 8601 in UTC."""
    match value:
        case Enum():
            found = value.value
        case datetime():
            found = value.astimezone(UTC).isoformat()
        case timedelta():
            found = value.total_seconds()
        case UUID():
            found = str(value)
        case Mapping():
            found = {key: plain(each) for key, each in value.items()}
        case list() | tuple():
            found = [plain(each) for each in value]
        case _ if is_dataclass(value):
            found = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        case _:
            found = value
    return found


def page(found: SagaPage, zone: tzinfo | None) -> list[Block]:
    """Return a page of sagas, and what it says of those that aren't on it."""
    return [sagas(found.sagas, zone) if found.sagas else line("none"), *notes(found, zone)]


def sagas(found: Iterable[SagaSummary], zone: tzinfo | None) -> Table:
    columns = (
        Column("ID", least=8),
        Column("CONDITION", least=9),
        Column("STATUS", least=12, leaves=3),
        Column("SILENT", least=8, right=True),
        Column("NAME", least=10, likes=22, wraps=True),
        Column("LAST STEP", least=14, likes=28, wraps=True),
        Column("LAST ERROR OR HOLDER", least=24, leaves=4),
        Column("CREATED", least=20, leaves=5),
    )
    rows = tuple(
        Row(
            (
                cell(saga.id.hex[:8], "strong"),
                _condition(saga.condition, in_doubt=saga.in_doubt),
                cell(saga.status.value, "bad" if saga.status.value == "FAILED" else ""),
                cell(telling.duration(saga.silent_for)),
                cell(saga.name),
                _step_of(saga),
                _error_or_holder(saga),
                cell(moment(saga.created_at, zone), "dim"),
            )
        )
        for saga in found
    )
    return Table(columns, rows)


def notes(found: SagaPage, zone: tzinfo | None) -> list[Line | Verbatim]:
    said = []
    if found.finished_since:
        since = moment(found.finished_since, zone)
        said.append(f"of finished sagas, those created since {since}; --created-after looks further back")
    if found.is_partial:
        said.append("not all were looked at: of unfinished sagas the oldest, of finished ones the newest")
    if found.unreadable:
        said.append(f"can't be read: {', '.join(map(str, found.unreadable))}")
    return [*(line(cell(each, "dim")) for each in said), *without(found.missing), *_more(found.after)]


def without(shards: Iterable[int]) -> list[Line]:
    """Return a line on what isn't in a view, if something isn't."""
    missing = sorted(shards)
    return [line(cell(f"without {telling.shards(missing)}, which can't be reached", "bad"))] if missing else []


def _more(after: str | None) -> list[Verbatim]:
    return [Verbatim(f"there are more: --after {after}")] if after else []


def groups(
    found: Sequence[SagaGroup], limit: int, zone: tzinfo | None, *, stale_after: timedelta, max_attempts: int
) -> list[Block]:
    """Return reasons before rows: who stands where and why, when they stopped, and what that hints at."""
    if not found:
        return [line("nothing is stuck")]
    now = found[0].stopped[0] + found[0].silent_for
    count = sum(group.count for group in found)
    more = "+" if any(group.is_partial for group in found) else ""
    judged = (
        f"as of {moment(now, zone)}; silent for {telling.duration(stale_after)} or more, or {max_attempts} attempts"
    )
    head = f"{count}{more} {'saga needs' if count == 1 else 'sagas need'} attention, in {number(len(found), 'group')}"
    blocks: list[Block] = [
        line(cell(head, "strong")),
        line(cell(judged, "dim")),
        line(),
        _groups_table(found[:limit]),
    ]
    if len(found) > limit:
        blocks.append(line(cell(f"{number(len(found) - limit, 'smaller group')} left out; --limit shows more", "dim")))
    stopped = [when for group in found for when in group.stopped]
    blocks += [line(), *_histogram(stopped, now, zone)]
    if said := telling.hint(found, stale_after=stale_after):
        blocks.append(line(cell(said, "warning")))
    if any(group.in_doubt for group in found):
        blocks.append(line(cell("? has begun, and nothing says how it ended.", "doubt")))
    blocks.append(line(cell("saga-store saga show ID tells one saga's story; 8 digits will do.", "dim")))
    return blocks


def _groups_table(found: Sequence[SagaGroup]) -> Table:
    columns = (
        Column("SAGAS", least=5, right=True),
        Column("CONDITION", least=9),
        Column("NAME", least=9, likes=22, wraps=True),
        Column("LAST STEP", least=12, likes=28, wraps=True),
        Column("SILENT", least=8, right=True),
        Column("LAST ERROR OR HOLDER", least=20, leaves=2),
        Column("SUCH AS", least=8),
    )
    return Table(
        columns,
        tuple(
            Row(
                (
                    cell(f"{group.count}{'+' if group.is_partial else ''}", "strong"),
                    _condition(group.condition, in_doubt=group.in_doubt),
                    cell(group.name),
                    step(group.step_name, group.action, _kind_of_group(group)),
                    cell(telling.duration(group.silent_for)),
                    _error_or_holders(group),
                    cell(group.examples[0].hex[:8], "strong"),
                )
            )
            for group in found
        ),
    )


def _kind_of_group(group: SagaGroup) -> str:
    if group.condition is SagaCondition.HELD:
        return "held"
    return "doubt" if group.in_doubt else "bad" if group.failed else "good" if group.step_name else ""


def _error_or_holders(group: SagaGroup) -> Cell:
    owners = ", ".join(group.lease_owners)
    if group.condition is SagaCondition.HELD:
        return cell(f"held by {owners}", "held")
    if group.error:
        return cell(group.error, "dim")
    return cell(f"was held by {owners}", "dim") if owners else _DASH


def _histogram(stopped: Sequence[datetime], now: datetime, zone: tzinfo | None) -> list[Line]:
    first = min(stopped)
    counts = telling.histogram(stopped, first, now, bins=_HISTOGRAM_BINS)
    most = max(counts)
    bars = "".join("\N{MIDDLE DOT}" if not count else _LEVELS[(count * 8 - 1) // most] for count in counts)
    began, ended = telling.instant(first, now, zone), telling.instant(now, now, zone)
    return [line(cell(f"When they stopped, from {began} to {ended}:", "dim")), line(Cell(bars, "warning"))]


def context_text(context: Mapping[str, Any]) -> str:
    """Return a context as JSON of which every character can be seen, and that still means the same."""
    text = json.dumps(context, indent=2, ensure_ascii=False)
    return re.sub(r"[^ -~\n]", lambda found: _seen(found[0]), text)


def _seen(character: str) -> str:
    return character if visible(character) == character else json.dumps(character)[1:-1]


def command(text: str) -> Verbatim:
    return Verbatim(f"    {text}")


def entry_as_text(entry: SagaLogEntry) -> str:
    return f"entry {entry.id} ({entry.action} {visible(entry.step_name)}, since {moment(entry.created_at, UTC)})"


def figures_as_facts(figures: SagaFigures) -> dict[str, Any]:
    facts: dict[str, Any] = plain(replace(figures, shards={}))
    facts["shards"] = {str(place): figures_as_facts(one) for place, one in figures.shards.items()}
    facts["unfinished"] = [
        {"name": name, "condition": condition.value, "count": count}
        for (name, condition), count in sorted(figures.unfinished.items())
    ]
    facts["table_bytes"] = [
        {"table": table, "part": part, "bytes": size} for (table, part), size in figures.table_bytes.items()
    ]
    return facts


def figures_as_blocks(figures: SagaFigures) -> list[Block]:
    def about(name: str) -> str:
        return "about " if name in figures.estimated else ""

    conditions = [condition for condition in CONDITION_KINDS if condition is not SagaCondition.FINISHED]
    names = {name: sum(figures.unfinished.get((name, one), 0) for one in conditions) for name, _ in figures.unfinished}
    columns = (
        Column("NAME", least=10, likes=22, wraps=True),
        Column(f"{about('unfinished')}SAGAS".upper(), least=5, right=True),
        *(Column(condition.value.upper(), least=len(condition.value), right=True) for condition in conditions),
    )
    rows = tuple(
        Row(
            (
                cell(name),
                cell(str(count), "strong"),
                *(_count(figures.unfinished.get((name, one), 0), CONDITION_KINDS[one]) for one in conditions),
            )
        )
        for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0]))
    )
    finished = "unknown" if figures.finished is None else f"{about('finished')}{figures.finished:,}"
    said = [
        f"oldest unfinished: {telling.duration(figures.oldest_unfinished)}",
        f"steps in doubt: {about('in_doubt_steps')}{figures.in_doubt_steps}",
        f"failed, of the last 24 hours: {figures.failed_24h}",
        f"finished: {finished}",
        f"log entries ever: {figures.log_entries:,}",
        *(f"{size:,} bytes  {table}, {part}" for (table, part), size in figures.table_bytes.items()),
        *(f"{count:,} dead rows  {table}" for table, count in figures.dead_tuples.items()),
    ]
    table = Table(columns, rows) if rows else line("none unfinished")
    return [table, line(), *map(line, said), *without(figures.missing)]


def _count(count: int, kind: str) -> Cell:
    return cell(str(count), kind) if count else Cell("\N{MIDDLE DOT}", "dim")


def interventions(found: InterventionPage, zone: tzinfo | None) -> list[Block]:
    columns = (
        Column("WHEN", least=20, leaves=1),
        Column("SAGA", least=8),
        Column("WHAT", least=12, wraps=True),
        Column("BY", least=8, wraps=True),
        Column("NAME", least=10, leaves=2),
        Column("REASON", least=18, wraps=True),
    )
    rows = tuple(
        Row(
            (
                cell(moment(one.created_at, zone)),
                cell(one.saga_id.hex[:8], "strong"),
                cell(one.verb, "person"),
                cell(one.by or "?"),
                cell(one.name),
                cell(telling.headline(one.reason) or ""),
            )
        )
        for one in found.interventions
    )
    return [Table(columns, rows) if rows else line("none"), *notes_on_interventions(found)]


def notes_on_interventions(found: InterventionPage) -> list[Line | Verbatim]:
    said = []
    if found.unreadable:
        said.append(f"entries that can't be read: {', '.join(map(str, found.unreadable))}")
    return [*(line(cell(each, "dim")) for each in said), *without(found.missing), *_more(found.after)]


def change(entry: SagaLogEntry, zone: tzinfo | None) -> Line:
    """Return an entry of a history as a line of what happens while somebody looks."""
    if entry.step_name.startswith(INTERVENTION):
        kind, what = "person", entry.step_name.removeprefix(INTERVENTION)
    else:
        kind = {SagaStepStatus.STARTED: "held", SagaStepStatus.FAILED: "bad"}.get(entry.status, "good")
        what = f"{entry.step_name} ({entry.action}) {entry.status}"
    said = telling.headline(entry.details)
    cells = [cell(moment(entry.created_at, zone), "dim"), cell(what, kind, mark=MARKS[kind])]
    return line(*cells, *([Cell(said, "bad" if kind == "bad" else "dim")] if said else ()))


def moment(when: datetime, zone: tzinfo | None) -> str:
    return telling.in_zone(when, zone).strftime("%Y-%m-%d %H:%M:%S" + (" %z" if zone is None else "Z"))


def step(name: str | None, action: StepAction | None, kind: str) -> Cell:
    if name is None:
        return Cell("\N{EM DASH}", "dim", mark=MARKS[""])
    return cell(name + (" (compensate)" if action == "compensate" else ""), kind, mark=MARKS[kind])


def _step_of(saga: SagaSummary) -> Cell:
    last = saga.last_entry
    if last is None:
        return step(None, None, "")
    kind = "bad" if last.status is SagaStepStatus.FAILED else "good"
    if last.status is SagaStepStatus.STARTED:
        kind = "held" if saga.condition is SagaCondition.HELD else "doubt"
    return step(last.step_name, last.action, kind)


def _error_or_holder(saga: SagaSummary) -> Cell:
    if saga.condition is SagaCondition.HELD:
        return cell(f"held by {saga.lease_owner}", "held")
    said = telling.headline(saga.last_error.details) if saga.last_error else None
    if said is None and saga.condition is SagaCondition.ABANDONED:
        return cell(f"was held by {saga.lease_owner}", "dim")
    return Cell(said, "dim") if said else _DASH


def _condition(condition: SagaCondition, *, in_doubt: int) -> Cell:
    """Return the condition, and how many are in doubt; one saga is or isn't."""
    doubts = "" if not in_doubt else ", in doubt" if in_doubt is True else f", {in_doubt} in doubt"
    return cell(condition.value + doubts, CONDITION_KINDS[condition], short=condition.value)


def number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def each(facts: Iterable[object]) -> Iterator[dict[str, Any]]:
    """Return facts for a machine that wants them one by one."""
    yield from map(plain, facts)
