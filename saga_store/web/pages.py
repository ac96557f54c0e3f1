"""What the pages show, asked of the storage and put together for the templates."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import (
    AttemptState,
    ContextPeek,
    InterventionPage,
    SagaCondition,
    SagaGroup,
    SagaPage,
    SagaQuery,
    SagaSummary,
    StepAttempt,
    fold_history,
    read_record,
)
from saga_store.interface import IInspectionStorage
from saga_store.model import SagaStatus
from saga_store.retention.showing import ArchivedSaga, ArchiveReader
from saga_store.telling import (
    ATTENTION,
    Advice,
    Stretch,
    advice,
    duration,
    hint,
    is_intervention,
    stretches,
    verdict,
)
from saga_store.web.asked import JUDGING, Asked, Pairs, of_group
from saga_store.web.contexts import Redaction, as_text
from saga_store.web.drawing import Histogram, Timeline, highest, stopped, timeline

GROUPS, MOST_GROUPS = 50, 1000
_FEWEST_DIGITS = 8
_AMBIGUOUS = 20
_SHOWN_FIRST, _SHOWN_LAST, _MOST_ROWS = 6, 20, 40
_URGENCY = (*ATTENTION, SagaCondition.HELD, SagaCondition.FINISHED)
_A_WEEK = timedelta(days=7)


# Attention. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """A number, and what it counts; ``kind`` is a class of the style sheet."""

    count: int
    words: str
    kind: str
    about: str
    asks: Pairs
    is_estimate: bool = False


@dataclass(frozen=True, slots=True)
class GroupRow:
    group: SagaGroup
    when: Histogram
    asks: Pairs


@dataclass(frozen=True, slots=True)
class AttentionPage:
    """Why sagas need attention, before which."""

    at: datetime
    tiles: list[Tile]
    rows: list[GroupRow]
    sagas: int
    reasons: int
    is_partial: bool
    hint: str | None
    missing: tuple[int, ...]


async def attention(storage: IInspectionStorage, asked: Asked) -> AttentionPage:
    judged = SagaQuery(stale_after=asked.stale_after, max_attempts=asked.max_attempts)
    stuck = await storage.group_sagas(replace(judged, conditions=ATTENTION), limit=MOST_GROUPS)
    silent = replace(judged, conditions=[SagaCondition.HELD], silent_for=judged.stale_after)
    hung = await storage.group_sagas(silent, limit=MOST_GROUPS)
    failed = replace(judged, statuses=[SagaStatus.FAILED], in_doubt=True)
    doubtful = await storage.group_sagas(failed, limit=MOST_GROUPS)
    figures = await storage.get_figures(stale_after=judged.stale_after, max_attempts=judged.max_attempts)
    groups = sorted([*stuck, *hung, *doubtful], key=lambda group: _URGENCY.index(group.condition))
    at = max((group.stopped[0] + group.silent_for for group in groups), default=datetime.now(UTC))
    counts: Counter[SagaCondition] = Counter()
    for (_, condition), count in figures.unfinished.items():
        counts[condition] += count
    estimated = "unfinished" in figures.estimated

    def tile(condition: SagaCondition, kind: str) -> Tile:
        about = _longest(group for group in stuck if group.condition is condition)
        return Tile(counts[condition], condition.value, kind, about, (("condition", condition.value),), estimated)

    held = sum(group.count for group in hung)
    in_doubt = sum(group.in_doubt for group in [*stuck, *doubtful])
    tiles = [
        Tile(in_doubt, "in doubt", "doubt", "did it happen?", (("in_doubt", "1"),), _is_partial([*stuck, *doubtful])),
        tile(SagaCondition.EXHAUSTED, "bad"),
        tile(SagaCondition.ABANDONED, "bad"),
        tile(SagaCondition.STALE, "warn"),
        Tile(
            held,
            "held and silent",
            "held",
            _longest(hung),
            (("condition", "held"), ("silent_for", _seconds(judged.stale_after))),
            _is_partial(hung),
        ),
        Tile(figures.failed_24h, "failed in 24 h", "bad", "", (("status", "FAILED"), ("created_after", "24h"))),
        Tile(counts[SagaCondition.ACTIVE], "active", "good", "all is well", (("condition", "active"),), estimated),
    ]
    shown = groups if asked.is_on("groups", "all") else groups[:GROUPS]
    since = min((group.stopped[0] for group in shown), default=at)
    most = highest([group.stopped for group in shown], since, at)
    return AttentionPage(
        at,
        tiles,
        [GroupRow(group, stopped(group.stopped, since, at, most), _asks(group, silent.silent_for)) for group in shown],
        sum(group.count for group in groups),
        len(groups),
        _is_partial(groups),
        hint(stuck, stale_after=judged.stale_after),
        figures.missing,
    )


def _asks(group: SagaGroup, silent_for: timedelta | None) -> Pairs:
    pairs = of_group(group)
    if group.condition is SagaCondition.HELD and silent_for is not None:
        pairs += (("silent_for", _seconds(silent_for)),)
    if group.condition is SagaCondition.FINISHED:
        pairs += (("status", "FAILED"), ("in_doubt", "1"))
    return pairs


def _is_partial(groups: Iterable[SagaGroup]) -> bool:
    return any(group.is_partial for group in groups)


def _seconds(lasted: timedelta) -> str:
    return f"{lasted.total_seconds():.6f}".rstrip("0").rstrip(".") + "s"


def _longest(groups: Iterable[SagaGroup]) -> str:
    longest = max((group.silent_for for group in groups), default=None)
    return "" if longest is None else f"longest {duration(longest)}"


# The list. -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListPage:
    page: SagaPage
    sagas: list[SagaSummary]
    looked_at: int
    next: Pairs | None
    only: UUID | None = None
    """The one saga whose id was asked for, and nothing else."""


async def sagas(storage: IInspectionStorage, asked: Asked, redaction: Redaction) -> ListPage:
    query = asked.query(datetime.now(UTC))
    for field, value in (query.context or {}).items():
        if not redaction.may_search(field, value):
            raise InvalidSagaDataError(
                "context", f"can't be asked for {field!r:.60}: what contexts hold is hidden here"
            )
    page = await storage.find_sagas(query, limit=asked.search_limit, after=asked.get("after"))
    found = [saga for saga in page.sagas if asked.is_in_group(saga)] if asked.is_for_a_group else page.sagas
    following = (*asked.without("after"), ("after", page.after)) if page.after else None
    asks_for_one = {name for name, _ in asked.without(*JUDGING)} == {"id"} and len(found) == 1 and not page.unreadable
    return ListPage(page, found, len(page.sagas), following, found[0].id if asks_for_one else None)


# One saga. -----------------------------------------------------------------------------------------------------------


class UnknownIdError(Exception):
    """No saga has an id that begins like this."""


class MissingShardsError(Exception):
    """No shard that answers has a saga whose id begins like this; those that don't may."""

    def __init__(self, prefix: str, missing: Sequence[int]) -> None:
        super().__init__(prefix, missing)
        self.prefix = prefix
        self.missing = missing


class AmbiguousIdError(Exception):
    """Several sagas have an id that begins like this."""

    def __init__(self, prefix: str, page: SagaPage) -> None:
        super().__init__(prefix, page)
        self.prefix = prefix
        self.page = page


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """A line of the history: an attempt, or a silence, or how many lines are left out here."""

    attempt: StepAttempt | None = None
    after: timedelta | None = None
    silence: timedelta | None = None
    goes_on: bool = False
    left_out: int = 0
    left_out_failed: int = 0
    record: Mapping[str, object] | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ShownContext:
    size: int
    text: str | None
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class SagaView:
    at: datetime
    saga: SagaSummary
    verdict: str
    timeline: Timeline | None
    rows: list[HistoryRow]
    entries: int
    left_out: int
    context: ShownContext | None
    advice: list[Advice]
    max_attempts: int
    archived: ArchivedSaga | None = None
    missing: tuple[int, ...] = ()


async def saga(  # noqa: PLR0913 - what there is to show, and what of it may be seen
    storage: IInspectionStorage,
    given: str,
    asked: Asked,
    redaction: Redaction,
    *,
    options: Mapping[str, str],
    archives: ArchiveReader | None = None,
) -> SagaView:
    """Look at one saga; at one that was archived by ``archives``, or by one that reads wherever the ledger says.

    Raises:
        UnknownIdError: No saga has this id.
        AmbiguousIdError: Several have one that begins like this.
        MissingShardsError: Nobody can tell, for shards are down.
        InvalidSagaDataError: It is no id, or something that is asked can't be.
    """
    if len(given.replace("-", "")) < _FEWEST_DIGITS:
        raise InvalidSagaDataError("id", f"must have its first {_FEWEST_DIGITS} digits or more, not {given!r:.60}")
    shows_all, shows_context = asked.is_on("history", "all"), asked.is_on("context", "show")
    query = SagaQuery(id_prefix=given, stale_after=asked.stale_after, max_attempts=asked.max_attempts)
    page = await storage.find_sagas(query, limit=_AMBIGUOUS)
    if len(page.sagas) + len(page.unreadable) > 1 or page.unreadable:
        raise AmbiguousIdError(given, page)
    if not page.sagas:
        raise MissingShardsError(given, page.missing) if page.missing else UnknownIdError(given)
    [found] = page.sagas
    archived = context = None
    if found.archived_at is None:
        recent = await storage.get_recent_history(found.id)
        context = await storage.peek_context(found.id) if shows_context else None
    else:
        archived = await (archives or ArchiveReader(storage)).read(found, page.at)
        found, recent = archived.saga, archived.history
        context = archived.peek() if shows_context else None
    attempts = fold_history(recent.entries, page.at, held=found.condition is SagaCondition.HELD)
    goes_on = found.condition is not SagaCondition.FINISHED
    until = max([page.at] if goes_on else [_last_moment(one) or found.created_at for one in attempts] or [page.at])
    return SagaView(
        at=page.at,
        saga=found,
        verdict=verdict(found, attempts, page.at, max_attempts=asked.max_attempts),
        timeline=timeline(attempts, until, goes_on=goes_on),
        rows=list(_history(attempts, found.created_at, until, goes_on=goes_on, shows_all=shows_all)),
        entries=len(recent.entries) + recent.left_out,
        left_out=recent.left_out,
        context=None if context is None else _shown(context, redaction),
        advice=advice(found, attempts, options=options),
        max_attempts=asked.max_attempts,
        archived=archived,
        missing=page.missing,
    )


def _shown(peek: ContextPeek, redaction: Redaction) -> ShownContext:
    context = None if peek.context is None else redaction(peek.context)
    if context is None:
        return ShownContext(peek.size, None)
    return ShownContext(peek.size, *as_text(context))


def _last_moment(attempt: StepAttempt) -> datetime | None:
    return attempt.ended or attempt.started


def _history(
    attempts: Sequence[StepAttempt], created_at: datetime, until: datetime, *, goes_on: bool, shows_all: bool
) -> Iterator[HistoryRow]:
    silences = [piece for piece in stretches(attempts, until) if piece.is_cut]
    hidden: list[StepAttempt] = []
    for index, attempt in enumerate(attempts):
        if not shows_all and _may_hide(index, len(attempts), attempt):
            hidden.append(attempt)
            continue
        yield from _left_out(hidden)
        hidden = []
        began = attempt.started or attempt.ended or until
        while silences and silences[0].ended <= began:
            yield HistoryRow(silence=silences.pop(0).lasted)
        yield _row(attempt, began - created_at)
    yield from _left_out(hidden)
    yield from (HistoryRow(silence=piece.lasted, goes_on=_is_last(piece, until) and goes_on) for piece in silences)


def _is_last(piece: Stretch, until: datetime) -> bool:
    return piece.ended >= until


def _may_hide(index: int, count: int, attempt: StepAttempt) -> bool:
    """Whether a line may be left out of a long history: none that is in doubt or a person's."""
    is_in_the_middle = count > _MOST_ROWS and _SHOWN_FIRST <= index < count - _SHOWN_LAST
    return is_in_the_middle and attempt.state is AttemptState.ENDED and not is_intervention(attempt)


def _left_out(hidden: Sequence[StepAttempt]) -> Iterator[HistoryRow]:
    if hidden:
        failed = sum(attempt.status == "FAILED" for attempt in hidden)
        yield HistoryRow(left_out=len(hidden), left_out_failed=failed)


def _row(attempt: StepAttempt, after: timedelta) -> HistoryRow:
    if not is_intervention(attempt):
        return HistoryRow(attempt, after)
    _, reason, record = read_record(attempt.details)
    return HistoryRow(attempt, after, record=record, reason=reason)


# Interventions. ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InterventionsPage:
    page: InterventionPage
    since: datetime
    next: Pairs | None


async def interventions(storage: IInspectionStorage, asked: Asked) -> InterventionsPage:
    now = datetime.now(UTC)
    since = asked.moment("since", now) or now - _A_WEEK
    page = await storage.find_interventions(
        since=since, by=asked.get("by"), limit=asked.limit, after=asked.get("after")
    )
    return InterventionsPage(page, since, (*asked.without("after"), ("after", page.after)) if page.after else None)
