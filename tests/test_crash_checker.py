"""The checker of the crash test: each fault that a storage can have is found, and none that it hasn't.

Journals and tables are made by hand here; test_crash_storages.py has real ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.checker import Fault, Verdict, check
from tests.crash.journal import Answer, Answered, Asked, Journal, Operation, Record, Tail
from tests.crash.tables import LogRow, State, Stored

SAGA = "a"
CREATED = State(1, "PENDING", "new", 1)


def asked(token: str, at: int, **facts: object) -> Asked:
    return replace(Asked(token, "save", SAGA, at), **facts)  # type: ignore[arg-type] # the fields of Asked


def operation(what: Asked, answer: Answer | None, *, until: int | None = None, version: int | None = None) -> Operation:
    answered = answer and Answered(what.token, answer, what.at + 1 if until is None else until, version)
    return Operation(what, answered or None)


NEW = operation(asked("new", 0, creates=True, context=True), Answer.OK)


def verdict(operations: Sequence[Operation], states: Sequence[State] = (), logs: Sequence[LogRow] = ()) -> Verdict:
    """Check writes to one saga that has been created, besides."""
    states = [CREATED, *states]
    last = states[-1]
    return check(
        [NEW, *operations], Stored({SAGA: states}, {SAGA: logs}, {SAGA: (last.version, last.status, last.token)})
    )


def faults(operations: Sequence[Operation], states: Sequence[State] = (), logs: Sequence[LogRow] = ()) -> set[Fault]:
    return {finding.fault for finding in verdict(operations, states, logs).findings}


CHECKPOINT = asked("x", 10, status="RUNNING", context=True, steps=2)
STATE = State(2, "RUNNING", "x", 7)
ROWS = [LogRow("x", 0, 7), LogRow("x", 1, 7)]


class TestOutcomes:
    @pytest.mark.parametrize("answer", [Answer.OK, Answer.UNKNOWN, None])
    def test_what_is_there_whole_and_once_is_right(self, answer: Answer | None) -> None:
        """Acknowledged, unknown or never answered: it may be there."""
        assert faults([operation(CHECKPOINT, answer)], [STATE], ROWS) == set()

    @pytest.mark.parametrize("answer", [Answer.REFUSED, Answer.UNAVAILABLE, Answer.UNKNOWN, None])
    def test_what_is_absent_is_right_unless_acknowledged(self, answer: Answer | None) -> None:
        assert faults([operation(CHECKPOINT, answer)]) == set()

    def test_an_acknowledged_write_that_is_absent_is_lost(self) -> None:
        assert faults([operation(CHECKPOINT, Answer.OK)]) == {Fault.LOST}

    @pytest.mark.parametrize("answer", [Answer.REFUSED, Answer.UNAVAILABLE])
    def test_a_refused_write_that_is_there_is_found(self, answer: Answer) -> None:
        assert faults([operation(CHECKPOINT, answer)], [STATE], ROWS) == {Fault.DENIED}

    @pytest.mark.parametrize("answer", [Answer.OK, Answer.UNKNOWN, None])
    def test_a_write_whose_log_entries_are_there_twice_is_duplicated(self, answer: Answer | None) -> None:
        twice = [*ROWS, LogRow("x", 0, 9), LogRow("x", 1, 9)]

        assert faults([operation(CHECKPOINT, answer)], [STATE], twice) == {Fault.DUPLICATED}

    def test_a_context_that_is_written_twice_is_duplicated(self) -> None:
        change = asked("x", 10, context=True)
        twice = [State(2, "PENDING", "x", 7), State(3, "PENDING", "x", 8)]

        assert faults([operation(change, Answer.OK)], twice) == {Fault.DUPLICATED}

    @pytest.mark.parametrize("answer", [Answer.OK, Answer.UNKNOWN, None])
    @pytest.mark.parametrize(("states", "logs"), [([STATE], []), ([], ROWS), ([STATE], ROWS[:1])])
    def test_a_checkpoint_that_is_there_in_part_is_half_written(
        self, answer: Answer | None, states: list[State], logs: list[LogRow]
    ) -> None:
        assert faults([operation(CHECKPOINT, answer)], states, logs) == {Fault.HALF_WRITTEN}

    def test_a_checkpoint_in_two_transactions_is_half_written(self) -> None:
        """For a moment, half of it could be read."""
        apart = [replace(row, transaction=8) for row in ROWS]

        assert faults([operation(CHECKPOINT, Answer.OK)], [STATE], apart) == {Fault.HALF_WRITTEN}

    def test_an_error_that_is_not_of_the_contract_is_reported(self) -> None:
        assert faults([operation(CHECKPOINT, Answer.UNEXPECTED)]) == {Fault.UNEXPECTED}

    def test_rows_that_nobody_asked_for_are_reported(self) -> None:
        assert faults([], [State(2, "RUNNING", "stranger", 7)]) == {Fault.NOT_ASKED}
        assert faults([], logs=[LogRow("stranger", 0, 7)]) == {Fault.NOT_ASKED}

    def test_answers_are_counted_and_what_stayed_unknown_although_versioned(self) -> None:
        fenced = [operation(asked(f"{at}", at, steps=1, fenced=True), Answer.UNKNOWN) for at in (10, 20)]
        found = verdict([*fenced, operation(CHECKPOINT, Answer.UNKNOWN)])

        assert found.answers == {Answer.OK: 1, Answer.UNKNOWN: 3}
        assert found.undecided == fenced

    @pytest.mark.parametrize("others", [7, 8])
    def test_what_others_outran_is_told_apart(self, others: int) -> None:
        """From eight writes with a version on, made while its outcome was looked for, the row may have forgotten it."""
        unknown = operation(asked("x", 10, context=True, fenced=True), Answer.UNKNOWN, until=100)
        tokens = [f"o{number}" for number in range(others)]
        # The outcome of a run that commits into the application's transaction isn't ours to tell, but it leaves an id.
        kinds: list[dict[str, object]] = [{"fenced": True}, {"call": "run, into a session"}]
        beside = [
            operation(asked(token, 20, context=True, **kinds[at % 2]), Answer.OK, until=90)
            for at, token in enumerate(tokens)
        ]
        without = operation(asked("w", 20, context=True), Answer.OK, until=90)
        before = operation(asked("b", 1, context=True, fenced=True), Answer.OK)
        written = ["b", *tokens, "w"]
        states = [State(2 + at, "PENDING", token, 7 + at) for at, token in enumerate(written)]
        found = verdict([before, unknown, *beside, without], states)

        assert (found.outrun, found.undecided) == (([unknown], []) if others == 8 else ([], [unknown]))


class TestStatusAlone:
    """A status carries no token, so these writes are told apart by their order."""

    RUNNING = asked("r", 10, status="RUNNING")
    FAILED = asked("f", 20, status="FAILED")

    def test_statuses_in_their_order_are_right(self) -> None:
        stored = [State(2, "RUNNING", "new", 7), State(3, "FAILED", "new", 8)]

        assert faults([operation(self.RUNNING, Answer.OK), operation(self.FAILED, Answer.UNKNOWN)], stored) == set()
        assert faults([operation(self.RUNNING, Answer.OK), operation(self.FAILED, None)], stored[:1]) == set()

    def test_a_lost_status_is_found(self) -> None:
        stored = [State(2, "FAILED", "new", 8)]

        assert faults([operation(self.RUNNING, Answer.OK), operation(self.FAILED, Answer.OK)], stored) == {Fault.LOST}

    def test_a_status_that_is_written_twice_is_found(self) -> None:
        stored = [State(2, "RUNNING", "new", 7), State(3, "RUNNING", "new", 8)]

        assert faults([operation(self.RUNNING, Answer.OK)], stored) == {Fault.DUPLICATED}

    def test_a_refused_status_that_is_there_is_found(self) -> None:
        assert faults([operation(self.RUNNING, Answer.REFUSED)], [State(2, "RUNNING", "new", 7)]) == {Fault.DENIED}

    def test_statuses_in_another_order_are_found(self) -> None:
        stored = [State(2, "FAILED", "new", 7), State(3, "RUNNING", "new", 8)]

        found = faults([operation(self.RUNNING, Answer.OK), operation(self.FAILED, Answer.OK)], stored)

        assert found == {Fault.OUT_OF_ORDER}


class TestOrder:
    def test_a_write_that_was_acknowledged_before_another_was_asked_comes_first(self) -> None:
        """In the states and in the history alike."""
        first, second = asked("1", 10, context=True), asked("2", 20, context=True)
        states = [State(2, "PENDING", "2", 7), State(3, "PENDING", "1", 8)]
        earlier, later = asked("1", 10, steps=1), asked("2", 20, steps=1)
        logs = [LogRow("2", 0, 7), LogRow("1", 0, 8)]

        assert faults([operation(first, Answer.OK), operation(second, Answer.OK)], states) == {Fault.OUT_OF_ORDER}
        assert faults([operation(earlier, Answer.OK), operation(later, Answer.OK)], logs=logs) == {Fault.OUT_OF_ORDER}

    def test_writes_at_the_same_time_have_any_order(self) -> None:
        logs = [LogRow("2", 0, 7), LogRow("1", 0, 8)]
        overlapping = operation(asked("1", 10, steps=1), Answer.OK, until=30)

        assert faults([overlapping, operation(asked("2", 20, steps=1), Answer.OK)], logs=logs) == set()

    def test_a_write_of_unknown_outcome_may_come_late(self) -> None:
        """It may have waited in the server while others were acknowledged."""
        logs = [LogRow("2", 0, 7), LogRow("1", 0, 8)]
        unknown = operation(asked("1", 10, steps=1), Answer.UNKNOWN)

        assert faults([unknown, operation(asked("2", 20, steps=1), Answer.OK)], logs=logs) == set()

    def test_writes_of_one_lane_keep_the_order_of_their_calls(self) -> None:
        lane = [operation(asked(f"{at}", at, steps=1, lane="l"), Answer.OK, until=30) for at in (10, 20)]
        logs = [LogRow("20", 0, 7), LogRow("10", 0, 8)]

        assert faults(lane, logs=logs) == {Fault.OUT_OF_ORDER}

    def test_the_log_entries_of_a_checkpoint_stand_together_and_in_order(self) -> None:
        other = operation(asked("y", 10, steps=1), Answer.OK, until=30)
        checkpoint = operation(CHECKPOINT, Answer.OK, until=30)
        between = [ROWS[0], LogRow("y", 0, 8), ROWS[1]]

        assert faults([checkpoint, other], [STATE], between) == {Fault.OUT_OF_ORDER}
        assert faults([checkpoint], [STATE], ROWS[::-1]) == {Fault.OUT_OF_ORDER}


class TestVersions:
    def test_a_write_at_another_version_than_expected_is_found(self) -> None:
        """Two writers got through one fence."""
        stored = [State(2, "PENDING", "1", 7), State(3, "PENDING", "2", 8)]
        both = [operation(asked(token, 10, context=True, expects=1), Answer.OK) for token in ("1", "2")]

        assert faults(both, stored) == {Fault.WRONG_VERSION}

    def test_a_version_that_was_told_wrongly_is_found(self) -> None:
        assert faults([operation(CHECKPOINT, Answer.OK, version=3)], [STATE], ROWS) == {Fault.WRONG_VERSION}

    def test_versions_rise_by_one(self) -> None:
        skipping = [replace(STATE, version=3)]

        assert faults([operation(CHECKPOINT, Answer.OK)], skipping, ROWS) == {Fault.WRONG_VERSION}

    def test_the_row_is_its_last_version(self) -> None:
        stored = Stored({SAGA: [CREATED]}, {}, {SAGA: (1, "RUNNING", "new")})

        assert [finding.fault for finding in check([NEW], stored).findings] == [Fault.WRONG_VERSION]


class TestJournal:
    async def test_what_was_noted_is_read_back(self, tmp_path: Path) -> None:
        answered = Answered("x", Answer.REFUSED, 11, error="SagaConcurrencyError")
        journal = Journal(tmp_path / "1.jsonl")
        await journal.note(CHECKPOINT)
        await journal.note(answered)

        assert Record.of(tmp_path).operations() == [Operation(CHECKPOINT, answered)]

    async def test_a_line_that_was_cut_short_was_not_noted(self, tmp_path: Path) -> None:
        """A client that is killed in the middle of a line hadn't done what the line says."""
        path = tmp_path / "1.jsonl"
        await Journal(path).note(CHECKPOINT)
        tail = Tail(path)
        with path.open("a") as file:
            file.write('{"token": "x", "ans')

        assert [*tail.read()] == [CHECKPOINT]
        assert [*tail.read()] == []
