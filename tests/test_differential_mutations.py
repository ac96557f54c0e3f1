"""Storages that are broken on purpose: the differential machine finds what is wrong with each."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import (
    Context,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaExecution,
    SagaLogEntry,
    SagaNotFoundError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing import Age, Transaction
from saga_store.testing.differential import Opener, Tally, TwinClock, find_difference
from saga_store.write import Write
from tests import test_mutations as mutations
from tests.test_contract import make_older

SCHEDULES = 200
"""Many more than any of them needs."""


class WrongErrors(SqlAlchemySagaStorage):
    """Tells a missing saga as bad input would be told."""

    async def _write(self, write: Write) -> int:
        try:
            return await super()._write(write)
        except SagaNotFoundError as exc:
            raise ValueError(write.saga_id) from exc


class UnorderedTies(SqlAlchemySagaStorage):
    """Orders the history by time alone, so that entries of one checkpoint come as they like."""

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        entries = await super()._fetch_history(saga_id)
        entries.reverse()
        return sorted(entries, key=lambda entry: entry.created_at)


class LeakySession(AsyncSession):
    """Commits what it is to roll back."""

    async def rollback(self) -> None:
        await self.commit()


class LosesFacts(MemorySagaStorage):
    """Raises the right error, about another saga."""

    async def _write(self, write: Write) -> int:
        try:
            return await super()._write(write)
        except SagaNotFoundError as exc:
            raise SagaNotFoundError(UUID(int=0)) from exc


class MakesFloats(MemorySagaStorage):
    """Gives back 1.0 for 1 in contexts."""

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        saga = await super()._fetch_saga(saga_id)
        context: Context = {key: float(value) if type(value) is int else value for key, value in saga.context.items()}
        return replace(saga, context=context)


# Most of them are known to the contract tests, which have a sentence for each; here nobody knows what to look for.
BROKEN_TWINS: tuple[type[MemorySession | MemorySagaStorage], ...] = (
    LosesFacts,
    MakesFloats,
    mutations.ForgetsVersions,
    mutations.IgnoresMissing,
    mutations.OrdersByTime,
    mutations.KeepsWhatIsRolledBack,
    mutations.KeepsEntriesRolledBack,
    mutations.ShowsUncommitted,
    mutations.AbortsOnRefusal,
    mutations.ForgetsLeases,
    mutations.CountsNoAttempts,
    mutations.FencesNobody,
    mutations.KeepsLeases,
    mutations.RecordsNothing,
    mutations.DoubtsByNameOnly,
)


async def difference(opener: Opener, age: Age, *, shrink: bool = False) -> str:
    """Return what the machine says of a storage that differs, with the schedule that shows it."""
    with pytest.raises(AssertionError, match="the storage differs from its twin") as found:
        await find_difference(opener, age, joins=True, schedules=SCHEDULES, steps=50, start=2, shrink=shrink)
    return "\n".join([str(found.value), *found.value.__notes__])


def broken_twin(
    session_class: type[MemorySession] = MemorySession, storage_class: type[MemorySagaStorage] = MemorySagaStorage
) -> tuple[Opener, Age]:
    memory = MemoryDatabase(clock=TwinClock())

    @asynccontextmanager
    async def opener() -> AsyncIterator[tuple[SagaStorage, Transaction]]:
        async with session_class(memory) as session:
            yield storage_class(session), session

    async def age(saga_id: UUID, by: timedelta) -> None:
        memory.age(saga_id, by)

    return opener, age


def broken_storage(
    engine: AsyncEngine,
    session_class: type[AsyncSession] = AsyncSession,
    storage_class: type[SqlAlchemySagaStorage] = SqlAlchemySagaStorage,
) -> tuple[Opener, Age]:
    @asynccontextmanager
    async def opener() -> AsyncIterator[tuple[SagaStorage, Transaction]]:
        async with session_class(engine) as session:
            yield storage_class(session), session

    return opener, partial(make_older, engine)


class TestOnPostgreSQL:
    async def test_a_wrong_type_of_error_is_found(self, make_engine: Callable[[str], AsyncEngine]) -> None:
        """A missing saga that is told as another error than the twin's is shown with both."""
        said = await difference(*broken_storage(make_engine("asyncpg"), storage_class=WrongErrors))
        assert "the twin:    SagaNotFoundError(saga_id=saga " in said
        assert "the storage: ValueError(" in said

    async def test_a_tie_in_ordering_is_found(self, make_engine: Callable[[str], AsyncEngine]) -> None:
        """A history that is ordered by a time which the entries of one checkpoint share is out of order."""
        said = await difference(*broken_storage(make_engine("asyncpg"), storage_class=UnorderedTies))
        assert "in an order that isn't that of the ids" in said.partition("the storage:")[2]

    async def test_a_leak_of_a_rollback_is_found(self, make_engine: Callable[[str], AsyncEngine]) -> None:
        """What is stored although it was rolled back is seen at the next look, and the twin doesn't have it."""
        said = await difference(*broken_storage(make_engine("asyncpg"), session_class=LeakySession))
        twin, _, storage = said.partition("the storage:")
        assert storage.strip() not in twin


class TestOnTheTwin:
    @pytest.mark.parametrize("broken", BROKEN_TWINS, ids=lambda broken: broken.__name__)
    async def test_what_is_broken_is_found(self, broken: type[MemorySession | MemorySagaStorage]) -> None:
        """Whatever is wrong, both answers are told, and the schedule that leads there."""
        twin = (
            broken_twin(session_class=broken)
            if issubclass(broken, MemorySession)
            else broken_twin(storage_class=broken)
        )
        said = await difference(*twin)
        assert "the twin:" in said
        assert "state.begin()" in said

    async def test_a_sound_twin_is_no_different(self) -> None:
        """The control: in the same schedules nothing is found on the twin as it is."""
        opener, age = broken_twin()
        tally = Tally()
        await find_difference(opener, age, joins=True, schedules=8, steps=50, start=2, tally=tally)
        assert tally.schedules >= 8
        assert tally.steps > 200

    async def test_the_schedule_that_is_shown_is_short(self) -> None:
        """What is printed is what is needed to see the difference: here one step, on one saga."""
        opener, age = broken_twin(storage_class=mutations.IgnoresMissing)
        said = await difference(opener, age, shrink=True)
        steps = [line for line in said.splitlines() if line.startswith("state.") and "all_is_alike" not in line]
        assert len(steps) <= 8, said

    async def test_the_same_start_makes_the_same_schedules(self) -> None:
        """A difference is found again, after as many steps and told in the same words."""
        tallies, said = [Tally(), Tally()], []
        for tally in tallies:
            opener, age = broken_twin(storage_class=mutations.IgnoresMissing)
            with pytest.raises(AssertionError) as found:
                await find_difference(
                    opener, age, joins=True, schedules=SCHEDULES, steps=50, start=3, shrink=False, tally=tally
                )
            said.append(str(found.value))
        assert tallies[0] == tallies[1]
        assert said[0] == said[1]
