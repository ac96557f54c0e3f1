"""Subject: what a person sees of the sagas, and how they settle a step in doubt."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaNotFoundError
from saga_store.inspection import ContextPeek, RecentHistory, SagaCondition, SagaQuery, SagaSummary, cut_details
from saga_store.interface import IInspectionStorage, IRecoveryStorage
from saga_store.model import UNFINISHED, Checkpoint, LogStep, SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.testing.claim import Age, AgingContract
from saga_store.testing.contract import Together

_HOUR, _LONG = timedelta(hours=1), timedelta(hours=3)
_Ask: TypeAlias = Callable[..., Awaitable[object]]
_LEASE = timedelta(hours=2)
_STARTED, _COMPLETED, _FAILED, _COMPENSATED = SagaStepStatus
_WHO: dict[str, Any] = {"by": "alice", "reason": 'seen at the bank \N{EM DASH} "paid"'}


class InspectedStorage(IInspectionStorage, IRecoveryStorage):
    """What these tests need of a storage."""


@dataclass(frozen=True)
class _Recipe:
    """A saga to be made."""

    status: SagaStatus
    name: int
    attempts: int
    is_leased: bool
    is_old: bool
    steps: tuple[LogStep, ...]
    verb: str | None


_recipes = st.builds(
    _Recipe,
    st.sampled_from(SagaStatus),
    st.integers(0, 1),
    st.sampled_from([0, 1, 5]),
    st.booleans(),
    st.booleans(),
    st.lists(
        st.builds(
            LogStep,
            st.sampled_from(["pay", "ship"]),
            st.sampled_from(["act", "compensate"]),
            st.sampled_from(SagaStepStatus),
            st.sampled_from([None, "", "order 7 of 9 declined", "Traceback (x):\n  y\nKeyError: 5"]),
        ),
        max_size=4,
    ).map(tuple),
    st.sampled_from([None, None, None, "reset_recovery_attempts", "give_up_saga", "break_lease"]),
)


def _some(values: type[Any]) -> st.SearchStrategy[Any]:
    return st.just(()) | st.lists(st.sampled_from(values), max_size=3, unique=True).map(tuple)


_queries = st.builds(
    SagaQuery,
    statuses=_some(SagaStatus),
    conditions=_some(SagaCondition),
    name=st.sampled_from([None, "0", "1"]),
    step=st.sampled_from([None, None, "pay"]),
    lease_owner=st.sampled_from([None, None, "worker-1"]),
    silent_for=st.sampled_from([None, timedelta(0), _HOUR]),
    in_doubt=st.sampled_from([None, None, True, False]),
    context=st.sampled_from([{}, {}, {"n": 1.0}, {"n": True}, {"\0": ["\ud800", {"\u00fc": None}]}, {"missing": None}]),
    stale_after=st.sampled_from([_HOUR, timedelta(0)]),
    max_attempts=st.sampled_from([5, 1]),
)
_few = settings(
    max_examples=20,
    deadline=None,
    # Each example makes sagas of its own, so it matters neither that the fixtures are shared nor which class runs it.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


_IN_DOUBT = _Recipe(
    SagaStatus.RUNNING, 0, 0, is_leased=False, is_old=True, steps=(LogStep("pay", "act", _STARTED),), verb=None
)
_ENDED = _Recipe(SagaStatus.COMPLETED, 1, 0, is_leased=False, is_old=False, steps=(), verb=None)


class InspectionContract(AgingContract):
    """What ``IInspectionStorage`` promises; other sagas may be there, under other names. Needs ``unit`` and ``age``."""

    @_few
    @example([_IN_DOUBT, _ENDED], [SagaQuery(stale_after=_HOUR), SagaQuery(conditions=(SagaCondition.FINISHED,))])
    @given(st.lists(_recipes, min_size=1, max_size=6), st.lists(_queries, min_size=1, max_size=4))
    async def test_views_tell_what_is_so(
        self, storage: InspectedStorage, age: Age, recipes: list[_Recipe], queries: list[SagaQuery]
    ) -> None:
        """Pages, counts and groups are those of the sagas that a look at every row and history finds."""
        example = str(uuid4())
        # A claim takes any that is free, so the leased ones come first.
        recipes = sorted(recipes, key=lambda recipe: not recipe.is_leased)
        sagas = [await _make(storage, recipe, example) for recipe in recipes]
        for recipe, saga_id in zip(recipes, sagas, strict=True):
            if recipe.verb is not None:
                with suppress(InvalidSagaDataError):  # where it makes no sense
                    await getattr(storage, recipe.verb)(saga_id, **_WHO)
            if recipe.is_old:
                await age(saga_id, _LONG)
        truth = [(await storage.get_saga(saga_id), await storage.get_step_history(saga_id)) for saga_id in sagas]
        for drawn in queries:
            query = replace(
                drawn,
                name=None if drawn.name is None else f"{drawn.name}-{example}",
                context={**(drawn.context or {}), "example": example},
            )
            expected = {saga.id: saga for row, history in truth if (saga := _look(row, history, query))}
            found = await _all_pages(storage, query)
            assert {saga.id: _comparable(saga) for saga in found} == expected
            assert [saga.created_at for saga in found] == sorted((saga.created_at for saga in found), reverse=True)
            assert await storage.count_sagas(query) == len(expected)
            groups = await storage.group_sagas(query)
            steps = Counter(
                (
                    saga.condition,
                    saga.name,
                    saga.last_entry and saga.last_entry.step_name,
                    saga.last_entry and saga.last_entry.action,
                    _FINGERPRINTS[saga.last_error.details] if saga.last_error else None,
                )
                for saga in expected.values()
            )
            assert steps == {
                (one.condition, one.name, one.step_name, one.action, one.error): one.count for one in groups
            }
            assert sum(one.in_doubt for one in groups) == sum(saga.in_doubt for saga in expected.values())
            unclaimed = [saga for saga in expected.values() if not saga.recovery_attempts and not saga.lease_owner]
            assert sum(one.never_claimed for one in groups) == len(unclaimed)
            failed = [saga for saga in expected.values() if saga.last_entry and saga.last_entry.status is _FAILED]
            assert sum(one.failed for one in groups) == len(failed)
            owners = {saga.lease_owner for saga in expected.values()} - {None}
            assert {owner for one in groups for owner in one.lease_owners} <= owners
            assert bool(owners) == any(one.lease_owners for one in groups)
            assert {saga_id for one in groups for saga_id in one.examples} <= expected.keys()

    async def test_pages_follow_each_other(self, storage: InspectedStorage) -> None:
        """While sagas come and finish, the pages bring each that was there once, and none twice."""
        name = f"order-{uuid4()}"
        ids = [await _new(storage, name) for _ in range(7)]
        page = await storage.find_sagas(SagaQuery(name=name), limit=2)
        seen = [saga.id for saga in page.sagas]
        while page.after is not None:
            await _new(storage, name)
            await storage.update_status(ids[len(seen) % 7], SagaStatus.COMPLETED)
            page = await storage.find_sagas(SagaQuery(name=name), limit=2, after=page.after)
            seen += [saga.id for saga in page.sagas]
        assert seen == ids[::-1]

    async def test_a_page_says_if_there_is_more(self, storage: InspectedStorage) -> None:
        """The last page has no ``after``, also if it is full."""
        name = f"order-{uuid4()}"
        for _ in range(4):
            await _new(storage, name)
        first = await storage.find_sagas(SagaQuery(name=name), limit=2)
        last = await storage.find_sagas(SagaQuery(name=name), limit=2, after=first.after)
        assert (len(first.sagas), len(last.sagas)) == (2, 2)
        assert first.after is not None
        assert last.after is None

    async def test_a_search_says_how_far_back_it_looked(self, storage: InspectedStorage) -> None:
        """Finished sagas are searched for 24 hours back, unless the query says otherwise; unfinished ones always."""
        now = (await storage.get_saga(await _new(storage, "order"))).created_at
        page = await storage.find_sagas(SagaQuery(name="order"), limit=1)
        assert page.finished_since is not None
        assert timedelta(0) <= page.finished_since - (now - timedelta(hours=24)) < self.patience
        for query in (
            SagaQuery(name="order", created_after=now - _LONG),
            SagaQuery(name="order", statuses=UNFINISHED),
            SagaQuery(),
        ):
            assert (await storage.find_sagas(query, limit=1)).finished_since is None

    async def test_times_of_creation(self, storage: InspectedStorage) -> None:
        """From ``created_after`` on, and before ``created_before``."""
        name = f"order-{uuid4()}"
        first, second = [await storage.get_saga(await _new(storage, name)) for _ in range(2)]

        async def found(after: datetime | None, before: datetime | None) -> list[UUID]:
            query = SagaQuery(name=name, created_after=after, created_before=before)
            return [saga.id for saga in (await storage.find_sagas(query)).sagas]

        assert await found(second.created_at, None) == [second.id]
        assert await found(None, second.created_at) == [first.id]
        assert await found(first.created_at, first.created_at) == []

    async def test_an_id_by_its_first_digits(self, storage: InspectedStorage) -> None:
        """A saga is found by its id's first digits, with or without hyphens, in either case."""
        saga_id = await _new(storage, "order")
        for prefix in (str(saga_id), saga_id.hex[:20], str(saga_id)[:10].upper()):
            page = await storage.find_sagas(SagaQuery(id_prefix=prefix))
            assert [saga.id for saga in page.sagas] == [saga_id]
        assert (await storage.find_sagas(SagaQuery(id_prefix=uuid4().hex))).sagas == []

    async def test_what_holds_first_counts(self, storage: InspectedStorage, age: Age) -> None:
        """A leased saga is held, whatever else is so; when the lease has expired it is exhausted, or else abandoned."""
        name = f"order-{uuid4()}"
        saga_id = await _new(storage, name, steps=[LogStep("pay", "act", _STARTED)])
        assert await _standing(storage, name) == (SagaCondition.ACTIVE, True)
        await _claim(storage, name)
        assert await _standing(storage, name) == (SagaCondition.HELD, False)
        await age(saga_id, _LONG)
        assert await _standing(storage, name) == (SagaCondition.ABANDONED, True)
        assert await _standing(storage, name, max_attempts=1) == (SagaCondition.EXHAUSTED, True)
        await storage.update_status(saga_id, SagaStatus.FAILED)
        assert await _standing(storage, name, max_attempts=1) == (SagaCondition.FINISHED, True)

    @pytest.mark.parametrize("verb", ["reset_recovery_attempts", "break_lease", "settle_step"])
    async def test_persons_are_no_sign_of_life(self, storage: InspectedStorage, verb: str, together: Together) -> None:
        """An intervention neither ends a saga's silence nor becomes its last entry."""
        name = f"order-{uuid4()}"
        saga_id, other_id = await together(2)
        await storage.create_saga(saga_id, name, {})
        await _claim(storage, name)
        await storage.log_step(saga_id, "pay", "act", _STARTED)
        [entry] = await storage.get_step_history(saga_id)
        await storage.create_saga(other_id, name, {})
        other = await storage.get_saga(other_id)
        if verb == "settle_step":
            await storage.settle_step(saga_id, entry.id, _COMPLETED, **_WHO)
        else:
            await getattr(storage, verb)(saga_id, **_WHO)
        newer, saga = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert saga.silent_for - newer.silent_for == other.created_at - entry.created_at
        assert saga.last_entry is not None
        assert saga.last_entry.step_name == "pay"

    async def test_long_details_are_cut(self, storage: InspectedStorage) -> None:
        """A list brings the beginning of an entry's details and their end; the history has them whole."""
        name = f"order-{uuid4()}"
        details = "\N{GRINNING FACE}" * 100_000 + "refused"
        await _new(storage, name, steps=[LogStep("pay", "act", _FAILED, details)])
        [saga] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert saga.last_entry == saga.last_error
        assert saga.last_entry is not None
        assert saga.last_entry.details == f"{details[:1000]}\N{HORIZONTAL ELLIPSIS}{details[-1000:]}"

    async def test_only_the_end_of_a_history_counts(self, storage: InspectedStorage) -> None:
        """What began more than 1,000 entries ago isn't seen by a view."""
        name = f"order-{uuid4()}"
        steps = [LogStep("pay", "act", _STARTED), *[LogStep("poll", "act", _COMPLETED)] * 999]
        saga_id = await _new(storage, name, steps=steps)
        assert await storage.count_sagas(SagaQuery(name=name, in_doubt=True)) == 1
        await storage.log_step(saga_id, "poll", "act", _COMPLETED)
        assert await storage.count_sagas(SagaQuery(name=name, in_doubt=True)) == 0
        assert len(await storage.get_in_doubt_steps(saga_id)) == 1

    async def test_hostile_text_comes_back(self, storage: InspectedStorage) -> None:
        """Names, owners, steps and details hold whatever may be stored, and can be asked for."""
        hostile = f'\'; DROP TABLE "x" -- %s :name $1 \\ \x1b[31m\u202e\u00fc\U0001f600{uuid4()}'
        await storage.save(
            Checkpoint(
                uuid4(), name=hostile, status=SagaStatus.RUNNING, steps=[LogStep(hostile, "act", _FAILED, hostile)]
            )
        )
        await _claim(storage, hostile, owner=hostile)
        [saga] = (await storage.find_sagas(SagaQuery(name=hostile, step=hostile, lease_owner=hostile))).sagas
        assert (saga.name, saga.lease_owner) == (hostile, hostile)
        assert saga.last_error is not None
        assert (saga.last_error.step_name, saga.last_error.details) == (hostile, hostile)

    async def test_interventions_are_listed(self, storage: InspectedStorage) -> None:
        """Newest first, page by page, by who and since when, with what they say."""
        name, by = f"order-{uuid4()}", f'al"ice \N{EM DASH} {uuid4()}'
        saga_id = await _new(storage, name)
        since = (await storage.get_saga(saga_id)).created_at
        await _claim(storage, name)
        await storage.break_lease(saga_id, by=by, reason="one")
        await storage.reset_recovery_attempts(saga_id, by=f"{by}x", reason="other")
        await storage.give_up_saga(saga_id, by=by, reason="two")
        first = await storage.find_interventions(since=since, by=by, limit=1)
        last = await storage.find_interventions(since=since, by=by, limit=1, after=first.after)
        [given_up], [broken] = first.interventions, last.interventions
        assert last.after is None
        assert (given_up.verb, given_up.by, given_up.reason) == ("give_up_saga", by, "two")
        assert (broken.verb, broken.saga_id, broken.name) == ("break_lease", saga_id, name)
        assert broken.before == {"status": "PENDING", "recovery_attempts": 1, "lease_owner": "worker-1"}
        history = await storage.get_step_history(saga_id)
        assert [broken.entry_id, given_up.entry_id] == [history[0].id, history[2].id]
        later = given_up.created_at + timedelta(microseconds=1)
        assert (await storage.find_interventions(since=later, by=by)).interventions == []
        everybody = await storage.find_interventions(since=since, limit=1000)
        assert [one.by for one in everybody.interventions if one.saga_id == saga_id] == [by, f"{by}x", by]

    async def test_what_is_no_record_is_listed_too(self, storage: InspectedStorage) -> None:
        """An entry under our names that nobody's intervention wrote comes with its details as the reason."""
        saga_id = await _new(storage, "order")
        since = (await storage.get_saga(saga_id)).created_at
        for details in ("no JSON", None, '{"by": 7}'):
            await storage.log_step(saga_id, "saga_store.odd", "act", _COMPLETED, details)
        page = await storage.find_interventions(since=since, limit=1000)
        found = [(one.verb, one.by, one.reason) for one in page.interventions if one.saga_id == saga_id]
        assert found == [("odd", None, '{"by": 7}'), ("odd", None, None), ("odd", None, "no JSON")]

    async def test_figures(self, storage: InspectedStorage) -> None:
        """Unfinished sagas by name and condition, steps in doubt, those that failed, and the newest entry's id."""
        before = await storage.get_figures()
        name = f"order-{uuid4()}"
        for steps in ([LogStep("pay", "act", _STARTED), LogStep("ship", "act", _STARTED)], []):
            await _new(storage, name, steps=steps)
        await storage.save(
            Checkpoint(uuid4(), name=name, status=SagaStatus.FAILED, steps=[LogStep("pay", "act", _STARTED)])
        )
        saga_id = await _new(storage, name, status=SagaStatus.RUNNING)
        await storage.save(Checkpoint(saga_id, recovery_attempts=9))
        figures = await storage.get_figures()
        mine = {condition: count for (of, condition), count in figures.unfinished.items() if of == name}
        assert mine == {SagaCondition.ACTIVE: 2, SagaCondition.EXHAUSTED: 1}
        assert figures.failed_24h == before.failed_24h + 1
        assert figures.in_doubt_steps == before.in_doubt_steps + 3
        assert figures.log_entries >= before.log_entries + 3
        assert figures.oldest_unfinished > timedelta(0)
        stale = await storage.get_figures(stale_after=timedelta(0), max_attempts=10)
        assert stale.unfinished[name, SagaCondition.STALE] == 3

    @pytest.mark.parametrize("status", [_COMPLETED, _FAILED, _COMPENSATED])
    async def test_settling_a_step(self, storage: InspectedStorage, status: SagaStepStatus) -> None:
        """A settled step is in doubt no longer; the history says how it ended, who says so and why."""
        saga_id, entry = await _in_doubt(storage)
        before = await storage.get_saga(saga_id)
        await storage.settle_step(saga_id, entry.id, status, **_WHO)
        assert await storage.get_in_doubt_steps(saga_id) == []
        _, outcome, kept = await storage.get_step_history(saga_id)
        assert (outcome.step_name, outcome.action, outcome.status) == ("pay", "compensate", status)
        assert (kept.step_name, kept.status) == ("saga_store.settle_step", _COMPLETED)
        assert json.loads(kept.details or "") == {
            **_WHO,
            "status": "RUNNING",
            "recovery_attempts": 1,
            "lease_owner": "worker-1",
            "entry_id": entry.id,
            "step_name": "pay",
            "action": "compensate",
            "outcome": status.value,
        }
        after = await storage.get_saga(saga_id)
        assert after == replace(
            before, version=before.version + 1, lease_owner=None, lease_expires_at=None, updated_at=after.updated_at
        )

    async def test_settling_fences_the_worker(self, storage: InspectedStorage) -> None:
        """Whoever works on the saga is refused afterwards."""
        saga_id, entry = await _in_doubt(storage)
        version = (await storage.get_saga(saga_id)).version
        await storage.settle_step(saga_id, entry.id, _COMPLETED, **_WHO)
        with pytest.raises(SagaConcurrencyError):
            await storage.save(
                Checkpoint(saga_id, steps=[LogStep("pay", "compensate", _FAILED)], expected_version=version)
            )

    async def test_settling_expects_a_version(self, storage: InspectedStorage) -> None:
        """At another version than the expected one the step stays in doubt; at that version it is settled."""
        saga_id, entry = await _in_doubt(storage)
        before = await _observe(storage, saga_id)
        version = (await storage.get_saga(saga_id)).version
        for expected in (version - 1, version + 1):
            with pytest.raises(SagaConcurrencyError) as refusal:
                await storage.settle_step(saga_id, entry.id, _COMPLETED, **_WHO, expected_version=expected)
            assert (refusal.value.expected, refusal.value.actual) == (expected, version)
        assert await _observe(storage, saga_id) == before
        await storage.settle_step(saga_id, entry.id, _COMPLETED, **_WHO, expected_version=version)
        assert await storage.get_in_doubt_steps(saga_id) == []

    async def test_the_end_of_a_history(self, storage: InspectedStorage) -> None:
        """The last entries, in order, of details 2,000 characters, and how many come before them."""
        saga_id, other = await _new(storage, "order"), await _new(storage, "order")
        details = [None, "", "\U0001f600" * 2000, "x" * 1000 + "y" + "z" * 1000, "y" * 100_000]
        for text in details:
            await storage.log_step(saga_id, "pay", "act", _FAILED, text)
            await storage.log_step(other, "pay", "act", _FAILED, "another saga's")
        history = await storage.get_step_history(saga_id)
        cut = [cut_details(entry.details) for entry in history]
        seen = [replace(entry, details=shown) for entry, shown in zip(history, cut, strict=True)]
        assert await storage.get_recent_history(saga_id) == RecentHistory(seen)
        assert await storage.get_recent_history(saga_id, limit=2) == RecentHistory(seen[-2:], left_out=3)
        assert await storage.get_recent_history(saga_id, after=history[1].id) == RecentHistory(seen[2:])
        assert await storage.get_recent_history(saga_id, limit=1, after=history[1].id) == RecentHistory(seen[-1:], 2)
        for nothing in (
            await storage.get_recent_history(saga_id, after=2**63 - 1),
            await storage.get_recent_history(await _new(storage, "order")),
        ):
            assert nothing == RecentHistory([])
        with pytest.raises(SagaNotFoundError):
            await storage.get_recent_history(uuid4())

    async def test_a_context_is_peeked_at(self, storage: InspectedStorage) -> None:
        """A context of at most so many bytes comes whole, of a bigger one only the size, in bytes of JSON."""
        saga_id, other = await _new(storage, "order"), uuid4()
        context = {"note": 'a\x00\u202e\ud800 "\\u0041"', "lines": [{"n": 1.5, "ok": True}] * 3, "none": None}
        await storage.create_saga(other, "order", context)
        size = len(json.dumps(context, separators=(",", ":")))
        assert await storage.peek_context(saga_id) == ContextPeek(2, {})
        assert await storage.peek_context(saga_id, most=1) == ContextPeek(2, None)
        assert await storage.peek_context(other, most=size) == ContextPeek(size, context)
        assert await storage.peek_context(other, most=size - 1) == ContextPeek(size, None)
        with pytest.raises(SagaNotFoundError):
            await storage.peek_context(uuid4())

    async def test_only_what_is_in_doubt_is_settled(self, storage: InspectedStorage) -> None:
        """A step that has ended, was settled, isn't there, or is another saga's is refused, and nothing changes."""
        saga_id, entry = await _in_doubt(storage)
        other, others = await _in_doubt(storage)
        await storage.log_step(saga_id, "pay", "compensate", _COMPENSATED)
        await storage.settle_step(other, others.id, _FAILED, **_WHO)
        before = await _observe(storage, saga_id), await _observe(storage, other)
        ended = (await storage.get_step_history(saga_id))[1].id
        for whose, which in (
            (saga_id, entry.id),
            (saga_id, ended),
            (saga_id, others.id),
            (other, others.id),
            (other, -1),
        ):
            with pytest.raises(InvalidSagaDataError) as refusal:
                await storage.settle_step(whose, which, _COMPLETED, **_WHO)
            assert refusal.value.field == "entry_id"
        assert (await _observe(storage, saga_id), await _observe(storage, other)) == before

    @pytest.mark.parametrize("status", [_COMPLETED, _FAILED])
    async def test_the_last_of_several_attempts_is_settled(
        self, storage: InspectedStorage, status: SagaStepStatus
    ) -> None:
        """An end is that of all attempts before it, so an earlier one is refused, and the last is named."""
        saga_id, earlier = await _in_doubt(storage)
        await storage.log_step(saga_id, "pay", "act", _STARTED)
        await storage.log_step(saga_id, "pay", "compensate", _STARTED)
        earlier_still, other, last = await storage.get_in_doubt_steps(saga_id)
        assert earlier_still == earlier
        before = await _observe(storage, saga_id)
        with pytest.raises(InvalidSagaDataError, match=rf"\b{last.id}\b") as refusal:
            await storage.settle_step(saga_id, earlier.id, status, **_WHO)
        assert refusal.value.field == "entry_id"
        assert await _observe(storage, saga_id) == before
        await storage.settle_step(saga_id, last.id, status, **_WHO)
        assert await storage.get_in_doubt_steps(saga_id) == [other]
        await storage.settle_step(saga_id, other.id, status, **_WHO)
        assert await storage.get_in_doubt_steps(saga_id) == []

    async def test_settling_badly(self, storage: InspectedStorage) -> None:
        """Who, why and how have to be told; a missing saga is an error."""
        saga_id, entry = await _in_doubt(storage)
        before = await _observe(storage, saga_id)
        settle: _Ask = storage.settle_step
        good = {"saga_id": saga_id, "entry_id": entry.id, "status": _COMPLETED, **_WHO}
        bad = [("status", _STARTED), ("status", "DONE"), ("by", ""), ("by", None), ("reason", ""), ("reason", "\0")]
        for field, value in [*bad, ("entry_id", "1"), ("entry_id", True), ("saga_id", "x")]:
            with pytest.raises(InvalidSagaDataError) as refusal:
                await settle(**(good | {field: value}))
            assert refusal.value.field == field
        with pytest.raises(SagaNotFoundError):
            await settle(**(good | {"saga_id": uuid4()}))
        assert await _observe(storage, saga_id) == before

    async def test_bad_questions_are_refused(self, storage: InspectedStorage) -> None:
        """What can't be asked raises InvalidSagaDataError, which names it."""
        find, interventions, recent = storage.find_sagas, storage.find_interventions, storage.get_recent_history
        saga_id = await _new(storage, "order")
        now = datetime(2026, 1, 1, tzinfo=UTC)
        questions: list[tuple[str, _Ask, dict[str, Any]]] = [
            ("query", find, {"query": "all"}),
            ("limit", find, {"limit": 0}),
            ("after", find, {"after": "somewhere"}),
            ("name", find, {"query": SagaQuery(name="")}),
            ("max_attempts", storage.count_sagas, {"query": SagaQuery(max_attempts=-1)}),
            ("limit", storage.group_sagas, {"limit": -1}),
            ("since", interventions, {"since": datetime(2026, 1, 1)}),  # noqa: DTZ001 - that is the point
            ("by", interventions, {"since": now, "by": ""}),
            ("after", interventions, {"since": now, "after": "x"}),
            ("stale_after", storage.get_figures, {"stale_after": -_HOUR}),
            ("saga_id", storage.peek_context, {"saga_id": "x"}),
            ("most", storage.peek_context, {"saga_id": saga_id, "most": -1}),
            ("saga_id", recent, {"saga_id": "x"}),
            ("limit", recent, {"saga_id": saga_id, "limit": 0}),
            ("after", recent, {"saga_id": saga_id, "after": -1}),
            ("after", recent, {"saga_id": saga_id, "after": "1"}),
        ]
        for field, ask, arguments in questions:
            with pytest.raises(InvalidSagaDataError) as refusal:
                await ask(**arguments)
            assert refusal.value.field == field


class SettlementRaceContract(AgingContract):
    """What holds when several settle at the same time; for a storage that commits each call by itself."""

    async def test_one_of_several_settles(self, storage: InspectedStorage) -> None:
        """Of several persons who settle one step exactly one does; the others are refused."""
        saga_id, entry = await _in_doubt(storage)
        results = await asyncio.gather(
            *(storage.settle_step(saga_id, entry.id, _COMPLETED, by=f"p{n}", reason="seen") for n in range(8)),
            return_exceptions=True,
        )
        assert Counter(map(type, results)) == {type(None): 1, InvalidSagaDataError: 7}
        assert len(await storage.get_step_history(saga_id)) == 3

    async def test_a_person_and_a_worker(self, storage: InspectedStorage) -> None:
        """If the worker logs how the step ended at the same time, the person is never told that it was in doubt."""
        for _ in range(10):
            saga_id, entry = await _in_doubt(storage)
            settled, _ = await asyncio.gather(
                storage.settle_step(saga_id, entry.id, _COMPLETED, **_WHO),
                storage.log_step(saga_id, "pay", "compensate", _FAILED),
                return_exceptions=True,
            )
            statuses = [one.status for one in await storage.get_step_history(saga_id)]
            refused = [_STARTED, _FAILED]
            assert statuses == (refused if settled else [_STARTED, _COMPLETED, _COMPLETED, _FAILED])


_Observed: TypeAlias = tuple[SagaExecution, list[SagaLogEntry]]

_FINGERPRINTS = {None: None, "": None, "order 7 of 9 declined": "order # of # declined"} | {
    "Traceback (x):\n  y\nKeyError: 5": "KeyError: #"
}


def _look(row: SagaExecution, history: list[SagaLogEntry], query: SagaQuery) -> SagaSummary | None:
    """Return what is to be seen of a saga, if it is asked for: told by rules, not as a storage finds it.

    Times are seconds old or hours, so the kit's clock will do.
    """
    now = max(row.created_at, *(entry.created_at for entry in history), row.created_at) + timedelta(minutes=1)
    own = [entry for entry in history if not entry.step_name.startswith("saga_store.")]
    persons = [entry.created_at for entry in history if entry not in own]
    signs = [entry.created_at for entry in own if entry.created_at not in persons]
    signs.append(row.created_at if row.updated_at in persons else row.updated_at)
    silent_for = now - max(signs)
    if row.status not in UNFINISHED:
        condition = SagaCondition.FINISHED
    elif row.lease_expires_at and row.lease_expires_at > now:
        condition = SagaCondition.HELD
    elif row.recovery_attempts >= query.max_attempts:
        condition = SagaCondition.EXHAUSTED
    elif row.lease_owner:
        condition = SagaCondition.ABANDONED
    else:
        condition = SagaCondition.STALE if silent_for >= query.stale_after else SagaCondition.ACTIVE
    doubts = [
        entry
        for entry in own
        if entry.status is _STARTED
        and all(
            later.status is _STARTED or (later.step_name, later.action) != (entry.step_name, entry.action)
            for later in own[own.index(entry) :]
        )
    ]
    errors = [
        entry
        for entry in own
        if entry.status is _FAILED
        and not any(
            later.status in {_COMPLETED, _COMPENSATED}
            and (later.step_name, later.action) == (entry.step_name, entry.action)
            for later in own[own.index(entry) :]
        )
    ]
    saga = SagaSummary(
        row.id,
        row.name,
        row.status,
        row.version,
        row.recovery_attempts,
        row.lease_owner,
        row.lease_expires_at,
        row.created_at,
        row.updated_at,
        condition,
        bool(doubts) and condition is not SagaCondition.HELD,
        timedelta(0),
        own[-1] if own else None,
        errors[-1] if errors else None,
    )
    asked = query.context or {}
    fits = (
        (not query.statuses or row.status in query.statuses)
        and (not query.conditions or condition in query.conditions)
        and query.name in {None, row.name}
        and (query.step is None or (own[-1].step_name if own else None) == query.step)
        and query.lease_owner in {None, row.lease_owner}
        and (query.silent_for is None or silent_for >= query.silent_for)
        and query.in_doubt in {None, saga.in_doubt}
        and all(
            key in row.context
            and row.context[key] == value
            and isinstance(value, bool) is isinstance(row.context[key], bool)
            for key, value in asked.items()
        )
    )
    return saga if fits else None


def _comparable(saga: SagaSummary) -> SagaSummary:
    return replace(saga, silent_for=timedelta(0))


async def _all_pages(storage: InspectedStorage, query: SagaQuery) -> list[SagaSummary]:
    page = await storage.find_sagas(query, limit=2)
    found = page.sagas
    while page.after is not None:
        page = await storage.find_sagas(query, limit=2, after=page.after)
        found = found + page.sagas
    return found


async def _make(storage: InspectedStorage, recipe: _Recipe, example: str) -> UUID:
    saga_id, name = uuid4(), f"{recipe.name}-{example}"
    leased = recipe.is_leased and recipe.status in UNFINISHED
    await storage.save(
        Checkpoint(
            saga_id,
            name=name,
            status=recipe.status,
            recovery_attempts=0 if leased else recipe.attempts,
            context={"example": example, "n": 1, "\0": ["\ud800", {"\u00fc": None}]},
            steps=recipe.steps,
        )
    )
    if leased:
        await _claim(storage, name)
        await storage.save(Checkpoint(saga_id, recovery_attempts=recipe.attempts))
    return saga_id


async def _new(storage: InspectedStorage, name: str, **more: Any) -> UUID:  # noqa: ANN401 - of a Checkpoint
    saga_id = uuid4()
    await storage.save(Checkpoint(saga_id, name=name, **more))
    return saga_id


async def _claim(storage: InspectedStorage, name: str, *, owner: str = "worker-1") -> None:
    [_] = await storage.claim_sagas(owner=owner, lease=_LEASE, limit=1, stale_after=timedelta(0), name=name)


async def _in_doubt(storage: InspectedStorage) -> tuple[UUID, SagaLogEntry]:
    """Make a RUNNING saga that worker-1 holds, and whose step is in doubt."""
    name = f"order-{uuid4()}"
    saga_id = await _new(storage, name, status=SagaStatus.RUNNING, steps=[LogStep("pay", "compensate", _STARTED)])
    await _claim(storage, name)
    [entry] = await storage.get_in_doubt_steps(saga_id)
    return saga_id, entry


async def _standing(storage: InspectedStorage, name: str, *, max_attempts: int = 5) -> tuple[SagaCondition, bool]:
    [saga] = (await storage.find_sagas(SagaQuery(name=name, max_attempts=max_attempts))).sagas
    return saga.condition, saga.in_doubt


async def _observe(storage: InspectedStorage, saga_id: UUID) -> _Observed:
    return await storage.get_saga(saga_id), await storage.get_step_history(saga_id)
