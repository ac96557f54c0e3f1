"""What a view of sagas needs: what is asked, what is shown, and how a history reads; no I/O.

A saga's *condition* is derived, never stored. What a view tells of a history goes by its last ``HISTORY_SEEN``
entries, or by fewer if many histories are looked at for an answer. Of details that are longer than ``DETAILS_SHOWN``
characters the middle is left out. So no saga costs a view more than another.
"""

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from operator import attrgetter
from typing import Any, Self
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.model import UNFINISHED, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.remedies import show
from saga_store.validation import (
    decode_context,
    encode_context,
    valid_count,
    valid_name,
    valid_period,
    valid_status,
)

STALE_AFTER = timedelta(minutes=10)
MAX_ATTEMPTS = 5
HISTORY_SEEN = 1000
"""How many of a saga's entries a view looks at, the last ones."""
ENTRIES_SEEN = 500_000
"""How many entries of all sagas together a view looks at, if it has to read histories to find what is asked for."""
FEWEST_SEEN = 100
"""How many of each saga's it looks at then in any case."""
DETAILS_SHOWN = 2000
"""How many characters of an entry's details a view shows: of what is longer, as many of its beginning as of its end."""
SAGAS_SEEN = 5000
"""Of how many sagas of a kind a view reads histories to find what is asked for: the oldest unfinished ones, the newest
finished ones."""
RECORD_SHOWN = 100_000
"""How many characters of an intervention's record are read."""
CONTEXT_SHOWN = 1_000_000
"""How many bytes a context may have to be shown."""
MOST_COUNTED = 100_000
"""At how many ``count_sagas`` stops, and ``get_figures`` of each kind."""
FINISHED_WINDOW = timedelta(hours=24)
"""How far a search goes back among finished sagas, unless the query says ``created_after``."""
INTERVENTION = "saga_store."
"""How the step names begin under which interventions are recorded."""
SETTLED = f"{INTERVENTION}settle_step"
"""The step name of the record of a settlement."""


class SagaCondition(StrEnum):
    """How a saga is doing; of several that hold it is the first."""

    FINISHED = "finished"
    """COMPLETED or FAILED."""
    HELD = "held"
    """Somebody's lease lasts."""
    EXHAUSTED = "exhausted"
    """Its recovery attempts are used up."""
    ABANDONED = "abandoned"
    """Its lease has expired."""
    STALE = "stale"
    """Under no lease, and silent for ``stale_after``."""
    ACTIVE = "active"
    """None of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaQuery:
    """Which sagas are asked for: those of which all that is given here is so.

    Attributes:
        statuses: In one of these statuses; empty: in any.
        conditions: In one of these conditions; empty: in any.
        name: Of this name.
        step: Whose last entry is of this step; interventions don't count.
        lease_owner: With a lease of this owner's, whether it lasts or has expired.
        silent_for: Silent for this long at least.
        created_after: Created at this time or later.
        created_before: Created before this time.
        context: Whose context has these fields with these values, equal as JSON: 1 equals 1.0, and not true.
        in_doubt: Whether a step of it is in doubt.
        id_prefix: Whose id begins by these hexadecimal digits, hyphens left out or not.
        stale_after: After how much silence a saga counts as stale.
        max_attempts: After how many recovery attempts one counts as exhausted.

    A query for name, step, owner, silence, context or doubt that doesn't say ``created_after`` finds finished sagas
    of the last 24 hours only.
    """

    statuses: Sequence[SagaStatus] = ()
    conditions: Sequence[SagaCondition] = ()
    name: str | None = None
    step: str | None = None
    lease_owner: str | None = None
    silent_for: timedelta | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    context: Mapping[str, Any] | None = None
    in_doubt: bool | None = None
    id_prefix: str | None = None
    stale_after: timedelta = STALE_AFTER
    max_attempts: int = MAX_ATTEMPTS

    @property
    def searches(self) -> bool:
        """Whether it asks for what no index knows."""
        asked = (self.name, self.step, self.lease_owner, self.silent_for, self.context, self.in_doubt)
        return any(value is not None for value in asked)

    @property
    def asks_histories(self) -> bool:
        """Whether a saga's row alone doesn't tell if it is asked for."""
        asked = (self.step, self.silent_for, self.in_doubt)
        tells_stale_apart = (SagaCondition.STALE in self.conditions) != (SagaCondition.ACTIVE in self.conditions)
        return tells_stale_apart or any(value is not None for value in asked)


@dataclass(frozen=True, slots=True)
class SagaSummary:
    """A saga without its context, and how it is doing.

    Attributes:
        id: As in ``SagaExecution``, and so the next ones.
        name: Likewise.
        status: Likewise.
        version: Likewise.
        recovery_attempts: Likewise.
        lease_owner: Who holds its lease, or held the one that has expired.
        lease_expires_at: Until when.
        created_at: As in ``SagaExecution``.
        updated_at: Likewise.
        condition: How it is doing.
        in_doubt: Whether a step has STARTED and nothing says how it ended; never while somebody's lease lasts.
        silent_for: For how long neither its row nor its history has changed, interventions left out.
        last_entry: The last entry of its history that is no intervention.
        last_error: The last FAILED entry of a step that hasn't succeeded since.
        archived_at: When it was archived and let go, so that this is its stub; None: it is here.
        retain_until: Until when it is held, whatever a policy says; ``datetime.max`` in UTC until it is released.
    """

    id: UUID
    name: str
    status: SagaStatus
    version: int
    recovery_attempts: int
    lease_owner: str | None
    lease_expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    condition: SagaCondition
    in_doubt: bool
    silent_for: timedelta
    last_entry: SagaLogEntry | None
    last_error: SagaLogEntry | None
    archived_at: datetime | None = None
    retain_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class SagaPage:
    """Some of the sagas that were asked for, newest first.

    Attributes:
        sagas: What is on this page.
        at: When all of it was so, by the database's clock.
        after: Where the next page begins; None on the last one.
        unreadable: Sagas that belong on this page and whose rows Python can't hold, such as one created at -infinity.
        finished_since: Finished sagas that were created before this weren't looked at; None: all were.
        is_partial: Of too many sagas the histories would have had to be read: of the unfinished ones only the oldest
            were looked at, of the finished ones only the newest.
        missing: The shards that couldn't be asked, of a storage that is made of several.
    """

    sagas: list[SagaSummary]
    at: datetime
    after: str | None = None
    unreadable: tuple[UUID, ...] = ()
    finished_since: datetime | None = None
    is_partial: bool = False
    missing: tuple[int, ...] = ()


class SagaCount(int):
    """How many sagas there are; ``is_partial`` if there may be more that weren't looked at.

    ``missing`` are the shards that couldn't be asked, as in ``SagaPage``.
    """

    is_partial: bool
    missing: tuple[int, ...]

    def __new__(cls, count: int, *, is_partial: bool = False, missing: tuple[int, ...] = ()) -> Self:
        self = super().__new__(cls, count)
        self.is_partial = is_partial
        self.missing = missing
        return self


@dataclass(frozen=True, slots=True)
class SagaGroup:
    """Sagas of one name that stand at the same step in the same condition, with the same error.

    Attributes:
        condition: Their condition.
        name: Their name.
        step_name: The step of their last entries; None if they have none.
        action: Likewise.
        error: What their last errors have in common (see ``fingerprint``).
        count: How many they are.
        in_doubt: How many of them have a step in doubt.
        silent_for: The longest silence.
        stopped: Since when each of them is silent, the earliest first.
        examples: The ids of those that are silent for longest, at most three.
        never_claimed: How many of them no worker has ever claimed, nor holds.
        failed: How many of them have a last entry that is FAILED.
        lease_owners: Whose leases they are or were under, at most three.
        is_partial: There may be more of them, for not all sagas were looked at.
    """

    condition: SagaCondition
    name: str
    step_name: str | None
    action: StepAction | None
    error: str | None
    count: int
    in_doubt: int
    silent_for: timedelta
    stopped: tuple[datetime, ...]
    examples: tuple[UUID, ...]
    is_partial: bool = False
    never_claimed: int = 0
    failed: int = 0
    lease_owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Intervention:
    """What a person did to a saga.

    Attributes:
        entry_id: The id of the entry that records it.
        saga_id: The saga.
        name: The saga's name.
        verb: What was done, by the name of the method: ``give_up_saga``, ``settle_step``.
        by: Who did it; None if the record can't be read.
        reason: Why; all that is recorded, if the record can't be read.
        before: What else the record says: what was there before, and which step was settled.
        created_at: When.
    """

    entry_id: int
    saga_id: UUID
    name: str
    verb: str
    by: str | None
    reason: str | None
    before: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class InterventionPage:
    """Some of the interventions that were asked for, newest first; ``after`` begins the next page, if there is one.

    ``missing`` are the shards that couldn't be asked, as in ``SagaPage``.
    """

    interventions: list[Intervention]
    after: str | None = None
    unreadable: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RecentHistory:
    """The end of a saga's history, in its order, with details cut; ``left_out`` entries come before it."""

    entries: list[SagaLogEntry]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class ContextPeek:
    """A saga's context, unless it is too big to look at.

    Attributes:
        size: How many bytes it has as JSON.
        context: The context; None if it has more than were asked for.
    """

    size: int
    context: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class SagaFigures:
    """What is worth counting all day.

    Attributes:
        unfinished: How many unfinished sagas there are, by name and condition; of more than 100,000 the oldest count.
        oldest_unfinished: How long ago the oldest unfinished saga was created; zero if there is none.
        in_doubt_steps: How many steps are in doubt, of unfinished sagas and of those FAILED that were created in the
            last 24 hours.
        failed_24h: How many sagas are FAILED that were created in the last 24 hours, up to 100,000.
        finished: About how many sagas are finished; None if the statistics don't know.
        log_entries: The id of the newest entry: how many have ever been written, or a little more.
        table_bytes: How big a table is, by its name and by part: heap, toast, indexes.
        dead_tuples: How many dead rows a table has, as the statistics have it.
        estimated: The names of those figures that are estimates in this answer.
        hot_share: Of the updates of a table's rows, how many needed no index entry, 0 to 1; None without updates.
        last_vacuum: When a table was last vacuumed, by itself or by a person; None: never since the statistics began.
        retention_lag: For how long the oldest saga that should have been let go has been so, as far as looks at the
            oldest 200,000 rows, and at as many from where the last archive ended, tell; None if no policy was given.
        archived_sagas: How many sagas have been let go.
        archived_bytes: How big the objects of their archives are together.
        archives_failed_24h: How many archives have failed that were begun in the last 24 hours.
        last_archived_at: When an archive was last verified.
        oldest_open_archive: How long ago the oldest archive was begun that is neither REMOVED nor FAILED; zero if none.
        missing: The shards that couldn't be asked, and that aren't counted here; as in ``SagaPage``.
        shards: Of a storage that is made of several: the figures of each that could be asked, by its place.
    """

    unfinished: Mapping[tuple[str, SagaCondition], int]
    oldest_unfinished: timedelta
    in_doubt_steps: int
    failed_24h: int
    finished: int | None
    log_entries: int
    table_bytes: Mapping[tuple[str, str], int]
    dead_tuples: Mapping[str, int]
    estimated: tuple[str, ...] = ()
    hot_share: Mapping[str, float | None] = field(default_factory=dict)
    last_vacuum: Mapping[str, datetime | None] = field(default_factory=dict)
    retention_lag: timedelta | None = None
    archived_sagas: int = 0
    archived_bytes: int = 0
    archives_failed_24h: int = 0
    last_archived_at: datetime | None = None
    oldest_open_archive: timedelta = timedelta()
    missing: tuple[int, ...] = ()
    shards: Mapping[int, "SagaFigures"] = field(default_factory=dict)


class AttemptState(StrEnum):
    """What is known of an attempt at a step."""

    ENDED = "ended"
    """Its history says how it ended."""
    RUNNING = "running"
    """It has started, and somebody's lease lasts."""
    IN_DOUBT = "in_doubt"
    """It has started, and nothing says how it ended."""
    SUPERSEDED = "superseded"
    """Nothing says how it ended, but a later attempt at the same step did end."""


@dataclass(frozen=True, slots=True)
class StepAttempt:
    """One attempt at doing or undoing a step, as its entries tell it; or an intervention.

    Attributes:
        step_name: The step.
        action: Whether it is done or undone.
        started: When it started; None if only its end was logged.
        ended: When it ended; None if nothing says so.
        status: How it ended, or STARTED.
        state: What is known of it.
        details: Of its end, or else of its start.
        lasted: From its start to its end, or until now if it may be going on; None if one of them isn't known.
        by: The person who settled it, or who intervened.
        entry_id: The id of its first entry.
    """

    step_name: str
    action: StepAction
    started: datetime | None
    ended: datetime | None
    status: SagaStepStatus
    state: AttemptState
    details: str | None
    lasted: timedelta | None
    by: str | None
    entry_id: int


def fold_history(entries: Iterable[SagaLogEntry], now: datetime, *, held: bool = False) -> list[StepAttempt]:
    """Pair the entries of a history into attempts, in the order of their first entries.

    Args:
        entries: A saga's history, in its order.
        now: The database's time.
        held: Whether somebody's lease lasts: then what has started is running, and not in doubt.
    """
    attempts: list[StepAttempt] = []
    open_by_lane: dict[tuple[str, StepAction], list[int]] = {}
    by_entry: dict[int, int] = {}
    open_state = AttemptState.RUNNING if held else AttemptState.IN_DOUBT
    for entry in entries:
        if entry.status is SagaStepStatus.STARTED:
            open_by_lane.setdefault((entry.step_name, entry.action), []).append(len(attempts))
            by_entry[entry.id] = len(attempts)
            lasted = max(now - entry.created_at, timedelta())
            attempts.append(_attempt(entry, entry.created_at, None, open_state, lasted))
            continue
        *earlier, last = open_by_lane.pop((entry.step_name, entry.action), (None,))
        for index in earlier:
            attempts[index] = replace(attempts[index], state=AttemptState.SUPERSEDED, lasted=None)
        if last is not None:
            attempts[last] = _ended(attempts[last], entry)
            continue
        person = None
        if entry.step_name.startswith(INTERVENTION):
            person, _, rest = read_record(entry.details)
            settled = by_entry.get(rest["entry_id"]) if isinstance(rest.get("entry_id"), int) else None
            if settled is not None:
                attempts[settled] = replace(attempts[settled], by=person)
        attempts.append(_attempt(entry, None, entry.created_at, AttemptState.ENDED, None, person))
    return attempts


def _attempt(  # noqa: PLR0913, PLR0917 - what differs between the two kinds of entries that begin one
    entry: SagaLogEntry,
    started: datetime | None,
    ended: datetime | None,
    state: AttemptState,
    lasted: timedelta | None,
    by: str | None = None,
) -> StepAttempt:
    return StepAttempt(
        entry.step_name, entry.action, started, ended, entry.status, state, entry.details, lasted, by, entry.id
    )


def _ended(attempt: StepAttempt, end: SagaLogEntry) -> StepAttempt:
    return replace(
        attempt,
        ended=end.created_at,
        status=end.status,
        state=AttemptState.ENDED,
        details=attempt.details if end.details is None else end.details,
        # Times come from transactions that may have overtaken each other.
        lasted=None if attempt.started is None else max(end.created_at - attempt.started, timedelta()),
    )


# What differs between two occurrences of one error, the longest first.
_VARIABLE = re.compile(
    r"""
    [0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}  # a UUID
    | \b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?:\s?Z|[+-]\d\d:?\d\d)?)?  # an instant
    | \b0x[0-9a-f]+  # an address in memory
    | (?:\b[0-9a-f]{1,4}:|::)(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{0,4}  # one of IPv6
    | \b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?  # one of IPv4, and a port
    | \b(?=[a-f]*\d)[0-9a-f]{8,}\b  # a hash
    | \d+(?:[.,_]\d+)*  # a number
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MOST_OF_AN_ERROR = 200


def fingerprint(details: str | None) -> str | None:
    """Return what an error has in common with others of its kind: its numbers, ids and addresses become ``#``.

    Of a traceback it is the last line, of any other text the first that isn't blank.
    """
    line = telling_line(cut_details(details))
    return None if line is None else " ".join(_VARIABLE.sub("#", line).split())[:_MOST_OF_AN_ERROR]


# How Python draws the tracebacks of an exception group beside each other.
_GROUP_DRAWING = re.compile(r"(?:[\s|+-]*-+ (?:\d+|\.\.\.) -+|[\s|+-]*)\s*")


def telling_line(details: str | None) -> str | None:
    """Return the line of an error that says most: of a traceback the last, of any other text the first."""
    lines = [line.strip() for line in (details or "").splitlines() if line.strip()]
    if not lines:
        return None
    if "Exception Group Traceback " in lines[0]:
        lines = [line for line in (_GROUP_DRAWING.sub("", line, count=1) for line in lines) if line]
        return lines[-1]
    return lines[-1] if lines[0].startswith("Traceback ") else lines[0]


# Neither letters nor marks to the eye, though Unicode says they are.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, range(0xFE00, 0xFE10)))
    + "".join(map(chr, range(0xE0100, 0xE01F0)))
    # Colours of a skin, which change what stands before them, and are told to be of any width.
    + "".join(map(chr, range(0x1F3FB, 0x1F400)))
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\x1b": r"\e"}
# Control, format (the bidi ones among them), surrogate, private, unassigned, and blanks of every kind.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
_LAST_OF_LATIN_1, _LAST_OF_BMP = 0xFF, 0xFFFF


def visible(text: str) -> str:
    r"""Return the text with every control, bidi and invisible character written out, such as ``\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join([_spelled(character) for character in text])


def _spelled(character: str) -> str:
    if character == " " or (unicodedata.category(character) not in _UNSEEN and character not in _INVISIBLE):
        return character
    if character in _SHORT:
        return _SHORT[character]
    point = ord(character)
    if point <= _LAST_OF_LATIN_1:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= _LAST_OF_BMP else f"\\U{point:08x}"


# What both storages do with a query, a row and a record. ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page ended: the key of its last saga, ``created_at`` in UTC as PostgreSQL writes it in JSON."""

    created_at: str
    id: UUID

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(f"{self.created_at} {self.id.hex}".encode()).decode().rstrip("=")


_CURSOR = re.compile(r"(-?infinity|\d{4,6}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?: BC)?) ([0-9a-f]{32})")


def read_cursor(after: object) -> Cursor | None:
    if after is None:
        return None
    if isinstance(after, str) and after.isascii():
        try:
            found = _CURSOR.fullmatch(base64.b64decode(after + "=" * (-len(after) % 4), b"-_", validate=True).decode())
        except ValueError:
            found = None
        if found:
            return Cursor(found[1], UUID(hex=found[2]))
    raise InvalidSagaDataError("after", f"must be what a page gave as its `after`, not {after!r:.60}")


def read_entry_cursor(after: object) -> int | None:
    """Return where a page of interventions ended, which is an entry's id."""
    if after is None:
        return None
    if isinstance(after, str) and re.fullmatch(r"[0-9]{1,19}", after, re.ASCII):
        return min(int(after), 2**63 - 1)
    raise InvalidSagaDataError("after", f"must be what a page gave as its `after`, not {after!r:.60}")


def checked_query(query: object) -> SagaQuery:
    """Return the query, checked and copied."""
    if not isinstance(query, SagaQuery):
        raise InvalidSagaDataError("query", f"must be a SagaQuery, not {show(query)}; make one of it")
    return SagaQuery(
        statuses=tuple(valid_status(status) for status in _several("statuses", query.statuses)),
        conditions=tuple(_condition(condition) for condition in _several("conditions", query.conditions)),
        name=_name("name", query.name),
        step=_name("step", query.step),
        lease_owner=_name("lease_owner", query.lease_owner),
        silent_for=None if query.silent_for is None else valid_period("silent_for", query.silent_for),
        created_after=None if query.created_after is None else valid_moment("created_after", query.created_after),
        created_before=None if query.created_before is None else valid_moment("created_before", query.created_before),
        context=None if query.context is None else _fields(query.context),
        in_doubt=_bool("in_doubt", query.in_doubt),
        id_prefix=_id_prefix(query.id_prefix),
        stale_after=valid_period("stale_after", query.stale_after),
        max_attempts=valid_count("max_attempts", query.max_attempts),
    )


def valid_moment(field_name: str, moment: object) -> datetime:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidSagaDataError(
            field_name, f"must be a datetime with a time zone, not {moment!r}; give it one, such as datetime.UTC"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError as exc:
        raise InvalidSagaDataError(field_name, f"must be a time between the years 1 and 9999, not {moment!r}") from exc


def _several(field_name: str, values: object) -> Sequence[object]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidSagaDataError(field_name, f"must be a sequence, not {show(values)}; put it in a list")
    return list(values)


def _condition(value: object) -> SagaCondition:
    if isinstance(value, str) and value in set(SagaCondition):
        return SagaCondition(value)
    raise InvalidSagaDataError("conditions", f"must be some of {', '.join(SagaCondition)}, not {value!r:.60}")


def _name(field_name: str, value: object) -> str | None:
    return None if value is None else valid_name(field_name, value)


def _fields(context: object) -> dict[str, Any]:
    return decode_context(encode_context(dict(context) if isinstance(context, Mapping) else context))


def _bool(field_name: str, value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise InvalidSagaDataError(field_name, f"must be a bool or None, not {value!r:.60}")


def _id_prefix(prefix: object) -> str | None:
    if prefix is None:
        return None
    digits = prefix.replace("-", "").lower() if isinstance(prefix, str) else ""
    if not re.fullmatch(r"[0-9a-f]{1,32}", digits):
        raise InvalidSagaDataError(
            "id_prefix", f"must be 1 to 32 hexadecimal digits, with or without hyphens, not {prefix!r:.60}"
        )
    return digits


def id_range(prefix: str) -> tuple[UUID, UUID]:
    """Return the first and the last id that begins by these digits."""
    return UUID(hex=prefix.ljust(32, "0")), UUID(hex=prefix.ljust(32, "f"))


def is_windowed(query: SagaQuery, *, counts: bool = False) -> bool:
    """Whether only finished sagas of the last 24 hours are looked at.

    That is so if the query searches, or if it is for counting, and doesn't say from when on.
    """
    return (query.searches or counts) and query.created_after is None and not set(statuses(query)) <= set(UNFINISHED)


def statuses(query: SagaQuery) -> tuple[SagaStatus, ...]:
    """Return the statuses in which a saga may be asked for."""
    asked = query.statuses or tuple(SagaStatus)
    if not query.conditions:
        return tuple(asked)
    finished, living = SagaCondition.FINISHED in query.conditions, set(query.conditions) != {SagaCondition.FINISHED}
    return tuple(status for status in asked if (living if status in UNFINISHED else finished))


def kinds(query: SagaQuery) -> list[tuple[SagaStatus, ...]]:
    """Return the kinds of sagas that are asked for, each of which has an index of its own."""
    asked = statuses(query)
    every_kind = (UNFINISHED, (SagaStatus.FAILED,), (SagaStatus.COMPLETED,))
    return [some for kind in every_kind if (some := tuple(status for status in kind if status in asked))]


@dataclass(frozen=True, slots=True)
class HistoryDigest:
    """What a view needs of a history.

    Attributes:
        last: Its last entry that is no intervention.
        error: The last FAILED entry of a step that hasn't succeeded since.
        in_doubt: How many steps are in doubt.
        changed_at: When it last changed, other than by a person.
        intervened_at: When persons intervened.
    """

    last: SagaLogEntry | None
    error: SagaLogEntry | None
    in_doubt: int
    changed_at: datetime | None
    intervened_at: frozenset[datetime]

    def silent_since(self, created_at: datetime, updated_at: datetime) -> datetime:
        """Return when a saga with this row last showed life.

        All that one statement writes has one time, so an intervention is told by its time from what others wrote.
        """
        changed_at = created_at if updated_at in self.intervened_at else updated_at
        return changed_at if self.changed_at is None else max(changed_at, self.changed_at)


def digest(history: Sequence[SagaLogEntry], seen: int = HISTORY_SEEN) -> HistoryDigest:
    recent = history[-seen:]
    intervened_at = frozenset(entry.created_at for entry in recent if entry.step_name.startswith(INTERVENTION))
    own = [entry for entry in recent if not entry.step_name.startswith(INTERVENTION)]
    started: dict[tuple[str, StepAction], bool] = {}
    errors: dict[tuple[str, StepAction], SagaLogEntry] = {}
    for entry in own:
        lane = entry.step_name, entry.action
        started[lane] = entry.status is SagaStepStatus.STARTED
        if entry.status is SagaStepStatus.FAILED:
            errors[lane] = entry
        elif entry.status is not SagaStepStatus.STARTED:
            errors.pop(lane, None)
    return HistoryDigest(
        cut(own[-1]) if own else None,
        cut(max(errors.values(), key=attrgetter("id"))) if errors else None,
        sum(started.values()),
        max((entry.created_at for entry in own if entry.created_at not in intervened_at), default=None),
        intervened_at,
    )


def in_doubt(history: Sequence[SagaLogEntry]) -> list[SagaLogEntry]:
    """Return the entries of steps that have STARTED, and of which nothing says how they ended."""
    ends = {
        (entry.step_name, entry.action): entry.id for entry in history if entry.status is not SagaStepStatus.STARTED
    }
    return [
        entry
        for entry in history
        if entry.status is SagaStepStatus.STARTED and entry.id > ends.get((entry.step_name, entry.action), 0)
    ]


def last_in_doubt(history: Sequence[SagaLogEntry]) -> list[SagaLogEntry]:
    """Return of the entries in doubt the last of each step and action, with which all of them end."""
    doubts = in_doubt(history)
    last = {(entry.step_name, entry.action): entry.id for entry in doubts}
    return [entry for entry in doubts if entry.id == last[entry.step_name, entry.action]]


def cut(entry: SagaLogEntry) -> SagaLogEntry:
    """Return the entry with its details as a view shows them."""
    return replace(entry, details=cut_details(entry.details))


def cut_details(details: str | None) -> str | None:
    if details is None or len(details) <= DETAILS_SHOWN:
        return details
    return cut_between(details[: DETAILS_SHOWN // 2], details[-DETAILS_SHOWN // 2 :])


def cut_between(beginning: str, end: str) -> str:
    """Return details whose middle is left out: an error's beginning says where, and its end says what."""
    return f"{beginning}\N{HORIZONTAL ELLIPSIS}{end}"


def history_seen(sagas: int) -> int:
    """Return how many entries of each are looked at if the histories of so many sagas are."""
    return max(FEWEST_SEEN, min(HISTORY_SEEN, ENTRIES_SEEN // max(sagas, 1)))


def group(summaries: Iterable[SagaSummary], now: datetime, *, is_partial: bool = False) -> list[SagaGroup]:
    """Return the groups that these sagas make, the biggest first."""
    members: dict[tuple[Any, ...], list[SagaSummary]] = {}
    for saga in summaries:
        step = (saga.last_entry.step_name, saga.last_entry.action) if saga.last_entry else (None, None)
        error = fingerprint(saga.last_error.details) if saga.last_error else None
        members.setdefault((saga.condition, saga.name, *step, error), []).append(saga)
    groups = []
    for (condition, name, step_name, action, error), sagas in members.items():
        sagas.sort(key=lambda saga: (-saga.silent_for, saga.id))
        groups.append(
            SagaGroup(
                condition,
                name,
                step_name,
                action,
                error,
                count=len(sagas),
                in_doubt=sum(saga.in_doubt for saga in sagas),
                silent_for=sagas[0].silent_for,
                stopped=tuple(now - saga.silent_for for saga in sagas),
                examples=tuple(saga.id for saga in sagas[:3]),
                is_partial=is_partial,
                never_claimed=sum(saga.recovery_attempts == 0 and saga.lease_owner is None for saga in sagas),
                failed=sum(
                    saga.last_entry is not None and saga.last_entry.status is SagaStepStatus.FAILED for saga in sagas
                ),
                lease_owners=tuple(sorted({saga.lease_owner for saga in sagas if saga.lease_owner is not None})[:3]),
            )
        )
    return sorted(groups, key=lambda one: (-one.count, -one.silent_for, one.examples))


def is_equal_json(one: object, other: object) -> bool:
    """Whether two values are equal as PostgreSQL's jsonb has it."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return Decimal(repr(one)) == Decimal(repr(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal_json, one, other))
    return type(one) is type(other) and one == other


def record(by: str, reason: str, rest: Mapping[str, object]) -> str:
    """Return what the history keeps of an intervention; ``by`` comes first, which ``record_prefix`` relies on."""
    return json.dumps({"by": by, "reason": reason} | dict(rest), ensure_ascii=False)


def record_prefix(by: str) -> str:
    """Return how the records of this person's interventions begin."""
    return json.dumps({"by": by}, ensure_ascii=False)[:-1] + ", "


def read_record(details: str | None) -> tuple[str | None, str | None, dict[str, Any]]:
    """Return who, why and the rest; what can't be read is all given as the reason."""
    try:
        found = json.loads(details or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("by"), str) or not isinstance(found.get("reason"), str):
        return None, cut_details(details), {}
    return found.pop("by"), found.pop("reason"), found


def intervention(entry: SagaLogEntry, name: str) -> Intervention:
    by, reason, before = read_record(None if entry.details is None else entry.details[:RECORD_SHOWN])
    verb = entry.step_name.removeprefix(INTERVENTION)
    return Intervention(entry.id, entry.saga_id, name, verb, by, reason, before, entry.created_at)
