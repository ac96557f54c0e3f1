"""Writes that expect a version and whose answer got lost: the interleavings, written down before the code.

*First* is the first attempt, *again* a later one with the same id. First may have been executed when its answer is
lost, may never be, or may be executed at any time after, for its bytes may lie in a buffer or it may wait for a lock.

========================================================  ======================================================
what happens                                              what the caller gets
========================================================  ======================================================
first was executed, then again                            its version: the row remembers first
first never arrived, then again                           its version: again wrote it
again, then first                                         its version: first finds what again left, and is refused
first waits for a lock, again comes meanwhile             its version: again doesn't wait, and asks until it's clear
first was executed, others wrote, then again              its version: the row remembers the last few
first was executed, many others wrote                     UnknownOutcomeError: the row has forgotten
others wrote, first is refused or never arrives           SagaConcurrencyError, while the row remembers enough
log entries alone, which don't raise the version          all of this too; ids of one version don't push each other out
more of those at one version than a row remembers         written once, or UnknownOutcomeError
a run's creation                                          the same; its fence is that the saga isn't there yet
a lease taken, renewed or released on the way             the same; a lease that somebody took since hides nothing
the connection is lost again and again                    the same: every attempt has the same id
no connection any more                                    UnknownOutcomeError when the time is up
the process dies on any line                              nobody is there to be told; the write is there once or not
no version, or a joined transaction                       nothing is tried again: see test_repository
========================================================  ======================================================
"""

from datetime import timedelta
from uuid import uuid4

import pytest

from saga_store import (
    Checkpoint,
    SagaConcurrencyError,
    SagaStatus,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.write_sql import KEPT, KEPT_OF_ONE_VERSION
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import BRIEFLY, PATIENT, Scene, Write, change, log, step


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER], ids=lambda cut: cut.name)
class TestLostAnswer:
    """The caller doesn't notice, and the write is there exactly once."""

    @pytest.mark.parametrize("group_commit", [True, False], ids=["grouped", "single"])
    @pytest.mark.parametrize("bind", ["engine", "sessionmaker"])
    async def test_a_change_and_a_log_entry(
        self, database: Database, driver: str, bind: str, cut: Cut, *, group_commit: bool
    ) -> None:
        """The version that is returned is the true one, and the next write goes on from it."""
        async with Scene.on(database, driver, bind=bind, group_commit=group_commit, retry_for=PATIENT) as scene:
            scene.proxy.cut = cut
            assert await log(scene) == 1
            scene.proxy.cut = cut
            assert await change(scene) == 2
            scene.proxy.cut = cut
            await scene.storage.update_status(scene.saga_id, SagaStatus.RUNNING, expected_version=2)
            scene.proxy.cut = cut
            await scene.storage.update_context(scene.saga_id, {"n": 2}, expected_version=3)

            saga = await scene.saga()
            assert (saga.version, saga.status, saga.context) == (4, SagaStatus.RUNNING, {"n": 2})
            assert await scene.steps() == ["mine", "mine"]

    async def test_a_run_from_its_creation_to_its_end(self, database: Database, driver: str, cut: Cut) -> None:
        """Each commit of a run is cut: creation, log entries alone, changes."""
        saga_id = uuid4()
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            async with scene.storage.run(saga_id) as run:
                await run.create_saga(saga_id, "order", {"n": 0})
                await run.log_step(saga_id, "reserve", "act", step("").status)
                scene.proxy.cut = cut
                await run.commit()
                await run.log_step(saga_id, "charge", "act", step("").status)
                scene.proxy.cut = cut
                await run.commit()
                await run.update_status(saga_id, SagaStatus.COMPLETED)
                await run.log_step(saga_id, "ship", "act", step("").status)
                scene.proxy.cut = cut
                await run.commit()

            assert (await scene.other.get_saga(saga_id)).version == 2
            history = await scene.other.get_step_history(saga_id)
            assert [entry.step_name for entry in history] == ["reserve", "charge", "ship"]

    async def test_a_run_with_a_lease(self, database: Database, driver: str, cut: Cut) -> None:
        """Commits that renew it, a heartbeat and its release are cut, and the run notices nothing."""
        hour = timedelta(hours=1)
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            async with scene.storage.run(scene.saga_id, owner="me", lease=hour) as run:
                await run.update_context(scene.saga_id, {"n": 1})
                scene.proxy.cut = cut
                await run.commit()
                await run.log_step(scene.saga_id, "mine", "act", step("").status)
                scene.proxy.cut = cut
                await run.commit()
                scene.proxy.cut = cut
                await run.heartbeat()
                assert await run.holds_lease()
                scene.proxy.cut = cut

            saga = await scene.saga()
            assert (saga.lease_owner, saga.context, saga.version) == (None, {"n": 1}, 4)
            assert await scene.steps() == ["mine"]

    async def test_a_lease_that_somebody_took_since_hides_nothing(
        self, database: Database, driver: str, cut: Cut
    ) -> None:
        """The commit that finished the saga went through, or was refused: the lease of another says neither."""
        hour = timedelta(hours=1)
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            async with scene.storage.run(scene.saga_id, owner="me", lease=hour) as run:
                await run.update_status(scene.saga_id, SagaStatus.FAILED)
                commit = await scene.lose(cut, run.commit())
                if cut is Cut.BEFORE_SENDING:
                    await scene.other.break_lease(scene.saga_id, by="me", reason="test")
                async with scene.other.run(scene.saga_id, owner="they", lease=hour):
                    scene.proxy.gate.set()
                    if cut is Cut.BEFORE_ANSWER:
                        await commit
                    else:
                        with pytest.raises(SagaConcurrencyError):
                            await commit
            assert ((await scene.saga()).status is SagaStatus.FAILED) == (cut is Cut.BEFORE_ANSWER)


@pytest.mark.parametrize("write", [change, log])
class TestOthersWriteMeanwhile:
    """Between the loss and the next attempt another worker writes to the same saga."""

    @pytest.mark.parametrize("times", [1, KEPT - 1])
    async def test_what_was_executed_is_recognised(
        self, database: Database, driver: str, write: Write, times: int
    ) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(Cut.BEFORE_ANSWER, write(scene))
            version = (await scene.saga()).version
            await scene.write_meanwhile(times)
            scene.proxy.gate.set()
            assert await task == version
            assert (await scene.steps()).count("mine") == 1

    async def test_unversioned_writes_of_others_push_nothing_out(
        self, database: Database, driver: str, write: Write
    ) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(Cut.BEFORE_ANSWER, write(scene))
            version = (await scene.saga()).version
            await scene.write_meanwhile(KEPT + 1, versioned=False)
            scene.proxy.gate.set()
            assert await task == version

    async def test_what_was_executed_and_pushed_out_is_unknown(
        self, database: Database, driver: str, write: Write
    ) -> None:
        """Beyond what the row remembers nobody can tell, and nothing is written again."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(Cut.BEFORE_ANSWER, write(scene))
            await scene.write_meanwhile(KEPT)
            scene.proxy.gate.set()
            with pytest.raises(UnknownOutcomeError) as info:
                await task
            assert info.value.saga_id == scene.saga_id
            assert info.value.__cause__ is not None
            assert ["others have written more than 7 times" in note for note in info.value.__notes__] == [True]
            assert (await scene.steps()).count("mine") == 1

    @pytest.mark.parametrize(("times", "versioned"), [(1, True), (KEPT - 1, True), (3 * KEPT, False)])
    async def test_what_never_arrived_is_refused(
        self,
        database: Database,
        driver: str,
        write: Write,
        times: int,
        versioned: bool,  # noqa: FBT001 - likewise
    ) -> None:
        """The conflict is the truth, and names the version that is there."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(Cut.BEFORE_SENDING, write(scene))
            await scene.write_meanwhile(times, versioned=versioned)
            scene.proxy.gate.set()
            with pytest.raises(SagaConcurrencyError) as info:
                await task
            assert (info.value.expected, info.value.actual) == (1, times + 1)
            assert "mine" not in await scene.steps()

    async def test_a_refusal_that_was_lost_is_a_refusal(self, database: Database, driver: str, write: Write) -> None:
        """The first attempt came too late already, and its answer was lost."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            await scene.write_meanwhile(1)
            scene.proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(SagaConcurrencyError):
                await write(scene)
            assert await scene.steps() == ["theirs"]


class TestLogEntriesOfOneVersion:
    """They don't raise the version, so that nothing but their ids keeps them from being written twice."""

    async def test_others_at_the_same_version_push_nothing_out(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(Cut.BEFORE_ANSWER, log(scene))
            await scene.write_meanwhile(2 * KEPT, changes=False)
            scene.proxy.gate.set()
            assert await task == 1
            assert (await scene.steps()).count("mine") == 1

    @pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER], ids=lambda cut: cut.name)
    async def test_more_than_a_row_remembers_are_written_and_never_twice(self, database: Database, cut: Cut) -> None:
        """One that found no room for its id isn't written again, since nobody can tell."""
        async with Scene.on(database, "asyncpg", retry_for=BRIEFLY) as scene:
            await scene.write_meanwhile(KEPT_OF_ONE_VERSION + 1, changes=False)
            assert len(await scene.steps()) == KEPT_OF_ONE_VERSION + 1
            scene.proxy.cut = cut
            with pytest.raises(UnknownOutcomeError):
                await log(scene)
            assert (await scene.steps()).count("mine") == (cut is Cut.BEFORE_ANSWER)

    async def test_the_next_change_makes_room(self, database: Database) -> None:
        async with Scene.on(database, "asyncpg", retry_for=PATIENT) as scene:
            await scene.write_meanwhile(KEPT_OF_ONE_VERSION + 1, changes=False)
            await scene.other.update_status(scene.saga_id, SagaStatus.RUNNING, expected_version=1)
            scene.proxy.cut = Cut.BEFORE_ANSWER
            assert await scene.storage.save(Checkpoint(scene.saga_id, steps=[step("mine")], expected_version=2)) == 2
            assert (await scene.steps()).count("mine") == 1
