"""One saga's story for a person: a verdict, its steps over time without the silence, and what may be done."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, datetime, timedelta, tzinfo
from typing import NamedTuple

from saga_store import telling
from saga_store.cli.blocks import Bar, Block, Cell, Column, Line, Row, Table, Verbatim, cell, line, shown
from saga_store.cli.saga_filters import only_saga, zone_of
from saga_store.cli.sagas_shown import CONDITION_KINDS, MARKS, moment, number, step
from saga_store.cli.shards import places_of
from saga_store.errors import SagaArchivedError
from saga_store.inspection import (
    INTERVENTION,
    AttemptState,
    RecentHistory,
    SagaSummary,
    StepAttempt,
    fold_history,
    read_record,
)
from saga_store.inspection import SagaCondition as Condition
from saga_store.model import SagaStepStatus
from saga_store.retention.errors import ArchiveError
from saga_store.retention.showing import ArchivedSaga, ArchiveReader
from saga_store.storage import SagaStorage
from saga_store.validation import valid_count

# How much of a bar's width a silence takes that was cut out.
_CUT_SHARE = 0.04
# How much of it the last stretch takes at least, up to now, if it was cut: what is in doubt has to be seen.
_LAST_SHARE = 0.15
# So wide that a saga's whole id has room beside the verb, and the next line begins with an option.
_COMMAND_ROOM = 70
# A person waits longer than a page, and sees more.
_ARCHIVE_SECONDS, _MOST_ARCHIVED = 60.0, 64 * 2**20


def attempts_of(saga: SagaSummary, history: RecentHistory, now: datetime) -> list[StepAttempt]:
    return fold_history(history.entries, now, held=saga.condition is Condition.HELD)


@dataclass(frozen=True, slots=True)
class Telling:
    """How a story is told.

    Attributes:
        last: How many attempts, of the last ones.
        zone: In which times are told; None is the local one.
        max_attempts: After how many recovery attempts a saga counts as exhausted.
        options: What the commands that it advises need to find the database.
    """

    last: int
    zone: tzinfo | None
    max_attempts: int
    options: Mapping[str, str]


def telling_of(given: argparse.Namespace) -> Telling:
    return Telling(valid_count("last", given.last), zone_of(given), given.max_attempts, places_of(given))


class Seen(NamedTuple):
    """A saga as it was at a moment; and if it is archived, what that was read from.

    ``missing`` are shards where another one may begin like that.
    """

    saga: SagaSummary
    history: RecentHistory
    now: datetime
    archived: ArchivedSaga | None = None
    missing: tuple[int, ...] = ()


async def look(storage: SagaStorage, given: argparse.Namespace) -> Seen:
    """Look at the saga that an id leads to.

    Raises:
        InvalidSagaDataError: It leads to none, or to several.
        ArchiveError: The saga is archived, and its archive can't be read.
    """
    saga, page = await only_saga(storage, given)
    if saga.archived_at is None:
        return Seen(saga, await storage.get_recent_history(saga.id), page.at, missing=page.missing)
    reader = ArchiveReader(storage, seconds=_ARCHIVE_SECONDS, most_bytes=_MOST_ARCHIVED)
    archived = await reader.read(saga, page.at)
    if archived.found is None:
        stub = SagaArchivedError(saga.id, archived.archive, saga.archived_at)
        raise ArchiveError(f"{stub}; its record can't be shown: {archived.problem}")
    return Seen(archived.saga, archived.history, page.at, archived, page.missing)


def story(
    saga: SagaSummary, history: RecentHistory, now: datetime, how: Telling, archived: ArchivedSaga | None = None
) -> list[Block]:
    """Return all that a person should see of a saga."""
    last, zone = how.last, how.zone
    attempts = attempts_of(saga, history, now)
    doubt = saga.in_doubt or any(one.state is AttemptState.IN_DOUBT for one in attempts)
    verdict = telling.verdict(saga, attempts, now, zone=zone, max_attempts=how.max_attempts)
    blocks: list[Block] = [
        line(cell(saga.name, "strong"), cell(str(saga.id), "dim")),
        line(
            cell(saga.status.value, "bad" if saga.status.value == "FAILED" else "strong"),
            cell(saga.condition.value, CONDITION_KINDS[saga.condition]),
            cell(
                f" created {moment(saga.created_at, zone)}, {_silence_of(saga)}"
                f"version {saga.version}, {number(saga.recovery_attempts, 'recovery attempt')}{_kept(saga, zone)}",
                "dim",
            ),
        ),
        line(cell(verdict, "doubt" if doubt else CONDITION_KINDS[saga.condition].replace("dim", "strong"))),
        *_source(archived, zone),
        line(),
    ]
    left_out = len(attempts) - last
    if history.left_out or left_out > 0:
        parts = [f"{history.left_out} earlier entries"] if history.left_out else []
        parts += [f"{left_out} of the attempts after them"] if left_out > 0 and parts else []
        parts += [] if parts else [f"{left_out} earlier attempts"]
        blocks.append(line(cell(f"{' and '.join(parts)} left out; --last shows more attempts", "dim")))
    seen = attempts[-last:] if last else []
    if seen:
        blocks.append(_timeline(seen, now, zone, silent=_is_silent(saga)))
    elif not attempts:
        blocks.append(line("no history"))
    if saga.last_error is not None and saga.last_error.details and "\n" in saga.last_error.details:
        blocks += [line(), line(cell(f"What {saga.last_error.step_name} failed with last:", "bad"))]
        blocks += shown(saga.last_error.details, indent=4)
    advices = telling.advice(saga, attempts, options=how.options)
    for index, advice in enumerate(advices):
        blocks += [line(), line(cell("What may be done:", "strong"))] if not index else []
        blocks += [line(f"{advice.when}:", indent=2), Verbatim(continued(advice.command))]
    return blocks


def continued(command: str) -> str:
    """Return a command in lines that may be copied as they are, each but the last continued by a backslash."""
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if parts and parts[-1].startswith("--") and " " not in parts[-1]:
            parts[-1] += f" {word}"  # an option stays beside its value
        else:
            parts.append(word)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 1 > _COMMAND_ROOM:
            lines.append(part)
        else:
            lines[-1] += f" {part}"
    return "    " + " \\\n      ".join(lines)


def _source(archived: ArchivedSaga | None, zone: tzinfo | None) -> list[Line]:
    if archived is None or archived.found is None or archived.saga.archived_at is None:
        return []
    found, at = archived.found, moment(archived.saga.archived_at, zone)
    return [line(cell(f"archived {at}, and read from {found.file}, line {found.line}", "warning"))]


def _kept(saga: SagaSummary, zone: tzinfo | None) -> str:
    if saga.retain_until is None:
        return ""
    until = "released" if saga.retain_until.year == MAXYEAR else moment(saga.retain_until, zone)
    return f", kept until {until}"


def _silence_of(saga: SagaSummary) -> str:
    return "" if saga.condition is Condition.FINISHED else f"silent for {telling.duration(saga.silent_for)}, "


def _is_silent(saga: SagaSummary) -> bool:
    return saga.condition in {Condition.EXHAUSTED, Condition.ABANDONED, Condition.STALE}


def _timeline(attempts: Sequence[StepAttempt], now: datetime, zone: tzinfo | None, *, silent: bool) -> Table:
    pieces = telling.stretches(attempts, now if silent or _is_open(attempts) else _end(attempts, now))
    began = pieces[0].began if pieces else now
    days = {telling.in_zone(one.started or one.ended or now, zone).date() for one in attempts}
    scale = _Scale(pieces, "%H:%M:%S" if len(days) == 1 else "%m-%d %H:%M:%S")
    columns = (
        Column("BEGAN", least=8),
        Column("AFTER", least=8, right=True, leaves=1),
        Column("STEP", least=16, likes=40, wraps=True),
        Column("OUTCOME", least=9, leaves=2),
        Column("TOOK", least=7, right=True),
        Column("", least=0),
    )
    rows: list[Row] = []
    cuts = [piece for piece in pieces if piece.is_cut]
    for one in attempts:
        at = one.started or one.ended or now
        while cuts and cuts[0].ended <= at:
            rows.append(_silence(cuts.pop(0).lasted, len(columns)))
        rows.append(_attempt(one, at, at - began, now, zone, scale))
    rows += [_silence(cut.lasted, len(columns), ends=True) for cut in cuts]
    return Table(columns, tuple(rows))


def _is_open(attempts: Sequence[StepAttempt]) -> bool:
    return any(one.state in {AttemptState.IN_DOUBT, AttemptState.RUNNING} for one in attempts)


def _end(attempts: Sequence[StepAttempt], now: datetime) -> datetime:
    return max((one.ended or one.started or now for one in attempts), default=now)


def _attempt(  # noqa: PLR0913, PLR0917 - an attempt, and how to tell it
    one: StepAttempt, at: datetime, after: timedelta, now: datetime, zone: tzinfo | None, scale: "_Scale"
) -> Row:
    kind = _kind(one)
    if telling.is_intervention(one):
        name = cell(one.step_name.removeprefix(INTERVENTION), kind, mark=MARKS[kind])
    else:
        name = step(one.step_name, one.action, kind)
    outcome = telling.outcome(one) + (f", says {one.by}" if one.by and not telling.is_intervention(one) else "")
    said = _said(one)
    return Row(
        (
            cell(telling.in_zone(at, zone).strftime(scale.clock), "dim"),
            cell(f"+{telling.duration(after)}", "dim"),
            name,
            cell("" if telling.is_intervention(one) else outcome, kind),
            cell("" if one.lasted is None else telling.duration(one.lasted), kind if kind == "doubt" else ""),
            Bar(scale.bar(one, at, now, kind)),
        ),
        None if said is None else Cell(said, "bad" if kind == "bad" else "dim"),
    )


def _said(one: StepAttempt) -> str | None:
    if telling.is_intervention(one):
        by, reason, _ = read_record(one.details)
        return f"by {cell(by or '?').text}: {telling.headline(reason) or 'no reason is told'}"
    return telling.headline(one.details)


def _kind(one: StepAttempt) -> str:
    if telling.is_intervention(one):
        return "person"
    match one.state:
        case AttemptState.IN_DOUBT | AttemptState.SUPERSEDED:
            return "doubt"
        case AttemptState.RUNNING:
            return "held"
    return "bad" if one.status is SagaStepStatus.FAILED else "good"


def _silence(lasted: timedelta, columns: int, *, ends: bool = False) -> Row:
    said = f"\N{BOX DRAWINGS LIGHT QUADRUPLE DASH HORIZONTAL} nothing for {telling.duration(lasted)}"
    blank = Cell("")
    cells: tuple[Cell | Bar, ...] = (
        blank,
        blank,
        Cell(said, "warning" if ends else "dim"),
        *[blank] * (columns - 4),
        Bar(()),
    )
    return Row(cells)


class _Scale:
    """Where on a bar a time is drawn, stretches to scale and silences cut short; and how it is written."""

    def __init__(self, pieces: Sequence[telling.Stretch], clock: str) -> None:
        self.clock = clock
        self._pieces = pieces
        shares = [_CUT_SHARE if piece.is_cut else 0.0 for piece in pieces]
        if pieces and pieces[-1].is_cut:
            shares[-1] = _LAST_SHARE
        drawn = sum((piece.lasted for piece in pieces if not piece.is_cut), timedelta())
        left = 1 - sum(shares)
        whole = [index for index, piece in enumerate(pieces) if not piece.is_cut]
        for index in whole:
            shares[index] = left * (pieces[index].lasted / drawn if drawn else 1 / len(whole))
        self._shares = shares

    def bar(self, one: StepAttempt, at: datetime, now: datetime, kind: str) -> tuple[tuple[float, float, str], ...]:
        cuts = []
        position = 0.0
        for piece, share in zip(self._pieces, self._shares, strict=True):
            if piece.is_cut:
                cuts.append((position + share / 2, position + share / 2, "cut"))
            position += share
        open_ended = one.state in {AttemptState.IN_DOUBT, AttemptState.RUNNING}
        end = now if open_ended else one.ended or at
        return (*cuts, (self._at(at), self._at(max(end, at)), kind))

    def _at(self, moment: datetime) -> float:
        position = 0.0
        for piece, share in zip(self._pieces, self._shares, strict=True):
            if moment < piece.ended:
                passed = (moment - piece.began) / piece.lasted if piece.lasted else 0.0
                return position + share * max(passed, 0.0)
            position += share
        return position
