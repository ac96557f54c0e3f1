"""Writes whose first attempt comes late, or never; the interleavings are in test_ambiguous.py."""

import asyncio
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga_store import (
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.execution import News, Retries
from saga_store.sqlalchemy.write_sql import KEPT, KEPT_OF_ONE_VERSION
from tests.connections import lock_table, until_blocked
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import BRIEFLY, NEVER, PATIENT, Scene, Write, change, log, step


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
        """While another transaction holds the table, both attempts wait there."""
        async with Scene.on(database, driver, group_commit=group_commit, retry_for=PATIENT) as scene:
            another = replace(scene, saga_id=uuid4())
            await scene.other.create_saga(another.saga_id, "order", {})
            await write(another)  # what is to be lost is executed, not prepared first
            async with AsyncSession(scene.direct) as holder:
                await lock_table(holder)
                await SqlAlchemySagaStorage(holder).update_context(scene.saga_id, {"n": 7})
                task = await scene.lose(Cut.AT_ONCE, write(scene))
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
            assert info.value.__notes__ == ["nothing could be found out within retry_for, which is 0.2 s"]
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
                await lock_table(holder)
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


class TestNews:
    async def test_a_statement_that_gets_through_ends_the_pause(self) -> None:
        """Whoever waits for the server goes on when it has answered somebody else of the same storage."""
        news, retries = News(), Retries(3600, 3600)
        async with asyncio.timeout(60):
            for _ in range(20):  # the pauses, which double each time, would last for hours
                pause = asyncio.create_task(retries.pause(until=news))
                while not pause.done():
                    await asyncio.sleep(0)
                    news.tell()
                assert await pause
