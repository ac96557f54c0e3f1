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

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga_store import (
    Checkpoint,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.write_ids import KEPT, KEPT_OF_ONE_VERSION
from tests.connections import until_blocked
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import PATIENT, Scene, step

Write = Callable[[Scene], Awaitable[object]]
NEVER = timedelta(0)
BRIEFLY = timedelta(seconds=0.2)


async def change(scene: Scene) -> int:
    return await scene.storage.save(
        Checkpoint(scene.saga_id, context={"n": 1}, steps=[step("mine")], expected_version=1)
    )


async def log(scene: Scene) -> int:
    return await scene.storage.save(Checkpoint(scene.saga_id, steps=[step("mine")], expected_version=1))


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
            assert info.value.__cause__ is None or isinstance(info.value.__cause__, Exception)
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


class TestStrandedOriginal:
    """The first attempt reaches the server after the second one."""

    @pytest.mark.parametrize("write", [change, log])
    @pytest.mark.parametrize("further", [0, 1, 2 * KEPT])
    async def test_it_is_refused(self, database: Database, driver: str, write: Write, further: int) -> None:
        """However many writes have followed, whether they raise the version or not."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            scene.proxy.cut = Cut.STRANDED
            version = await write(scene)
            await scene.write_meanwhile(further, changes=False)
            await scene.proxy.deliver()
            assert (await scene.saga()).version == version
            await scene.write_meanwhile(further)
            assert await scene.steps() == ["mine", *["theirs"] * (2 * further)]

    async def test_a_creation(self, database: Database, driver: str) -> None:
        saga_id = uuid4()
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            async with scene.storage.run(saga_id) as run:
                await run.create_saga(saga_id, "order", {})
                scene.proxy.cut = Cut.STRANDED
                await run.commit()
            await scene.other.log_step(saga_id, "mine", "act", step("").status)
            await scene.proxy.deliver()
            assert (await scene.other.get_saga(saga_id)).version == 1

    async def test_one_that_finds_no_room_comes_once_at_most(self, database: Database) -> None:
        """The caller was told that it is unknown, and then it arrives."""
        async with Scene.on(database, "asyncpg", retry_for=BRIEFLY) as scene:
            await scene.write_meanwhile(KEPT_OF_ONE_VERSION, changes=False)
            scene.proxy.cut = Cut.STRANDED
            with pytest.raises(UnknownOutcomeError):
                await log(scene)
            await scene.proxy.deliver()
            assert (await scene.steps()).count("mine") == 1

    @pytest.mark.parametrize("write", [change, log])
    @pytest.mark.parametrize("committed", [True, False], ids=["holder commits", "holder rolls back"])
    @pytest.mark.parametrize("group_commit", [True, False], ids=["grouped", "single"])
    async def test_one_that_waits_for_a_lock(
        self, database: Database, driver: str, write: Write, *, committed: bool, group_commit: bool
    ) -> None:
        """While somebody holds the row, the first attempt waits there and the second goes on asking."""
        async with Scene.on(database, driver, group_commit=group_commit, retry_for=PATIENT) as scene:
            await scene.warm_up(SqlAlchemySagaStorage(scene.engine, group_commit=False))
            async with AsyncSession(scene.direct) as holder:
                await SqlAlchemySagaStorage(holder).update_context(scene.saga_id, {"n": 7})
                task = await scene.lose(Cut.AT_ONCE, write(scene), let_pass=1 if group_commit else 0)
                scene.proxy.gate.set()
                await until_blocked(database)
                await (holder.commit() if committed else holder.rollback())
            if committed:
                with pytest.raises(SagaConcurrencyError):
                    await task
            else:
                assert await task == (1 if write is log else 2)
            assert await scene.steps() == ([] if committed else ["mine"])


class TestCreationInARun:
    async def test_one_that_others_made_first(self, database: Database, driver: str) -> None:
        """The id was taken before the first attempt, or between the two."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            saga_id = uuid4()
            async with scene.storage.run(saga_id) as run:
                await run.create_saga(saga_id, "order", {"mine": True})
                commit = await scene.lose(Cut.BEFORE_SENDING, run.commit())
                await scene.other.create_saga(saga_id, "order", {"mine": False})
                scene.proxy.gate.set()
                with pytest.raises(SagaAlreadyExistsError):
                    await commit
                await run.rollback()
            assert (await scene.other.get_saga(saga_id)).context == {"mine": False}

    async def test_one_that_others_went_on_with(self, database: Database, driver: str) -> None:
        """Another worker has found the new saga and finished it before the creator could ask."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            saga_id = uuid4()
            async with scene.storage.run(saga_id) as run:
                await run.create_saga(saga_id, "order", {})
                commit = await scene.lose(Cut.BEFORE_ANSWER, run.commit())
                await scene.other.update_status(saga_id, SagaStatus.COMPLETED, expected_version=1)
                scene.proxy.gate.set()
                await commit
                assert run.version == 1


class TestNoAnswer:
    async def test_without_a_connection_the_outcome_stays_unknown(self, database: Database, driver: str) -> None:
        """When the time is up the caller is told, and what was executed is there."""
        async with Scene.on(database, driver, retry_for=BRIEFLY) as scene:
            scene.proxy.cut, target, scene.proxy.target = Cut.BEFORE_ANSWER, scene.proxy.target, 1
            with pytest.raises(UnknownOutcomeError) as info:
                await change(scene)
            assert info.value.__cause__ is not None
            scene.proxy.target = target
            assert (await scene.saga()).version == 2

    async def test_with_no_time_to_retry_nothing_is_tried_again(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver, retry_for=NEVER) as scene:
            scene.proxy.cut = Cut.BEFORE_SENDING
            with pytest.raises(UnknownOutcomeError):
                await change(scene)
            assert (await scene.saga()).version == 1

    async def test_a_saga_that_is_not_there_could_yet_be(self, database: Database, driver: str) -> None:
        """Somebody may create it before the first attempt arrives, so a refusal proves nothing."""
        async with Scene.on(database, driver, retry_for=BRIEFLY) as scene:
            scene.proxy.cut = Cut.BEFORE_SENDING
            with pytest.raises(UnknownOutcomeError):
                await scene.storage.update_context(uuid4(), {}, expected_version=1)

    async def test_a_joined_transaction_is_gone(self, database: Database, driver: str) -> None:
        """There nothing is tried again, whether a version is expected or not."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            async with AsyncSession(scene.engine) as session:
                storage = SqlAlchemySagaStorage(session, retry_for=PATIENT)
                with pytest.raises(SagaNotFoundError):
                    await storage.get_saga(uuid4())
                scene.proxy.cut = Cut.BEFORE_ANSWER
                with pytest.raises(StorageUnavailableError, match="the connection was lost"):
                    await storage.update_context(scene.saga_id, {}, expected_version=1)
                await session.rollback()
            assert (await scene.saga()).version == 1

    async def test_a_joined_connection_in_autocommit(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            autocommit = scene.engine.execution_options(isolation_level="AUTOCOMMIT")
            async with autocommit.connect() as connection:
                storage = SqlAlchemySagaStorage(connection, retry_for=PATIENT)
                await storage.log_step(scene.saga_id, "warm", "act", step("").status)
                scene.proxy.cut = Cut.BEFORE_ANSWER
                with pytest.raises(UnknownOutcomeError):
                    await storage.update_context(scene.saga_id, {}, expected_version=1)


class TestTerminatedBackend:
    async def test_one_that_waits_for_a_lock(self, database: Database, driver: str) -> None:
        """The server says that it ends the connection, and the storage writes again over another one."""
        async with Scene.on(database, driver, group_commit=False, retry_for=PATIENT) as scene:
            async with AsyncSession(scene.direct) as holder:
                await SqlAlchemySagaStorage(holder).update_context(scene.saga_id, {"n": 7})
                task = asyncio.ensure_future(change(scene))
                await until_blocked(database)
                with psycopg.connect(database.url(), autocommit=True) as admin:
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND wait_event_type = 'Lock'"
                    )
                await holder.rollback()
            assert await task == 2
            assert await scene.steps() == ["mine"]
