"""What the verbs of retention print: facts for a machine, and text for a person."""

from datetime import UTC, datetime
from typing import Any

from saga_store.cli.sagas_shown import figures_as_facts, plain
from saga_store.inspection import SagaFigures, visible
from saga_store.retention import ArchiveReport, Found, RestoreReport, VerifyReport
from saga_store.retention_model import ArchivePage, SagaArchive
from saga_store.telling import duration

__all__ = [
    "archived_as_facts",
    "archived_as_text",
    "archives_as_text",
    "plain",
    "record_as_facts",
    "record_as_text",
    "restored_as_facts",
    "restored_as_text",
    "stats_as_facts",
    "stats_as_text",
    "verified_as_text",
]

# Of sagas or files that are named one by one.
_MOST_NAMED = 20
_CONTEXT_SHOWN = 2000


def archived_as_facts(report: ArchiveReport) -> dict[str, Any]:
    facts: dict[str, Any] = plain(report)
    facts["expired"] = [
        {"name": name, "status": status, "count": count} for (name, status), count in sorted(report.expired.items())
    ]
    return facts


def archived_as_text(report: ArchiveReport) -> str:
    if report.is_dry_run:
        lines = [f"{_amount(report.sagas, report.entries, report.bytes)} would be archived"]
        lines += [f"  {count:,} {status}  {visible(name)}" for (name, status), count in sorted(report.expired.items())]
    else:
        count, took = len(report.archives), f"{report.seconds:.1f} s"
        lines = [
            f"{_amount(report.sagas, report.entries, report.bytes)} archived in {count} archives",
            f"{report.removed:,} removed; it took {took}",
        ]
        lines += [f"  {_line(row)}" for row in report.archives[:_MOST_NAMED]]
        if len(report.archives) > _MOST_NAMED:
            lines.append(f"  and {len(report.archives) - _MOST_NAMED} more: saga-store archives lists them")
        if stayed := report.sagas - report.removed:
            lines.append(f"{stayed:,} stayed: changed meanwhile, held or locked, or left for the next run")
    if report.forgotten:
        lines.append(f"{report.forgotten:,} stubs were old enough, and forgotten")
    if report.unreadable:
        named = ", ".join(map(str, report.unreadable[:_MOST_NAMED]))
        lines.append(f"{len(report.unreadable)} can't be read and stayed: {named}")
    lines += [f"verified at another target, and its sagas not removed yet: {visible(uri)}" for uri in report.left]
    if not report.is_complete:
        lines.append("there is more: the next run goes on")
    return "\n".join(lines)


def archives_as_text(page: ArchivePage) -> str:
    lines = [_line(row) for row in page.archives] or ["none"]
    if page.after:
        lines.append(f"there are more: --after {page.after}")
    return "\n".join(lines)


def record_as_facts(found: Found) -> dict[str, Any]:
    return {"saga": plain(found.record), "archive": str(found.archive_id), "file": found.file, "line": found.line}


def record_as_text(found: Found) -> str:
    record = found.record
    context = (
        record.context if len(record.context) <= _CONTEXT_SHOWN else f"{len(record.context):,} characters; see --json"
    )
    return "\n".join(
        [
            f"{visible(record.name)}  {record.id}",
            f"{record.status.value}, version {record.version}, {record.recovery_attempts} recovery attempts",
            f"created {_minute(record.created_at)}, last changed {_minute(record.updated_at)}",
            f"from {visible(found.file)}, line {found.line}",
            f"context {visible(context)}",
            *(
                f"{entry.created_at:%Y-%m-%d %H:%M:%S}Z  {entry.status.value:11} {entry.action} "
                f"{visible(entry.step_name)}  {visible(entry.details or '')}".rstrip()
                for entry in record.entries
            ),
        ]
    )


def verified_as_text(report: VerifyReport) -> str:
    right = [archive for archive in report.archives if not archive.problem]
    sagas, entries = sum(archive.sagas for archive in right), sum(archive.entries for archive in right)
    amount = _amount(sagas, entries, sum(archive.bytes for archive in right))
    lines = [f"{len(right)} archives are what was written: {amount}"]
    lines += [f"damaged: {visible(archive.problem)}" for archive in report.archives if archive.problem]
    lines += [f"not compared: {visible(why)}" for why in report.unread]
    lines += [f"of no archive: {visible(uri)}" for uri in report.strays[:_MOST_NAMED]]
    if len(report.strays) > _MOST_NAMED:
        lines.append(f"and {len(report.strays) - _MOST_NAMED} more files of no archive")
    return "\n".join(lines)


def restored_as_facts(report: RestoreReport) -> dict[str, Any]:
    return {
        "restored": report.restored,
        "same": report.same,
        "superseded": report.superseded,
        "other": [{"id": str(saga_id), "file": file, "line": line} for saga_id, file, line in report.other],
    }


def restored_as_text(report: RestoreReport) -> str:
    lines = [f"restored {report.restored:,} sagas; {report.same:,} were there already, the same"]
    lines += [
        f"left as it is, with other content: saga {saga_id} ({visible(file)}, line {line})"
        for saga_id, file, line in report.other[:_MOST_NAMED]
    ]
    if len(report.other) > _MOST_NAMED:
        lines.append(f"and {len(report.other) - _MOST_NAMED} more")
    if report.superseded:
        lines.append(f"{report.superseded:,} older records were passed over")
    return "\n".join(lines)


# What the figures hold of space and of archives; the rest is of sagas that are at work.
_STATS = (
    "table_bytes", "dead_tuples", "hot_share", "last_vacuum", "log_entries", "finished", "estimated", "retention_lag",
    "archived_sagas", "archived_bytes", "archives_failed_24h", "last_archived_at",
    "oldest_open_archive",
)  # fmt: skip


def stats_as_facts(figures: SagaFigures) -> dict[str, Any]:
    facts = figures_as_facts(figures)
    return {name: facts[name] for name in _STATS}


def stats_as_text(figures: SagaFigures) -> str:
    lines = []
    for table in dict.fromkeys(table for table, _ in figures.table_bytes):
        parts = {part: size for (name, part), size in figures.table_bytes.items() if name == table}
        sizes = ", ".join(f"{part} {size:,}" for part, size in parts.items())
        share, vacuum = figures.hot_share.get(table), figures.last_vacuum.get(table)
        lines += [
            f"{table}: {sum(parts.values()):,} bytes ({sizes})",
            f"  {figures.dead_tuples.get(table, 0):,} dead rows, "
            + ("no updates" if share is None else f"{share:.0%} of updates HOT")
            + (", never vacuumed" if vacuum is None else f", last vacuumed {_minute(vacuum)}"),
        ]
    finished = "unknown" if figures.finished is None else f"about {figures.finished:,}"
    last = "" if figures.last_archived_at is None else f", last at {_minute(figures.last_archived_at)}"
    lines += [
        f"finished: {finished}; log entries ever: {figures.log_entries:,}",
        f"archived: {figures.archived_sagas:,} sagas, {figures.archived_bytes:,} bytes{last}",
        f"archives that failed, of the last 24 hours: {figures.archives_failed_24h}",
    ]
    if figures.oldest_open_archive:
        lines.append(f"begun and not at its end: an archive, {duration(figures.oldest_open_archive)} ago")
    if figures.retention_lag is not None:
        lines.append(f"lag behind the policy: {duration(figures.retention_lag)}")
    return "\n".join(lines)


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}Z"


def _amount(sagas: int, entries: int, size: int) -> str:
    return f"{sagas:,} sagas with {entries:,} entries, {size:,} bytes"


def _line(row: SagaArchive) -> str:
    begun = _minute(row.begun_at)
    where = "archived nowhere" if row.uri is None else visible(row.uri)
    why = f": {visible(row.error)}" if row.error else ""
    return f"{begun}  {row.state.value:8}  {row.removed:,} of {row.sagas:,} removed  {where}{why}"
