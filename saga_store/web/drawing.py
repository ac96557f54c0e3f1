"""Where a timeline and a histogram are drawn: numbers for SVG's attributes, since no page has a style of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from saga_store.inspection import INTERVENTION, AttemptState, StepAttempt
from saga_store.model import StepAction
from saga_store.telling import (
    Stretch,
    duration,
    histogram,
    is_intervention,
    lanes,
    outcome,
    stretches,
)

WIDTH, MARGIN, HEAD, LANE = 960.0, 44.0, 44.0, 34.0
MOST_LANES = 30
"""How many lanes one timeline has, those of the latest steps."""
_CUT, _LEAST, _NARROWEST = 46.0, 8.0, 3.0
_LETTER = 6.6
"""About how wide a letter is; what is told beside a bar must not run over it."""
_TICK = 100.0
_STEPS = [timedelta(milliseconds=ms) for ms in (1, 2, 5, 10, 20, 50, 100, 200, 500)] + [
    timedelta(seconds=s)
    for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 28_800, 43_200, 86_400)
]


@dataclass(frozen=True, slots=True)
class Text:
    """Some text; ``anchor`` is SVG's."""

    x: float
    words: str
    anchor: str = "start"


@dataclass(frozen=True, slots=True)
class Bar:
    """An attempt; ``kind`` is a class of the style sheet."""

    x: float
    width: float
    kind: str
    title: str
    inside: Text | None = None
    beside: Text | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """What happened to one step, and by which action; or what persons did (``action`` is None)."""

    name: str
    action: StepAction | None
    y: float
    bars: list[Bar] = field(default_factory=list)
    diamonds: list[Text] = field(default_factory=list)
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A saga's history as a picture; all of it is told by the history below it, too."""

    height: float
    lanes: list[Lane]
    ticks: list[Text]
    cuts: list[Bar]
    now: float | None
    left_out: int = 0
    width: float = WIDTH


class _Scale:
    """Which moment is where; what was cut out is as wide as any other silence that was."""

    def __init__(self, pieces: Sequence[Stretch]) -> None:
        room = WIDTH - MARGIN - _CUT * sum(piece.is_cut for piece in pieces)
        drawn = [piece for piece in pieces if not piece.is_cut]
        shares = room - _LEAST * len(drawn)
        lasted = sum((piece.lasted for piece in drawn), timedelta()) or timedelta(microseconds=1)
        self.placed: list[tuple[Stretch, float, float]] = []
        x = 0.0
        for piece in pieces:
            width = _CUT if piece.is_cut else _LEAST + shares * (piece.lasted / lasted)
            self.placed.append((piece, x, x + width))
            x += width

    def __call__(self, moment: datetime) -> float:
        for piece, left, right in self.placed:
            if moment <= piece.ended:
                part = (moment - piece.began) / piece.lasted if piece.lasted else 0.0
                return left + (right - left) * min(max(part, 0.0), 1.0)
        return self.placed[-1][2] if self.placed else 0.0


def timeline(attempts: Sequence[StepAttempt], until: datetime, *, goes_on: bool) -> Timeline | None:
    """Draw a history up to then, which is now if the saga ``goes_on``; None if there is nothing to draw."""
    pieces = stretches(attempts, until)
    if not pieces:
        return None
    scale = _Scale(pieces)
    found = sorted(lanes(attempts).items(), key=lambda lane: _urgency(lane[1]))[-MOST_LANES:]
    left_out = len(lanes(attempts)) - len(found)
    found.sort(key=lambda lane: lane[1][0].entry_id)
    drawn = [_lane(number, *lane, scale, until) for number, lane in enumerate(found)]
    persons = [attempt for attempt in attempts if is_intervention(attempt)]
    if persons:
        drawn.append(_persons(len(drawn), persons, scale))
    return Timeline(
        HEAD + LANE * len(drawn),
        drawn,
        [tick for piece, left, right in scale.placed if not piece.is_cut for tick in _ticks(piece, left, right)],
        [
            Bar(
                left,
                right - left,
                "cut",
                duration(piece.lasted),
                inside=Text((left + right) / 2, duration(piece.lasted)),
            )
            for piece, left, right in scale.placed
            if piece.is_cut
        ],
        scale(until) if goes_on else None,
        left_out,
    )


def _urgency(attempts: Sequence[StepAttempt]) -> tuple[bool, int]:
    return any(one.state is not AttemptState.ENDED for one in attempts), attempts[-1].entry_id


def _lane(
    number: int, lane: tuple[str, StepAction], attempts: Sequence[StepAttempt], scale: _Scale, until: datetime
) -> Lane:
    drawn = Lane(*lane, y=HEAD + LANE * number, attempts=len(attempts))
    for attempt in attempts:
        began = attempt.started or attempt.ended or until
        is_open = attempt.state in {AttemptState.RUNNING, AttemptState.IN_DOUBT}
        left, right = scale(began), scale(until if is_open else attempt.ended or began)
        width = max(right - left, _NARROWEST)
        words = duration(attempt.lasted) if attempt.lasted is not None else ""
        title = ", ".join(filter(None, (attempt.step_name, outcome(attempt), words)))
        kind = outcome(attempt).replace(" ", "-")
        if is_open:
            words = f"{outcome(attempt)} for {words}"
        drawn.bars.append(
            Bar(left, width, kind, title, **_label(left, width, words, alone=len(attempts) == 1 or is_open))
        )
    return drawn


def _label(left: float, width: float, words: str, *, alone: bool) -> dict[str, Text]:
    """Return where a bar's duration is told: inside, behind it or before it; nowhere if others may be in the way."""
    room = len(words) * _LETTER + 8
    if not words:
        return {}
    if room + 20 < width:
        return {"inside": Text(left + width / 2, words, "middle")}
    if not alone:
        return {}
    if left + width + room < WIDTH - MARGIN:
        return {"beside": Text(left + width + 6, words)}
    return {"beside": Text(left - 6, words, "end")}


def _persons(number: int, attempts: Iterable[StepAttempt], scale: _Scale) -> Lane:
    drawn = Lane("interventions", None, y=HEAD + LANE * number)
    for attempt in attempts:
        x = scale(attempt.ended or attempt.started or scale.placed[-1][0].ended)
        words = f"{attempt.step_name.removeprefix(INTERVENTION)} by {attempt.by or '?'}"[:60]
        drawn.diamonds.append(Text(x, words, "end" if x > WIDTH / 2 else "start"))
    return drawn


def _ticks(piece: Stretch, left: float, right: float) -> list[Text]:
    """Return the time at which a piece began, and then how much later it is, about every so many pixels."""
    if right - left < _TICK / 2:
        return [Text(left, "")]
    ticks = [Text(left, piece.began.astimezone(UTC).strftime("%H:%M:%S"))]
    if not piece.lasted:
        return ticks
    aimed = piece.lasted * (_TICK / (right - left))
    step = next((step for step in _STEPS if step >= aimed), timedelta(days=max(aimed / timedelta(days=1), 1) // 1 + 1))
    later = step
    while later < piece.lasted:
        x = left + (right - left) * (later / piece.lasted)
        words = f"+{duration(later)}" if x + _TICK / 2 < right and x - left > len(ticks[0].words) * _LETTER else ""
        ticks.append(Text(x, words))
        later += step
    return ticks


@dataclass(frozen=True, slots=True)
class Histogram:
    """When the sagas of a group stopped, on one scale for all groups."""

    bars: list[Bar]
    words: str
    width: float = 150.0
    height: float = 26.0


_BINS = 30


def stopped(moments: Sequence[datetime], since: datetime, now: datetime, most: int) -> Histogram:
    """Draw when sagas stopped; ``most`` is the height of the highest bar of all such pictures on the page."""
    width = 150.0 / _BINS
    bars = [
        Bar(index * width, max(22.0 * count / max(most, 1), 2.0), "stopped", "")
        for index, count in enumerate(histogram(moments, since, now, bins=_BINS))
        if count
    ]
    longest, shortest = duration(now - min(moments)), duration(now - max(moments))
    return Histogram(bars, f"{longest} ago" if longest == shortest else f"{longest} to {shortest} ago")


def highest(groups: Iterable[Sequence[datetime]], since: datetime, now: datetime) -> int:
    """Return how high the highest bar of these groups is."""
    return max((max(histogram(moments, since, now, bins=_BINS)) for moments in groups), default=1)
