"""What the verbs of ``saga`` print: facts for a machine, and text whose every character can be seen."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from saga_store.inspection import (
    AttemptState,
    InterventionPage,
    SagaFigures,
    SagaGroup,
    SagaPage,
    SagaSummary,
    StepAttempt,
    visible,
)
from saga_store.model import SagaLogEntry

_NARROWEST = 60


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


def page_as_facts(page: SagaPage) -> dict[str, Any]:
    facts: dict[str, Any] = plain(page)
    return facts


def page_as_text(page: SagaPage, *, local: bool) -> str:
    rows = [
        (
            saga.id.hex[:8],
            saga.condition.value + (", in doubt" if saga.in_doubt else ""),
            saga.status.value,
            _duration(saga.silent_for),
            _instant(saga.created_at, local=local),
            saga.name,
            _step(saga),
        )
        for saga in page.sagas
    ]
    lines = _table(("ID", "CONDITION", "STATUS", "SILENT", "CREATED", "NAME", "LAST STEP"), rows) if rows else ["none"]
    if page.finished_since:
        lines.append(
            f"of finished sagas, those created since {_instant(page.finished_since, local=local)}; "
            "--created-after looks further back"
        )
    if page.is_partial:
        lines.append("not all were looked at: of unfinished sagas the oldest, of finished ones the newest")
    if page.unreadable:
        lines.append(f"can't be read: {', '.join(map(str, page.unreadable))}")
    if page.after:
        lines.append(f"there are more: --after {page.after}")
    return "\n".join(lines)


def groups_as_text(groups: Sequence[SagaGroup]) -> str:
    if not groups:
        return "nothing is stuck"
    rows = [
        (
            f"{group.count}{'+' if group.is_partial else ''}",
            group.condition.value + (f", {group.in_doubt} in doubt" if group.in_doubt else ""),
            _duration(group.silent_for),
            group.examples[0].hex[:8],
            group.name,
            " ".join(filter(None, (group.action, group.step_name))) or "-",
            group.error or "-",
        )
        for group in groups
    ]
    return "\n".join(_table(("SAGAS", "CONDITION", "SILENT", "SUCH AS", "NAME", "LAST STEP", "ERROR"), rows))


def saga_as_text(saga: SagaSummary, attempts: Sequence[StepAttempt], left_out: int, *, local: bool) -> str:
    created = _instant(saga.created_at, local=local)
    lines = [
        f"{visible(saga.name)}  {saga.id}",
        f"{saga.status.value}, {saga.condition.value}, silent for {_duration(saga.silent_for)}",
        f"created {created}, version {saga.version}, {saga.recovery_attempts} recovery attempts",
    ]
    if saga.lease_owner is not None and saga.lease_expires_at is not None:
        lines.append(f"leased to {visible(saga.lease_owner)} until {_instant(saga.lease_expires_at, local=local)}")
    if left_out:
        lines.append(f"{left_out} earlier entries left out")
    rows = [
        (
            _instant(moment, local=local) if (moment := one.started or one.ended) else "-",
            "-" if one.lasted is None else _duration(one.lasted),
            _outcome(one),
            f"{one.action} {one.step_name}",
            (f"by {one.by}: " if one.by else "") + (one.details or ""),
        )
        for one in attempts
    ]
    table = _table(("BEGAN", "TOOK", "OUTCOME", "STEP", "DETAILS"), rows) if rows else ["no history"]
    return "\n".join([*lines, "", *table])


def figures_as_facts(figures: SagaFigures) -> dict[str, Any]:
    facts: dict[str, Any] = plain(figures)
    facts["unfinished"] = [
        {"name": name, "condition": condition.value, "count": count}
        for (name, condition), count in sorted(figures.unfinished.items())
    ]
    facts["table_bytes"] = [
        {"table": table, "part": part, "bytes": size} for (table, part), size in figures.table_bytes.items()
    ]
    return facts


def figures_as_text(figures: SagaFigures) -> str:
    def about(name: str) -> str:
        return "about " if name in figures.estimated else ""

    rows = [
        (str(count), condition.value, name)
        for (name, condition), count in sorted(figures.unfinished.items(), key=lambda item: -item[1])
    ]
    head = (f"{about('unfinished')}sagas".upper(), "CONDITION", "NAME")
    finished = "unknown" if figures.finished is None else f"{about('finished')}{figures.finished}"
    return "\n".join(
        [
            *(_table(head, rows) if rows else ["none unfinished"]),
            "",
            f"oldest unfinished: {_duration(figures.oldest_unfinished)}",
            f"steps in doubt: {about('in_doubt_steps')}{figures.in_doubt_steps}",
            f"failed, of the last 24 hours: {figures.failed_24h}",
            f"finished: {finished}",
            f"log entries ever: {figures.log_entries}",
            *(f"{size:,} bytes  {table}, {part}" for (table, part), size in figures.table_bytes.items()),
            *(f"{count:,} dead rows  {table}" for table, count in figures.dead_tuples.items()),
        ]
    )


def interventions_as_text(page: InterventionPage, *, local: bool) -> str:
    rows = [
        (
            _instant(one.created_at, local=local),
            one.saga_id.hex[:8],
            one.verb,
            one.by or "?",
            one.name,
            one.reason or "",
        )
        for one in page.interventions
    ]
    lines = _table(("WHEN", "SAGA", "WHAT", "BY", "NAME", "REASON"), rows) if rows else ["none"]
    if page.unreadable:
        lines.append(f"entries that can't be read: {', '.join(map(str, page.unreadable))}")
    if page.after:
        lines.append(f"there are more: --after {page.after}")
    return "\n".join(lines)


def entry_as_text(entry: SagaLogEntry) -> str:
    since = _instant(entry.created_at, local=False)
    return f"entry {entry.id} ({entry.action} {visible(entry.step_name)}, since {since})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines in columns; on a terminal no line is longer than that is wide."""
    cells = [head, *([visible(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in cells
    ]
    if sys.stdout is not None and sys.stdout.isatty():
        room = max(shutil.get_terminal_size().columns, _NARROWEST)
        lines = [line if len(line) <= room else f"{line[: room - 1]}\N{HORIZONTAL ELLIPSIS}" for line in lines]
    return [line.rstrip() for line in lines]


def _step(saga: SagaSummary) -> str:
    last = saga.last_entry
    return f"{last.action} {last.step_name} {last.status.value}" if last else "-"


def _outcome(attempt: StepAttempt) -> str:
    if attempt.state is AttemptState.ENDED:
        return attempt.status.value
    return attempt.state.value.replace("_", " ")


def _instant(moment: datetime, *, local: bool) -> str:
    return moment.astimezone(None if local else UTC).strftime("%Y-%m-%d %H:%M:%S" + (" %z" if local else "Z"))


def _duration(duration: timedelta) -> str:
    """Return the two greatest units of it."""
    seconds = int(duration.total_seconds())
    parts: list[str] = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")):
        count, seconds = divmod(seconds, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
