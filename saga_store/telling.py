"""What a view says of sagas in words, and how it draws time: one telling for the terminal and the pages; no I/O.

Whatever a name, an owner or an error holds, every text that comes from here is ``visible``.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from saga_store.inspection import (
    INTERVENTION,
    MAX_ATTEMPTS,
    STALE_AFTER,
    AttemptState,
    SagaCondition,
    SagaGroup,
    SagaSummary,
    StepAttempt,
    read_record,
    telling_line,
    visible,
)
from saga_store.model import SagaStatus, SagaStepStatus, StepAction

ATTENTION = (SagaCondition.EXHAUSTED, SagaCondition.ABANDONED, SagaCondition.STALE)
"""The conditions in which somebody has to look at a saga."""
MOST_CUTS = 8
"""How many silences are cut out of one timeline."""
_HEADLINE = 200
_SHORTEST_CUT = timedelta(seconds=1)
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def shards(places: Sequence[int]) -> str:
    """Name shards by their places, such as ``shard 1`` or ``shards 0, 2``."""
    return f"{'shard' if len(places) == 1 else 'shards'} {', '.join(map(str, places))}"


# Time. ---------------------------------------------------------------------------------------------------------------


def duration(lasted: timedelta) -> str:
    """Return how long something lasted, such as ``625 ms``, ``7.7 s``, ``1m 27s``, ``3d 4h``."""
    seconds = max(lasted.total_seconds(), 0)
    if seconds < 1:
        return f"{int(seconds * 1000)} ms"
    if seconds < 10:  # noqa: PLR2004 - as long as a tenth of a second is worth telling
        return f"{int(seconds * 10) / 10:.1f} s"
    rest, parts = int(seconds), list[str]()
    for size, unit in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0"))


def in_zone(moment: datetime, zone: tzinfo | None) -> datetime:
    """Return the moment in a zone, None being the local one; in UTC where that has no such time, as before year 1."""
    try:
        return moment.astimezone(zone)
    except (OverflowError, ValueError, OSError):
        return moment.astimezone(UTC)


def instant(moment: datetime, now: datetime, zone: tzinfo | None = UTC) -> str:
    """Return the time of day, and the date before it unless that is today; None is the local zone."""
    there, today = in_zone(moment, zone), in_zone(now, zone).date()
    return there.strftime("%H:%M:%S" if there.date() == today else "%Y-%m-%d %H:%M:%S")


_NAMES = {"": "seconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def read_duration(text: str) -> timedelta:
    """Read a duration as a person writes it, such as ``90s`` or ``7d``; ValueError says how it is written."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text, re.ASCII)
    if not found:
        raise ValueError(f"{text!r:.60} is no duration; write it like 90s, 10m, 2h or 7d")
    try:
        return timedelta(**{_NAMES[found[2]]: float(found[1])})
    except OverflowError:
        raise ValueError(f"{text!r:.60} is too long; the longest is 999999999d") from None


def read_moment(text: str, now: datetime) -> datetime:
    """Read a time as a person writes it: ISO 8601, in UTC unless it says otherwise, or how long ago it was."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    try:
        return now - read_duration(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r:.60} is no time; write it like 2026-11-26T03:00, or how long ago, like 2h or 7d"
        ) from None


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of a timeline, which is drawn to scale or, where nothing happened for long, cut out."""

    began: datetime
    ended: datetime
    is_cut: bool

    @property
    def lasted(self) -> timedelta:
        return self.ended - self.began


def stretches(attempts: Iterable[StepAttempt], until: datetime) -> list[Stretch]:
    """Return the pieces of a timeline, from the first attempt until then, in order and without gaps.

    Cut out are silences that are longer than all work together, and at least a second; of more than ``MOST_CUTS`` the
    longest. Where a step is in doubt nothing is known to happen, so that is silence, too.
    """
    busy = _merged(sorted(_worked(attempt, until) for attempt in attempts))
    if not busy:
        return []
    worked = sum((ended - began for began, ended in busy), timedelta())
    ends = [ended for _, ended in busy]
    begins = [*(began for began, _ in busy[1:]), max(until, ends[-1])]
    gaps = [gap for gap in zip(ends, begins, strict=True) if gap[1] - gap[0] > max(worked, _SHORTEST_CUT)]
    cuts = sorted(sorted(gaps, key=lambda gap: gap[0] - gap[1])[:MOST_CUTS])
    pieces, since = [], busy[0][0]
    for began, ended in cuts:
        pieces += [Stretch(since, began, is_cut=False), Stretch(began, ended, is_cut=True)]
        since = ended
    if since < begins[-1] or not pieces:
        pieces.append(Stretch(since, begins[-1], is_cut=False))
    return pieces


def _worked(attempt: StepAttempt, until: datetime) -> tuple[datetime, datetime]:
    """Return from when to when there was work for certain."""
    began = attempt.started or attempt.ended or until
    if attempt.state is AttemptState.RUNNING:
        return began, max(until, began)
    return began, max(attempt.ended or began, began)


def _merged(spans: Iterable[tuple[datetime, datetime]]) -> list[tuple[datetime, datetime]]:
    merged: list[tuple[datetime, datetime]] = []
    for began, ended in spans:
        if merged and began <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], ended)
        else:
            merged.append((began, ended))
    return merged


def lanes(attempts: Iterable[StepAttempt]) -> dict[tuple[str, StepAction], list[StepAttempt]]:
    """Return the attempts by step and action, in the order in which they began; without interventions."""
    found: dict[tuple[str, StepAction], list[StepAttempt]] = {}
    for attempt in attempts:
        if not is_intervention(attempt):
            found.setdefault((attempt.step_name, attempt.action), []).append(attempt)
    return found


def histogram(moments: Iterable[datetime], began: datetime, ended: datetime, *, bins: int) -> list[int]:
    """Return how many of the moments lie in each of so many equal parts of the time between the two."""
    counts = Counter(
        min(max(int((moment - began) / max(ended - began, _SHORTEST_CUT) * bins), 0), bins - 1) for moment in moments
    )
    return [counts[index] for index in range(bins)]


# Words. --------------------------------------------------------------------------------------------------------------


def is_intervention(attempt: StepAttempt) -> bool:
    """Whether it is what a person did to the saga, and no step's."""
    return attempt.step_name.startswith(INTERVENTION)


def outcome(attempt: StepAttempt) -> str:
    """Return in a word or two what became of an attempt."""
    match attempt.state:
        case AttemptState.RUNNING:
            return "running"
        case AttemptState.IN_DOUBT:
            return "in doubt"
        case AttemptState.SUPERSEDED:
            return "end unknown"
    return {SagaStepStatus.FAILED: "failed", SagaStepStatus.COMPENSATED: "compensated"}.get(attempt.status, "done")


def headline(details: str | None) -> str | None:
    """Return the line of an error that says most: of a traceback the last, of any other text the first."""
    found = telling_line(details)
    if found is None:
        return None
    line = visible(found)
    return line if len(line) <= _HEADLINE else line[: _HEADLINE - 1] + "\N{HORIZONTAL ELLIPSIS}"


def verdict(
    saga: SagaSummary,
    attempts: Sequence[StepAttempt],
    now: datetime,
    *,
    zone: tzinfo | None = UTC,
    max_attempts: int = MAX_ATTEMPTS,
) -> str:
    """Return what there is to know of a saga first, in a sentence or two.

    Args:
        saga: The saga.
        attempts: Its history, as ``fold_history`` has it.
        now: The database's time.
        zone: In which times are told; None is the local one.
        max_attempts: After how many recovery attempts a saga counts as exhausted.
    """
    doubt = _doubt(attempts, now, zone)
    stands = doubt or _last_error(saga) or _standing(saga)
    match saga.condition:
        case SagaCondition.FINISHED:
            parts = [_ending(saga, attempts, now, zone), doubt]
        case SagaCondition.HELD:
            parts = [_holder(saga, now, zone), _running(attempts, now)]
        case SagaCondition.EXHAUSTED:
            used = f"{saga.recovery_attempts} of {max_attempts} recovery attempts are used up"
            parts = [f"{used}, so no worker takes it.", stands]
        case SagaCondition.ABANDONED:
            parts = [_holder(saga, now, zone), stands]
        case SagaCondition.STALE:
            silent = f"Nothing has happened for {duration(saga.silent_for)}; a recovery worker may take it."
            parts = [stands, None if doubt else silent]
        case _:
            parts = [stands, None if doubt else f"That was {duration(saga.silent_for)} ago."]
    return " ".join(part for part in parts if part)


def _doubts(attempts: Iterable[StepAttempt]) -> list[list[StepAttempt]]:
    """Return the attempts in doubt at each step and action, the steps in the order of their last attempts."""
    found: dict[tuple[str, StepAction], list[StepAttempt]] = {}
    for attempt in attempts:
        if attempt.state is AttemptState.IN_DOUBT:
            lane = attempt.step_name, attempt.action
            found[lane] = [*found.pop(lane, []), attempt]
    return list(found.values())


def _doubt(attempts: Sequence[StepAttempt], now: datetime, zone: tzinfo | None) -> str | None:
    doubts = _doubts(attempts)
    if not doubts:
        return None
    *earlier, last = doubts[-1]
    times = f" {len(earlier) + 1} times, last" if earlier else ""
    began = times if last.started is None else f"{times} at {instant(last.started, now, zone)}"
    doing = "compensating " if last.action == "compensate" else ""
    more = f" {len(doubts) - 1} more in doubt." if len(doubts) > 1 else ""
    return (
        f"Began {doing}{visible(last.step_name)}{began}, and nothing says how it ended.{more} "
        "Ask the service whether it happened before anything is retried."
    )


def _ending(saga: SagaSummary, attempts: Sequence[StepAttempt], now: datetime, zone: tzinfo | None) -> str:
    ended = now - saga.silent_for  # what persons did since is no sign of life
    when = instant(ended, now, zone)
    if saga.status is SagaStatus.COMPLETED:
        return f"Completed at {when}, {duration(max(ended - saga.created_at, timedelta()))} after it was created."
    for attempt in reversed(attempts):
        if attempt.step_name == f"{INTERVENTION}give_up_saga":
            by, reason, _ = read_record(attempt.details)
            given_up = instant(attempt.ended or ended, now, zone)
            return f"Given up by {visible(by or 'somebody')} at {given_up}: {headline(reason) or 'no reason is told'}"
    return " ".join(filter(None, (f"Failed at {when}.", _last_error(saga))))


def _holder(saga: SagaSummary, now: datetime, zone: tzinfo | None) -> str:
    owner = visible(saga.lease_owner or "somebody")
    if saga.lease_expires_at is None:
        return f"Held by {owner}."
    until = instant(saga.lease_expires_at, now, zone)
    if saga.condition is SagaCondition.HELD:
        return f"Held by {owner} until {until}."
    return f"{owner} held it until {until} and has let the lease expire."


def _running(attempts: Sequence[StepAttempt], now: datetime) -> str:
    running = [attempt for attempt in attempts if attempt.state is AttemptState.RUNNING and attempt.started]
    if not running:
        return "No step is under way."
    last = running[-1]
    what = f"Compensating {visible(last.step_name)}" if last.action == "compensate" else visible(last.step_name)
    lasted = timedelta() if last.started is None else now - last.started
    return f"{what} has been running for {duration(lasted)}."


def _last_error(saga: SagaSummary) -> str | None:
    if saga.last_error is None:
        return None
    what = visible(saga.last_error.step_name)
    if saga.last_error.action == "compensate":
        what = f"Compensating {what}"
    said = headline(saga.last_error.details)
    return f"{what} failed last: {said}" if said else f"{what} failed last, without saying why."


def _standing(saga: SagaSummary) -> str:
    last = saga.last_entry
    if last is None:
        return "No step has begun."
    what = visible(last.step_name)
    if last.status is SagaStepStatus.STARTED:
        return f"{what} has begun."
    if last.status is SagaStepStatus.COMPENSATED or last.action == "compensate":
        return f"{what} is compensated, and nothing has begun since."
    return f"{what} is done, and nothing has begun since."


def hint(groups: Iterable[SagaGroup], *, stale_after: timedelta = STALE_AFTER) -> str | None:
    """Return what the groups have in common that hints at a cause; None if nothing does."""
    counts: Counter[SagaCondition] = Counter()
    never = 0
    for group in groups:
        counts[group.condition] += group.count
        if group.condition is SagaCondition.STALE:
            never += group.never_claimed
    stale, abandoned = counts[SagaCondition.STALE], counts[SagaCondition.ABANDONED]
    if stale + abandoned == 0:
        return None
    parts = []
    silent = f"though silent for more than {duration(stale_after)}"
    if never:
        parts.append(f"{never} {'was' if never == 1 else 'were'} never claimed, {silent}")
    if given_back := stale - never:
        parts.append(f"{given_back} {'is' if given_back == 1 else 'are'} under no lease, {silent}")
    if abandoned:
        parts.append(f"of {abandoned} the lease has expired, and no worker took over")
    return f"{'; '.join(parts)}. Is a recovery worker running?"


# What one may do. ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advice:
    """A command, quoted for a shell, and when it is the right one.

    It has no text of the database's but ids, so that it does what it says, whatever names and steps hold.
    """

    when: str
    command: str


def advice(
    saga: SagaSummary, attempts: Iterable[StepAttempt], *, options: Mapping[str, str] | None = None
) -> list[Advice]:
    """Return what may be done about a saga by ``saga-store``; ``options`` stand in each command."""
    given = [part for pair in (options or {}).items() for part in pair]
    if saga.archived_at is not None:
        return [
            Advice(when, shlex.join(["saga-store", verb, str(saga.id), *given]))
            for when, verb in (("It is to be read as a whole", "archived"), ("It has to be here again", "restore"))
        ]

    def command(verb: str, when: str, *more: str) -> Advice:
        reason = when[0].lower() + when[1:]
        # What has become of the saga since it was looked at may call for something else.
        version = "--expected-version", str(saga.version)
        words = ["saga-store", "saga", verb, str(saga.id), *more, *version, *given, "--reason", reason]
        return Advice(when, shlex.join(words))

    found = []
    doubts = _doubts(attempts)
    for *earlier, last in doubts:
        happened = "COMPENSATED" if last.action == "compensate" else "COMPLETED"
        entry = "--entry", str(last.entry_id)
        count = f"{len(earlier) + 1} attempts"
        for what, status in (
            (f"happened in any of its {count}" if earlier else "happened", happened),
            (f"happened in none of its {count}" if earlier else "never happened", "FAILED"),
        ):
            found.append(command("settle", f"The service says that it {what}", *entry, "--status", status))
    if saga.condition is SagaCondition.HELD:
        found.append(command("break-lease", "Its worker is dead, and the lease lasts"))
    if saga.condition is SagaCondition.EXHAUSTED and not doubts:
        found.append(command("retry", "The cause is mended"))
    if saga.condition in {SagaCondition.EXHAUSTED, SagaCondition.ABANDONED, SagaCondition.STALE}:
        found.append(command("give-up", "It was settled by hand, or is lost"))
    return found
