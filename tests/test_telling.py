"""What a view says in words, and how it cuts silence out of a timeline."""

import shlex
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga_store import LogStep, MemorySagaStorage, SagaStatus, SagaStepStatus
from saga_store.inspection import (
    AttemptState,
    SagaCondition,
    SagaGroup,
    SagaSummary,
    StepAttempt,
    fold_history,
)
from saga_store.model import SagaLogEntry, StepAction
from saga_store.telling import (
    MOST_CUTS,
    advice,
    duration,
    headline,
    hint,
    histogram,
    in_zone,
    instant,
    lanes,
    outcome,
    read_duration,
    read_moment,
    stretches,
    verdict,
)

NOW = datetime(2026, 11, 26, 0, 44, 17, tzinfo=UTC)
SAGA_ID = UUID("7b0ffe96-5cc1-47af-b20d-245caf7a6e06")
HOSTILE = "x\x1b[31m\u202e<script>`$(id)`'\";\n\u200b"
STARTED, COMPLETED, FAILED, COMPENSATED = SagaStepStatus


def entry(  # noqa: PLR0913 - a row's columns
    number: int,
    step: str,
    status: SagaStepStatus,
    ago: float,
    *,
    action: StepAction = "act",
    details: str | None = None,
) -> SagaLogEntry:
    return SagaLogEntry(number, SAGA_ID, step, action, status, details, NOW - timedelta(seconds=ago))


def summary(
    condition: SagaCondition,
    *entries: SagaLogEntry,
    status: SagaStatus = SagaStatus.RUNNING,
    owner: str | None = None,
    attempts: int = 0,
) -> SagaSummary:
    failed = [one for one in entries if one.status is FAILED]
    return SagaSummary(
        id=SAGA_ID,
        name="order",
        status=status,
        version=1,
        recovery_attempts=attempts,
        lease_owner=owner,
        lease_expires_at=NOW + timedelta(minutes=-5 if condition is SagaCondition.ABANDONED else 5) if owner else None,
        created_at=NOW - timedelta(hours=2),
        updated_at=NOW - timedelta(hours=1),
        condition=condition,
        in_doubt=bool(entries) and entries[-1].status is STARTED and condition is not SagaCondition.HELD,
        silent_for=timedelta(hours=1) if condition is SagaCondition.FINISHED else timedelta(hours=1, minutes=53),
        last_entry=entries[-1] if entries else None,
        last_error=failed[-1] if failed else None,
    )


def told(saga: SagaSummary, *entries: SagaLogEntry) -> str:
    return verdict(saga, fold_history(entries, NOW, held=saga.condition is SagaCondition.HELD), NOW)


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_zone_without_that_time(hours: int) -> None:
    """There is always something to tell: UTC has every time that a saga can have."""
    zone = timezone(timedelta(hours=hours))
    for moment in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
        assert in_zone(moment, zone) == moment
        assert instant(moment, NOW, zone)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 ms"),
        (0, "0 ms"),
        (0.6259, "625 ms"),
        (7.79, "7.7 s"),
        (10, "10s"),
        (60, "1m"),
        (87, "1m 27s"),
        (6780, "1h 53m"),
        (86_400 * 3 + 59, "3d"),
        (86_400 * 400 + 3600 * 5, "400d 5h"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    """A duration is told by its two greatest units, and never as more than it is."""
    assert duration(timedelta(seconds=seconds)) == said


def test_instant() -> None:
    """Today only the time of day is told, in the zone that is asked for."""
    assert instant(NOW - timedelta(minutes=1), NOW) == "00:43:17"
    assert instant(NOW - timedelta(hours=2), NOW) == "2026-11-25 22:44:17"
    assert instant(NOW - timedelta(hours=1), NOW, timezone(timedelta(hours=2))) == "01:44:17"


class TestVerdict:
    def test_in_doubt(self) -> None:
        """A step that began and never ended is what matters most, and how many more there are."""
        history = [entry(1, "TakePayment", STARTED, 6831, action="compensate")]
        said = told(summary(SagaCondition.STALE, *history), *history)
        assert said == (
            "Began compensating TakePayment at 2026-11-25 22:50:26, and nothing says how it ended. "
            "Ask the service whether it happened before anything is retried."
        )
        both = [*history, entry(2, "Ship", STARTED, 60)]
        assert "Began Ship at 00:43:17, and nothing says how it ended. 1 more in doubt." in told(
            summary(SagaCondition.STALE, *both), *both
        )

    def test_each_condition(self) -> None:
        """Each condition has a verdict of its own, which names the step and the error."""
        history = [entry(1, "Charge", STARTED, 60), entry(2, "Charge", FAILED, 50, details="503 upstream\nmore")]
        done = [entry(1, "Charge", COMPLETED, 60)]
        exhausted = summary(SagaCondition.EXHAUSTED, *history, attempts=5)
        assert told(exhausted, *history) == (
            "5 of 5 recovery attempts are used up, so no worker takes it. Charge failed last: 503 upstream"
        )
        assert told(summary(SagaCondition.ABANDONED, *done, owner="w1"), *done) == (
            "w1 held it until 00:39:17 and has let the lease expire. Charge is done, and nothing has begun since."
        )
        running = history[:1]
        assert told(summary(SagaCondition.HELD, *running, owner="w1"), *running) == (
            "Held by w1 until 00:49:17. Charge has been running for 1m."
        )
        assert told(summary(SagaCondition.STALE)) == (
            "No step has begun. Nothing has happened for 1h 53m; a recovery worker may take it."
        )
        assert told(summary(SagaCondition.ACTIVE, *done), *done).endswith("That was 1h 53m ago.")

    def test_finished(self) -> None:
        """A saga that is over says when and how; one that was given up by whom and why."""
        assert told(summary(SagaCondition.FINISHED, status=SagaStatus.COMPLETED)) == (
            "Completed at 2026-11-25 23:44:17, 1h after it was created."
        )
        held = replace(summary(SagaCondition.FINISHED, status=SagaStatus.COMPLETED), updated_at=NOW)
        assert told(held).startswith("Completed at 2026-11-25 23:44:17, 1h")
        failed = [entry(1, "Charge", FAILED, 60, details="no funds")]
        assert told(summary(SagaCondition.FINISHED, *failed, status=SagaStatus.FAILED), *failed) == (
            "Failed at 2026-11-25 23:44:17. Charge failed last: no funds"
        )
        record = '{"by": "alice", "reason": "case 4711"}'
        given_up = [*failed, entry(2, "saga_store.give_up_saga", COMPLETED, 30, details=record)]
        assert told(summary(SagaCondition.FINISHED, *failed, status=SagaStatus.FAILED), *given_up) == (
            "Given up by alice at 00:43:47: case 4711"
        )

    @pytest.mark.parametrize("condition", SagaCondition)
    def test_hostile_text(self, condition: SagaCondition) -> None:
        """Whatever names, owners and errors hold, a verdict is one line of characters that can be seen."""
        history = [
            entry(1, HOSTILE, FAILED, 60, details=HOSTILE),
            entry(2, HOSTILE, STARTED, 50),
            entry(3, "saga_store.give_up_saga", COMPLETED, 30, details='{"by": "a\\u202e", "reason": "b\\u001b"}'),
        ]
        said = told(summary(condition, *history[:2], owner=HOSTILE, status=SagaStatus.FAILED), *history)
        assert said.isprintable()
        assert "\u202e" not in said


def test_headline() -> None:
    """Of a traceback the last line says most; what is long is cut."""
    assert headline("Traceback (most recent call last):\n  File\nValueError: no\n") == "ValueError: no"
    assert headline("\n first \n second") == "first"
    assert headline(" \n") is None
    assert len(headline("x" * 5_000_000) or "") == 200


class TestTimeline:
    def test_silence_is_cut_out(self) -> None:
        """What is longer than all work together is cut, each stretch begins where the one before ended."""
        history = [
            entry(1, "A", STARTED, 7000),
            entry(2, "A", COMPLETED, 6998),
            entry(3, "B", STARTED, 6997),
            entry(4, "B", FAILED, 6990),
            entry(5, "A", STARTED, 6990, action="compensate"),
        ]
        pieces = stretches(fold_history(history, NOW), NOW)
        assert [(piece.is_cut, piece.lasted.total_seconds()) for piece in pieces] == [(False, 10), (True, 6990)]
        assert pieces[0].ended == pieces[1].began
        assert stretches([], NOW) == []

    def test_what_runs_is_no_silence(self) -> None:
        """A step that is running under a lease fills its time up to now."""
        attempts = fold_history([entry(1, "A", STARTED, 7000)], NOW, held=True)
        assert [piece.is_cut for piece in stretches(attempts, NOW)] == [False]

    @given(
        st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 2000), st.sampled_from(AttemptState)), max_size=30)
    )
    def test_stretches_cover_all(self, drawn: list[tuple[int, int, AttemptState]]) -> None:
        """Whatever is drawn, the stretches run from the first to the last moment, without gaps, with few cuts."""
        attempts = [
            StepAttempt("A", "act", began, began + timedelta(seconds=took), COMPLETED, state, None, None, None, 1)
            for ago, took, state in drawn
            for began in [NOW - timedelta(seconds=ago)]
        ]
        pieces = stretches(attempts, NOW)
        assert bool(pieces) == bool(attempts)
        assert all(one.ended == other.began for one, other in pairwise(pieces))
        assert all(piece.lasted >= timedelta() for piece in pieces)
        assert sum(piece.is_cut for piece in pieces) <= MOST_CUTS
        if pieces:
            assert pieces[0].began == min(attempt.started for attempt in attempts if attempt.started)
            assert pieces[-1].ended >= NOW

    def test_lanes(self) -> None:
        """There is a lane for each step and action, in the order in which they began, and none for persons."""
        history = [
            entry(1, "A", COMPLETED, 9),
            entry(2, "B", FAILED, 8),
            entry(3, "A", COMPENSATED, 7, action="compensate"),
            entry(4, "B", FAILED, 6),
            entry(5, "saga_store.break_lease", COMPLETED, 5),
        ]
        found = lanes(fold_history(history, NOW))
        assert {lane: len(attempts) for lane, attempts in found.items()} == {
            ("A", "act"): 1,
            ("B", "act"): 2,
            ("A", "compensate"): 1,
        }
        assert [outcome(attempt) for attempts in found.values() for attempt in attempts] == [
            "done",
            "failed",
            "failed",
            "compensated",
        ]

    def test_histogram(self) -> None:
        """Each moment falls into the part of the time that it lies in, and none is lost at the edges."""
        began = NOW - timedelta(hours=10)
        moments = [began - timedelta(hours=1), began, began + timedelta(minutes=90), NOW, NOW + timedelta(1)]
        assert histogram(moments, began, NOW, bins=10) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
        assert sum(histogram([NOW], NOW, NOW, bins=4)) == 1


def test_hint() -> None:
    """Sagas that nobody takes hint at a worker that isn't there; others hint at nothing."""

    def group(condition: SagaCondition, count: int) -> SagaGroup:
        return SagaGroup(condition, "order", None, None, None, count, 0, timedelta(hours=1), (), (SAGA_ID,))

    said = hint([group(SagaCondition.STALE, 53), group(SagaCondition.STALE, 1), group(SagaCondition.ABANDONED, 2)])
    assert said == (
        "54 are under no lease, though silent for more than 10m; of 2 the lease has expired, and no worker took over. "
        "Is a recovery worker running?"
    )
    assert hint([group(SagaCondition.EXHAUSTED, 7)]) is None
    assert hint([]) is None
    unclaimed = [replace(group(SagaCondition.STALE, 54), never_claimed=53)]
    assert hint(unclaimed) == (
        "53 were never claimed, though silent for more than 10m; 1 is under no lease, though silent for more than 10m. "
        "Is a recovery worker running?"
    )


def test_advice() -> None:
    """Commands name the saga and the entry by their ids, and nothing that the database's text could have put there."""
    history = [entry(7, HOSTILE, STARTED, 60), entry(8, "pay", STARTED, 50, action="compensate")]
    saga = summary(SagaCondition.EXHAUSTED, *history)
    found = advice(saga, fold_history(history, NOW), options={"--schema": "it's"})
    commands = [shlex.split(one.command) for one in found]
    assert [words[2:4] for words in commands] == [
        [verb, str(SAGA_ID)] for verb in ("settle", "settle", "settle", "settle", "give-up")
    ]
    assert commands[0][4:8] == ["--entry", "7", "--status", "COMPLETED"]
    assert commands[2][4:8] == ["--entry", "8", "--status", "COMPENSATED"]
    assert all(words[words.index("--schema") + 1] == "it's" for words in commands)
    assert all(words[words.index("--expected-version") + 1] == str(saga.version) for words in commands)
    assert advice(summary(SagaCondition.HELD, owner="w"), [])[0].command.startswith(
        f"saga-store saga break-lease {SAGA_ID} --expected-version 1 --reason "
    )
    assert advice(summary(SagaCondition.ACTIVE), []) == []
    # What is in doubt is settled before anything is tried again.
    failed = [entry(7, "pay", STARTED, 60), entry(8, "pay", FAILED, 50)]
    for entries, retried in ((failed, True), ([*failed, entry(9, "pay", STARTED, 40)], False)):
        found = advice(summary(SagaCondition.EXHAUSTED, *entries), fold_history(entries, NOW))
        assert ("retry" in [shlex.split(one.command)[2] for one in found]) is retried
    assert not any("script" in one.command for one in found)


def test_advice_on_several_attempts() -> None:
    """One step that was begun twice has one end, so there is one pair of commands, and it says what of."""
    history = [entry(7, "pay", STARTED, 60), entry(8, "ship", STARTED, 55), entry(9, "pay", STARTED, 50)]
    found = advice(summary(SagaCondition.STALE, *history), fold_history(history, NOW))
    assert [(one.when, shlex.split(one.command)[4:8]) for one in found[:4]] == [
        ("The service says that it happened", ["--entry", "8", "--status", "COMPLETED"]),
        ("The service says that it never happened", ["--entry", "8", "--status", "FAILED"]),
        ("The service says that it happened in any of its 2 attempts", ["--entry", "9", "--status", "COMPLETED"]),
        ("The service says that it happened in none of its 2 attempts", ["--entry", "9", "--status", "FAILED"]),
    ]
    assert shlex.split(found[4].command)[2] == "give-up"


async def test_of_a_storage() -> None:
    """What a storage gives is told without further ado."""
    storage = MemorySagaStorage()
    await storage.create_saga(SAGA_ID, "order", {})
    await storage.log_step(SAGA_ID, *_arguments(LogStep("pay", "act", STARTED)))
    page = await storage.find_sagas()
    attempts = fold_history(await storage.get_step_history(SAGA_ID), page.at)
    assert verdict(page.sagas[0], attempts, page.at).startswith("Began pay at ")


def _arguments(step: LogStep) -> tuple[str, StepAction, SagaStepStatus]:
    return step.step_name, step.action, step.status


class TestReading:
    @pytest.mark.parametrize(
        ("written", "seconds"),
        [("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604_800), ("45", 45), ("1.5m", 90), ("0", 0)],
    )
    def test_durations(self, written: str, seconds: float) -> None:
        """A duration is written with its unit; without one it is in seconds."""
        assert read_duration(written) == timedelta(seconds=seconds)
        assert read_moment(written, NOW) == NOW - timedelta(seconds=seconds)

    @pytest.mark.parametrize(
        "written", ["", "-1s", "1w", "soon", "1e3", "\N{ARABIC-INDIC DIGIT THREE}s", "1 h", "9" * 10]
    )
    def test_what_is_no_duration(self, written: str) -> None:
        """Anything else is refused, with how it is written."""
        with pytest.raises(ValueError, match="is no duration; write it like 90s"):
            read_duration(written)

    def test_moments(self) -> None:
        """A time is ISO 8601, in UTC unless it says otherwise; what can't be one is refused."""
        assert read_moment("2026-11-26T03:00", NOW) == datetime(2026, 11, 26, 3, tzinfo=UTC)
        assert read_moment("2026-11-26T03:00+02:00", NOW) == datetime(2026, 11, 26, 1, tzinfo=UTC)
        for written in ("yesterday", "999999999d", "0001-01-01T00:00+14:00", ""):
            with pytest.raises(ValueError, match="is no time; write it like"):
                read_moment(written, NOW)
