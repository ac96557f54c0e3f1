"""What views are made of, without a storage: histories folded, errors grouped, hostile text made visible."""

import asyncio
import json
import traceback
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import get_args
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga_store import InvalidSagaDataError, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.inspection import (
    DETAILS_SHOWN,
    AttemptState,
    Cursor,
    SagaCondition,
    SagaQuery,
    checked_query,
    cut_details,
    digest,
    fingerprint,
    fold_history,
    history_seen,
    in_doubt,
    is_equal_json,
    last_in_doubt,
    read_cursor,
    read_record,
    record,
    record_prefix,
    visible,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
NOW = T0 + timedelta(hours=1)
SAGA_ID = UUID(int=1)
ACTIONS: tuple[StepAction, ...] = get_args(StepAction)
STARTED, COMPLETED, FAILED = SagaStepStatus.STARTED, SagaStepStatus.COMPLETED, SagaStepStatus.FAILED


def history(
    *steps: tuple[str, StepAction, SagaStepStatus] | tuple[str, StepAction, SagaStepStatus, str],
) -> list[SagaLogEntry]:
    return [
        SagaLogEntry(
            n, SAGA_ID, step[0], step[1], step[2], step[3] if len(step) == 4 else None, T0 + timedelta(seconds=n)
        )
        for n, step in enumerate(steps, 1)
    ]


entries: st.SearchStrategy[list[SagaLogEntry]] = st.lists(
    st.tuples(
        st.sampled_from(["pay", "ship", "saga_store.break_lease"]),
        st.sampled_from(ACTIONS),
        st.sampled_from(SagaStepStatus),
    ),
    max_size=12,
).map(lambda drawn: history(*drawn))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=1), inner, max_size=2),
    max_leaves=4,
)


class TestFoldHistory:
    def test_a_start_and_an_end_are_one_attempt(self) -> None:
        """An attempt lasts from its start to its end, and has the details of its end."""
        [attempt] = fold_history(history(("pay", "act", STARTED, "with card"), ("pay", "act", FAILED, "declined")), NOW)
        assert (attempt.step_name, attempt.action, attempt.status) == ("pay", "act", FAILED)
        assert (attempt.state, attempt.details, attempt.lasted) == (
            AttemptState.ENDED,
            "declined",
            timedelta(seconds=1),
        )

    def test_what_has_not_ended_is_in_doubt_or_running(self) -> None:
        """Under a lease a step without an end is running; otherwise it is in doubt; both last until now."""
        log = history(("pay", "act", STARTED))
        [doubtful], [running] = fold_history(log, NOW), fold_history(log, NOW, held=True)
        assert (doubtful.state, running.state) == (AttemptState.IN_DOUBT, AttemptState.RUNNING)
        assert doubtful.lasted == running.lasted == NOW - log[0].created_at
        assert doubtful.ended is None

    def test_an_end_without_a_start(self) -> None:
        """A storage that logs ends only has attempts whose start isn't known."""
        [attempt] = fold_history(history(("pay", "act", COMPLETED)), NOW)
        assert (attempt.started, attempt.ended, attempt.lasted) == (None, T0 + timedelta(seconds=1), None)

    def test_the_end_goes_to_the_last_start(self) -> None:
        """Of two starts without an end in between the first is superseded once the second has ended."""
        log = history(("pay", "act", STARTED), ("pay", "act", STARTED), ("pay", "act", COMPLETED))
        assert [attempt.state for attempt in fold_history(log, NOW)] == [AttemptState.SUPERSEDED, AttemptState.ENDED]

    def test_lanes_are_apart(self) -> None:
        """Doing a step and undoing it, and two steps at the same time, don't end each other."""
        log = history(
            ("pay", "act", STARTED),
            ("ship", "act", STARTED),
            ("pay", "compensate", STARTED),
            ("ship", "act", COMPLETED),
        )
        assert [attempt.state for attempt in fold_history(log, NOW)] == [
            AttemptState.IN_DOUBT,
            AttemptState.ENDED,
            AttemptState.IN_DOUBT,
        ]

    def test_a_person_is_named(self) -> None:
        """An intervention is an attempt of its own; what a person settled says by whom."""
        settled = record("alice", "seen in the bank's log", {"entry_id": 1})
        log = history(
            ("pay", "act", STARTED),
            ("pay", "act", COMPLETED),
            ("saga_store.settle_step", "act", COMPLETED, settled),
            ("saga_store.break_lease", "act", COMPLETED, "no JSON"),
        )
        attempts = fold_history(log, NOW)
        assert [(attempt.step_name, attempt.by) for attempt in attempts] == [
            ("pay", "alice"),
            ("saga_store.settle_step", "alice"),
            ("saga_store.break_lease", None),
        ]

    @given(entries)
    def test_it_agrees_with_the_doubts(self, log: list[SagaLogEntry]) -> None:
        """The attempts in doubt are the entries that are; no entry is lost, and none begins two attempts."""
        attempts = fold_history(log, NOW)
        doubts = [attempt.entry_id for attempt in attempts if attempt.state is AttemptState.IN_DOUBT]
        assert doubts == [entry.id for entry in in_doubt(log)]
        assert [attempt.entry_id for attempt in attempts] == sorted({attempt.entry_id for attempt in attempts})
        ended = sum(attempt.ended is not None and attempt.started is not None for attempt in attempts)
        assert len(attempts) + ended == len(log)

    @given(entries)
    def test_the_last_doubts(self, log: list[SagaLogEntry]) -> None:
        """Of the entries in doubt, the last of each step and action is the one to settle."""
        last = {(entry.step_name, entry.action): entry for entry in in_doubt(log)}
        assert last_in_doubt(log) == sorted(last.values(), key=lambda entry: entry.id)

    @given(entries)
    def test_the_digest_agrees_with_the_doubts(self, log: list[SagaLogEntry]) -> None:
        """A digest counts the steps that are in doubt: pairs of name and action, interventions left out."""
        steps = {(entry.step_name, entry.action) for entry in in_doubt(log) if entry.step_name in {"pay", "ship"}}
        assert digest(log).in_doubt == len(steps)


class TestDigest:
    def test_an_error_that_was_overcome_is_none(self) -> None:
        """The last error is of a step that hasn't succeeded since; trying it again doesn't overcome it."""
        log = history(("pay", "act", FAILED, "declined"), ("ship", "act", FAILED, "lost"), ("ship", "act", COMPLETED))
        again = history(*[(entry.step_name, entry.action, entry.status) for entry in log], ("pay", "act", STARTED))
        for each in (log, again):
            error = digest(each).error
            assert error is not None
            assert error.step_name == "pay"

    def test_persons_show_no_life(self) -> None:
        """A saga is silent since others than persons wrote to it; what a person settled isn't a sign of life either."""
        log = history(("pay", "act", STARTED))
        later = T0 + timedelta(minutes=30)
        written_by_alice = [
            SagaLogEntry(2, SAGA_ID, "pay", "act", COMPLETED, None, later),
            SagaLogEntry(3, SAGA_ID, "saga_store.settle_step", "act", COMPLETED, None, later),
        ]
        seen = digest([*log, *written_by_alice])
        assert seen.silent_since(T0, later) == log[0].created_at
        assert seen.silent_since(T0, later + timedelta(seconds=1)) == later + timedelta(seconds=1)
        assert seen.last == written_by_alice[0]

    def test_details_are_cut(self) -> None:
        """Megabytes of details don't travel with a list."""
        seen = digest(history(("pay", "act", FAILED, "x" * 5_000_000))).last
        assert seen is not None
        assert len(seen.details or "") == DETAILS_SHOWN + 1

    def test_what_an_error_is_stands_at_its_end(self) -> None:
        """Of a traceback of any length; and where it came from, at its beginning."""
        frames = "".join(f'  File "shop.py", line {number}, in step{number}\n' for number in range(500))
        seen = digest(
            history(("pay", "act", FAILED, f"Traceback (most recent call last):\n{frames}Refused: no 12"))
        ).last
        assert seen is not None
        assert "line 0, in step0" in (seen.details or "")
        assert fingerprint(seen.details) == "Refused: no #"
        assert cut_details(seen.details) == seen.details

    @pytest.mark.parametrize(
        ("sagas", "seen"), [(0, 1000), (1, 1000), (500, 1000), (1000, 500), (5000, 100), (9999, 100)]
    )
    def test_of_many_histories_less_is_looked_at(self, sagas: int, seen: int) -> None:
        assert history_seen(sagas) == seen


class TestFingerprint:
    def test_of_a_group_of_exceptions_it_is_the_last_one(self) -> None:
        """As asyncio.TaskGroup raises it, drawn beside the others."""

        async def fail(text: str) -> None:
            raise ValueError(text)

        async def both() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail("timeout after 3 s"))
                group.create_task(fail("card 17 declined"))

        with pytest.raises(ExceptionGroup) as raised:
            asyncio.run(both())
        drawn = "".join(traceback.format_exception(raised.value))
        assert fingerprint(drawn) == "ValueError: card # declined"

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("timeout after 30 s", "timeout after 5.25 s"),
            (f"no order {UUID(int=7 << 96)}", f"no order {UUID(int=9 << 96).hex}"),
            ("connection to 10.0.0.1:5432 refused", "connection to 192.168.7.12:80 refused"),
            ("no route to fe80::1ff:fe23:4567:890a", "no route to 2001:db8::1"),
            ("<Order object at 0x7f3c1a2b>", "<Order object at 0xdeadbeef>"),
            ("at 2026-01-01T10:00:00.5Z: gone", "at 2025-12-31 23:59:59+01:00: gone"),
            ("commit 3f2a9c1d0e missing", "commit ffffffff12 missing"),
            ("failed\nat line 1", "failed\nat line 2, of another file"),
            (
                "Traceback (most recent call last):\n  a.py\nKeyError: 7",
                "Traceback (most recent call last):\nKeyError: 8",
            ),
            ("too   many\tblanks", "too many blanks"),
        ],
    )
    def test_errors_of_a_kind_are_one(self, one: str, other: str) -> None:
        """Numbers, ids, addresses, instants and what follows the first line don't tell errors apart."""
        assert fingerprint(one) == fingerprint(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [("card declined", "card expired"), ("cafe deadbeef", "cafe facade"), ("KeyError: a", "KeyError: b")],
    )
    def test_other_errors_stay_apart(self, one: str, other: str) -> None:
        """Words tell errors apart, also those that look like hexadecimal numbers."""
        assert fingerprint(one) != fingerprint(other)

    @pytest.mark.parametrize("nothing", [None, "", " \n\t"])
    def test_nothing_has_none(self, nothing: str | None) -> None:
        """No details, or blank ones, have no fingerprint."""
        assert fingerprint(nothing) is None

    @given(st.text())
    def test_it_is_stable(self, details: str) -> None:
        """A fingerprint is short, and its own fingerprint."""
        found = fingerprint(details)
        if found is not None:
            assert len(found) <= 200
            assert fingerprint(found) in {found, None}


class TestVisible:
    @pytest.mark.parametrize(
        ("text", "seen"),
        [
            ("plain, and \u00fcn\u00ef \U0001f600", "plain, and \u00fcn\u00ef \U0001f600"),
            ("a\x1b[31mb", r"a\e[31mb"),
            ("two\nlines\tand\rmore", r"two\nlines\tand\rmore"),
            ("\u202egnp.exe", r"\u202egnp.exe"),
            ("\u200b\u2066\ufeff", r"\u200b\u2066\ufeff"),
            ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
            ("\u3164\u115f\u2800\ufe0f", r"\u3164\u115f\u2800\ufe0f"),
            ("\xa0\u3000", r"\xa0\u3000"),
            ("\U000e0041", r"\U000e0041"),
        ],
    )
    def test_what_cannot_be_seen_is_written_out(self, text: str, seen: str) -> None:
        """Control, bidi and invisible characters, and blanks that are none, are spelled; all else stays."""
        assert visible(text) == seen

    @given(st.text())
    def test_nothing_unseen_is_left(self, text: str) -> None:
        """What is shown holds no control, format, private or unassigned character, and no blank but the space."""
        shown = visible(text)
        assert not {unicodedata.category(char) for char in shown.replace(" ", "")} & {
            "Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs",
        }  # fmt: skip
        assert visible(shown) == shown


class TestRecords:
    @given(st.text(min_size=1), st.text(min_size=1))
    def test_a_record_reads_back(self, by: str, reason: str) -> None:
        """Who and why come back, whatever they hold, and the record begins by who."""
        details = record(by, reason, {"status": "RUNNING"})
        assert read_record(details) == (by, reason, {"status": "RUNNING"})
        assert details.startswith(record_prefix(by))

    @pytest.mark.parametrize("details", [None, "", "no JSON", "[1]", '{"by": 7, "reason": ""}', "[" * 100_000])
    def test_what_is_no_record_is_the_reason(self, details: str | None) -> None:
        """An entry that something else wrote under our names is shown as it is."""
        by, reason, rest = read_record(details)
        assert (by, rest) == (None, {})
        assert reason == cut_details(details)


class TestQueries:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("statuses", ["DONE"]),
            ("statuses", "RUNNING"),
            ("statuses", 7),
            ("conditions", ["stuck"]),
            ("conditions", [SagaStatus.FAILED]),
            ("name", ""),
            ("step", "x" * 256),
            ("lease_owner", "\0"),
            ("silent_for", timedelta(seconds=-1)),
            ("created_after", datetime(2026, 1, 1)),  # noqa: DTZ001 - that is the point
            ("created_before", "yesterday"),
            ("context", {"a": float("nan")}),
            ("context", ["a"]),
            ("in_doubt", 1),
            ("id_prefix", "xyz"),
            ("id_prefix", ""),
            ("stale_after", 600),
            ("max_attempts", -1),
        ],
    )
    def test_an_impossible_query_is_refused(self, field: str, value: object) -> None:
        """Whatever can't be asked for is refused by the field's name, in one line."""
        with pytest.raises(InvalidSagaDataError) as refusal:
            checked_query(SagaQuery(**{field: value}))  # type: ignore[arg-type] # that is the point
        assert refusal.value.field.removeprefix("context") in {field, "status", "", "['a']"}
        assert "\n" not in str(refusal.value)

    def test_a_query_is_copied(self) -> None:
        """What the caller does to its lists and dicts afterwards changes nothing."""
        context = {"a": [1]}
        query = checked_query(SagaQuery(context=context, conditions=["stale"]))  # type: ignore[list-item] # by value
        context["a"].append(2)
        assert query.context == {"a": [1]}
        assert query.conditions == (SagaCondition.STALE,)

    @pytest.mark.parametrize("after", ["", "?", "AAAA", "\u00e4", 7, str(Cursor("2026-13-01", SAGA_ID)), "=" * 10])
    def test_a_cursor_of_nobody_is_refused(self, after: object) -> None:
        """What no page gave is no place to go on from."""
        with pytest.raises(InvalidSagaDataError) as refusal:
            read_cursor(after)
        assert refusal.value.field == "after"

    @given(st.datetimes(), st.uuids())
    def test_a_cursor_reads_back(self, moment: datetime, saga_id: UUID) -> None:
        """A cursor is opaque, goes into a URL as it is, and comes back."""
        cursor = Cursor(moment.isoformat(), saga_id)
        assert read_cursor(str(cursor)) == cursor
        assert str(cursor).replace("-", "").replace("_", "").isalnum()

    @given(json_values, json_values)
    def test_equality_is_of_json(self, one: object, other: object) -> None:
        """Equal is what JSON writes alike, numbers by their value; true is no number."""
        assert is_equal_json(one, json.loads(json.dumps(one)))
        assert is_equal_json(one, other) == is_equal_json(other, one)
        if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
            assert is_equal_json(one, other)
        assert not is_equal_json(True, 1)  # noqa: FBT003 - the value is the subject
        assert is_equal_json({"a": [1, 2.0]}, {"a": [1.0, 2]})
