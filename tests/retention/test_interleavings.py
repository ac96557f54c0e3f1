"""Whatever fails, dies or comes between at whichever step, each saga is in the table or in a verified archive.

The steps, and what has to come of each, are in the table of docs/retention.md. Here every operation of the target and
of the database is counted: in turn each fails before it is done, fails after it, is where the archiver dies, or is
where somebody else does something to a saga. Then nothing is lost, and the next run archives what is left.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import pytest

from saga_store import (
    ArchiverBusyError,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    SagaArchivedError,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.retention import ArchiveReport, Target, archive, restore, verify
from saga_store.retention_model import ArchiveState, ArchivingTurn, RetentionSnapshot
from tests.retention.faulty import FaultyFileSystem, faulty
from tests.retention.world import ALL, check_nothing_is_lost, make_finished, record, records

_T = TypeVar("_T")

SAGAS = 7
NOTE = LogStep("note", "act", SagaStepStatus.COMPLETED, "came late")


class Killed(BaseException):
    """As SIGKILL does it: nobody catches it."""


class Steps:
    """Counts the operations of a run, and does something at one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.was_taken = False
        self.names: list[str] = []
        self.before: Callable[[], Awaitable[None]] | None = None
        self.after: Callable[[], Awaitable[None]] | None = None

    def reset(self, at: int | None = None) -> None:
        self.count, self.at, self.names = 0, at, []
        self.before = self.after = None

    async def take(self, name: str, work: Callable[[], Awaitable[_T]]) -> _T:
        self.count += 1
        self.names.append(name)
        is_it = self.count == self.at
        self.was_taken |= is_it
        if is_it and self.before:
            await self.before()
        result = await work()
        if is_it and self.after:
            await self.after()
        return result


class SteppedStorage(MemorySagaStorage):
    """The twin, with its calls for archives counted."""

    def __init__(self, database: MemoryDatabase, steps: Steps) -> None:
        super().__init__(database)
        self._steps = steps

    @contextlib.asynccontextmanager
    async def archiving(self, *, by: str) -> AsyncIterator[ArchivingTurn]:
        async with super().archiving(by=by) as turn:
            await self._steps.take("take the turn", _nothing)
            yield turn

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[RetentionSnapshot]:
        async with super().snapshot() as snapshot:
            await self._steps.take("begin to read", _nothing)
            yield snapshot
            await self._steps.take("end reading", _nothing)

    async def begin_archive(self, *given: Any, **more: Any) -> Any:  # noqa: ANN401 - as they come, and so below
        return await self._steps.take(
            "begin_archive", lambda: super(SteppedStorage, self).begin_archive(*given, **more)
        )

    async def verify_archive(self, *given: Any, **more: Any) -> Any:  # noqa: ANN401
        return await self._steps.take(
            "verify_archive", lambda: super(SteppedStorage, self).verify_archive(*given, **more)
        )

    async def fail_archive(self, *given: Any, **more: Any) -> Any:  # noqa: ANN401
        return await self._steps.take("fail_archive", lambda: super(SteppedStorage, self).fail_archive(*given, **more))

    async def finish_archive(self, *given: Any, **more: Any) -> Any:  # noqa: ANN401
        return await self._steps.take(
            "finish_archive", lambda: super(SteppedStorage, self).finish_archive(*given, **more)
        )

    async def make_stubs(self, *given: Any, **more: Any) -> Any:  # noqa: ANN401
        return await self._steps.take("make_stubs", lambda: super(SteppedStorage, self).make_stubs(*given, **more))


class SteppedTarget(Target):
    """A target whose operations are counted, too."""

    def __init__(self, uri: str, steps: Steps) -> None:
        super().__init__(uri)
        self._steps = steps

    async def run(self, what: str, work: Callable[[Any], _T]) -> _T:
        return await self._steps.take(what, lambda: super(SteppedTarget, self).run(what, work))


class World:
    def __init__(self) -> None:
        self.steps = Steps()
        self.database = MemoryDatabase()
        self.storage = MemorySagaStorage(self.database)
        self.stepped = SteppedStorage(self.database, self.steps)
        self.target = Target("faulty://sagas")
        self.stepped_target = SteppedTarget("faulty://sagas", self.steps)

    async def archive(self, **how: Any) -> ArchiveReport:  # noqa: ANN401 - as archive() takes it
        return await archive(self.stepped, self.stepped_target, ALL, sagas_per_archive=4, **how)

    async def check_the_next_run(self, originals: Any) -> None:  # noqa: ANN401 - as records() has it
        """See that nothing is lost, and that one more run leaves everything archived, and nothing half done."""
        await check_nothing_is_lost(self.storage, self.target, originals)
        await archive(self.storage, self.target, ALL, sagas_per_archive=4)
        assert await check_nothing_is_lost(self.storage, self.target, originals) == set(originals)
        states = {row.state for row in (await self.storage.find_archives()).archives}
        assert states <= {ArchiveState.REMOVED, ArchiveState.FAILED}
        report = await verify(self.target, self.storage)
        assert not report.problems
        assert not report.strays


@pytest.fixture
def world() -> Iterator[World]:
    with faulty():
        yield World()


async def _nothing() -> None:
    pass


def fresh() -> World:
    FaultyFileSystem.store.clear()
    return World()


async def each_step() -> AsyncIterator[tuple[int, World, dict[UUID, Any]]]:
    """Yield each step of a run by its number, with a new world; the last one is a step that there isn't."""
    at = 0
    while True:
        at += 1
        world = fresh()
        originals = await records(world.storage, await make_finished(world.storage, SAGAS))
        world.steps.reset(at)
        yield at, world, originals
        if not world.steps.was_taken:
            assert at > 30, f"a run has {at - 1} steps, which are too few: {world.steps.names}"
            return


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


@pytest.mark.usefixtures("world")
class TestFailing:
    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("before", StorageUnavailableError("the server is down")),
            ("before", OSError("no route")),
            ("after", UnknownOutcomeError(None)),
            ("before", Killed()),
            ("after", Killed()),
            ("after", asyncio.CancelledError()),
        ],
        ids=lambda given: given if isinstance(given, str) else type(given).__name__,
    )
    async def test_every_step_may_fail(self, kind: str, error: BaseException) -> None:
        """Before it is done or after, by an error, a kill, a cancellation: nothing is lost, the next run goes on."""
        async for _, world, originals in each_step():
            setattr(world.steps, kind, raising(error))
            with contextlib.suppress(SagaStoreError, OSError, Killed, asyncio.CancelledError):
                await world.archive()
            await world.check_the_next_run(originals)

    async def test_the_run_after_it_may_fail_as_well(self) -> None:
        """Killed at any step, and at the same step of the next run, which begins by finishing the first."""
        async for at, world, originals in each_step():
            for _ in range(2):
                world.steps.before = raising(Killed())
                with contextlib.suppress(Killed):
                    await world.archive()
                world.steps.reset(at)
            await world.check_the_next_run(originals)


@pytest.mark.usefixtures("world")
class TestWriters:
    async def test_what_is_appended_at_any_step_is_kept(self) -> None:
        """The entry is in the table, or its writer was told that the saga is archived."""
        async for _, world, originals in each_step():
            refused: list[UUID] = []

            async def append(world: World = world, refused: list[UUID] = refused) -> None:
                for saga_id in originals:  # noqa: B023 - called in this turn of the loop
                    try:
                        await world.storage.log_step(saga_id, NOTE.step_name, NOTE.action, NOTE.status, NOTE.details)
                    except SagaArchivedError:
                        refused.append(saga_id)

            world.steps.before = append
            await world.archive()
            for saga_id, original in originals.items() if world.steps.was_taken else ():
                if saga_id in refused:
                    stub = await world.storage.find_stub(saga_id)
                    assert stub is not None
                    continue
                found = (await restored(world, saga_id)).entries
                assert [entry.details for entry in found] == [
                    *(entry.details for entry in original.entries),
                    "came late",
                ]

    @pytest.mark.parametrize("finishes", [False, True])
    async def test_what_is_reopened_at_any_step_is_kept(self, finishes: bool) -> None:  # noqa: FBT001 - pytest's
        """Also if it is finished again: the newer state is never lost."""
        async for _, world, originals in each_step():
            accepted: list[UUID] = []

            async def reopen(world: World = world, accepted: list[UUID] = accepted) -> None:
                for saga_id in originals:  # noqa: B023 - called in this turn of the loop
                    with contextlib.suppress(SagaArchivedError):
                        await world.storage.update_status(saga_id, SagaStatus.RUNNING)
                        await world.storage.update_context(saga_id, {"newer": True})
                        if finishes:
                            await world.storage.update_status(saga_id, SagaStatus.COMPLETED)
                        accepted.append(saga_id)

            world.steps.before = reopen
            await world.archive()
            for saga_id in accepted:
                if finishes:
                    assert (await restored(world, saga_id)).context == '{"newer":true}'
                else:
                    assert await world.storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"newer": True})

    async def test_what_is_held_at_any_step_stays(self) -> None:
        """Or its holder was told that it is archived."""
        async for _, world, originals in each_step():
            held: list[UUID] = []

            async def hold(world: World = world, held: list[UUID] = held) -> None:
                for saga_id in originals:  # noqa: B023 - called in this turn of the loop
                    with contextlib.suppress(SagaArchivedError):
                        await world.storage.hold_saga(saga_id, by="counsel", reason="case 12")
                        held.append(saga_id)

            world.steps.before = hold
            await world.archive()
            await archive(world.storage, world.target, ALL)
            for saga_id in held:
                assert await world.storage.find_stub(saga_id) is None
                assert (await world.storage.get_step_history(saga_id))[-1].step_name == "saga_store.hold_saga"

    async def test_what_is_restored_at_any_step_is_there(self) -> None:
        """As it was; the archiver that is at work leaves it."""
        async for _, world, originals in each_step():

            async def back(world: World = world) -> None:
                for saga_id in originals:  # noqa: B023 - called in this turn of the loop
                    if await world.storage.find_stub(saga_id):
                        await restore(world.storage, saga_id, archive=world.target)

            world.steps.before = back
            await world.archive()
            await check_nothing_is_lost(world.storage, world.target, originals)
            await restore(world.storage, archive=world.target, keep_for=timedelta(0))
            assert await records(world.storage, originals) == originals

    async def test_another_archiver_at_any_step_waits_for_its_turn(self) -> None:
        """Or has it, before and after; either way each saga is archived once."""
        async for _, world, originals in each_step():
            told: list[str] = []

            async def another(world: World = world, told: list[str] = told) -> None:
                try:
                    await archive(world.storage, world.target, ALL, sagas_per_archive=4)
                except ArchiverBusyError as exc:
                    told.append(str(exc))

            world.steps.before = another
            await world.archive()
            await world.check_the_next_run(originals)
            rows = (await world.storage.find_archives(states=[ArchiveState.REMOVED])).archives
            assert sum(row.removed for row in rows) == SAGAS
            assert sum(row.sagas for row in rows) == SAGAS
            assert all("another archiver is at work" in message for message in told)


async def restored(world: World, saga_id: UUID) -> Any:  # noqa: ANN401 - a record
    """Return a saga as it is in the table, or comes back to it."""
    if await world.storage.find_stub(saga_id):
        await restore(world.storage, saga_id, archive=world.target, keep_for=timedelta(0))
    return await record(world.storage, saga_id)
