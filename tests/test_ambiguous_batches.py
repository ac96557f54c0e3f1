"""A statement of group commit whose answer got lost: each of its writes gets its own outcome."""

import asyncio
import os
import random
from collections.abc import Awaitable
from datetime import timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga_store import (
    Checkpoint,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import PATIENT, Scene, step, until

CUTS = int(os.environ.get("SAGA_STORE_TEST_CUTS", "10"))
LOST = pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER], ids=lambda cut: cut.name)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def sagas(scene: Scene, count: int) -> list[UUID]:
    ids = [uuid4() for _ in range(count)]
    for saga_id in ids:
        await scene.other.create_saga(saga_id, "order", {})
    return ids


async def lose_batch(scene: Scene, cut: Cut, *writes: Awaitable[object]) -> list[asyncio.Task[object]]:
    """Have the writes share a statement, after one that was alone, and have its answer lost; the gate is closed."""
    alone = scene.storage.log_step(scene.saga_id, "alone", "act", SagaStepStatus.STARTED)
    tasks = [asyncio.ensure_future(write) for write in (alone, *writes)]
    await scene.lose(cut, tasks[0], let_pass=1)
    return tasks[1:]


class TestMixedBatch:
    @LOST
    async def test_each_write_gets_its_own_outcome(self, database: Database, driver: str, cut: Cut) -> None:
        """Those with a version the true one, those without none; nothing is written twice."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            changed, logged, stale, plain, apart, created = *await sagas(scene, 5), uuid4()
            await scene.other.update_status(stale, SagaStatus.RUNNING)
            save = scene.storage.save
            tasks = await lose_batch(
                scene,
                cut,
                save(Checkpoint(changed, context={"n": 1}, steps=[step("a"), step("b")], expected_version=1)),
                save(Checkpoint(logged, steps=[step("a")], expected_version=1)),
                save(Checkpoint(stale, steps=[step("a")], expected_version=1)),
                save(Checkpoint(plain, steps=[step("a")])),
                scene.storage.create_saga(created, "order", {}),
                save(Checkpoint(apart, steps=[step("a"), step("b")])),
            )
            scene.proxy.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)

            assert outcomes[:2] == [2, 1]
            assert isinstance(outcomes[2], SagaConcurrencyError)
            assert outcomes[5] == 1  # it goes in the next statement, of which nothing was lost
            for saga_id, outcome in zip((plain, created), outcomes[3:5], strict=True):
                assert isinstance(outcome, UnknownOutcomeError)
                assert outcome.saga_id == saga_id
                assert outcome.__cause__ is not None
            history = scene.other.get_step_history
            assert [entry.step_name for entry in await history(changed)] == ["a", "b"]
            assert [entry.step_name for entry in await history(logged)] == ["a"]
            assert await history(stale) == []
            assert [entry.step_name for entry in await history(apart)] == ["a", "b"]
            assert len(await history(plain)) == (cut is Cut.BEFORE_ANSWER)

    async def test_what_has_no_version_is_not_written_again(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            [versioned] = await sagas(scene, 1)
            created = uuid4()
            tasks = await lose_batch(
                scene,
                Cut.BEFORE_SENDING,
                scene.storage.update_context(versioned, {"n": 1}, expected_version=1),
                scene.storage.create_saga(created, "order", {}),
            )
            scene.proxy.gate.set()
            assert await tasks[0] is None
            with pytest.raises(UnknownOutcomeError):
                await tasks[1]
            with pytest.raises(SagaNotFoundError):
                await scene.other.get_saga(created)


class TestOrder:
    @LOST
    async def test_the_next_write_of_a_saga_waits(self, database: Database, driver: str, cut: Cut) -> None:
        """It doesn't overtake the one whose outcome is being found out."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            [saga_id] = await sagas(scene, 1)
            save = scene.storage.save
            tasks = await lose_batch(
                scene,
                cut,
                save(Checkpoint(saga_id, status=SagaStatus.RUNNING, steps=[step("1")], expected_version=1)),
                save(Checkpoint(saga_id, steps=[step("2")])),
                save(Checkpoint(saga_id, status=SagaStatus.COMPLETED, steps=[step("3")], expected_version=2)),
            )
            scene.proxy.gate.set()
            assert await asyncio.gather(*tasks) == [2, 2, 3]
            assert [entry.step_name for entry in await scene.other.get_step_history(saga_id)] == ["1", "2", "3"]


class TestCancelledCaller:
    @LOST
    async def test_the_others_get_their_outcomes(self, database: Database, driver: str, cut: Cut) -> None:
        """The cancelled one's write goes on with the batch, and is there once."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            ids = await sagas(scene, 3)
            writes = [scene.storage.save(Checkpoint(saga_id, steps=[step("a")], expected_version=1)) for saga_id in ids]
            tasks = await lose_batch(scene, cut, *writes)
            tasks[0].cancel()
            scene.proxy.gate.set()
            assert await asyncio.gather(*tasks[1:]) == [1, 1]
            assert tasks[0].cancelled()
            for saga_id in ids:
                assert len(await scene.other.get_step_history(saga_id)) == 1

    async def test_one_who_is_alone(self, database: Database, driver: str) -> None:
        """Nothing is tried any more."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            task = await scene.lose(
                Cut.BEFORE_SENDING, scene.storage.update_context(scene.saga_id, {}, expected_version=1)
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await scene.saga()).version == 1


class TestTroubleOnTheWay:
    async def test_a_row_that_is_locked_is_asked_for_until_it_is_free(self, database: Database, driver: str) -> None:
        """Somebody has locked one row of the batch when it is written again."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            locked, free = await sagas(scene, 2)
            tasks = await lose_batch(
                scene,
                Cut.BEFORE_SENDING,
                scene.storage.update_context(locked, {"n": 1}, expected_version=1),
                scene.storage.update_context(free, {"n": 1}, expected_version=1),
            )
            async with AsyncSession(scene.direct) as holder:
                await SqlAlchemySagaStorage(holder).update_context(locked, {"n": 7})
                scene.proxy.gate.set()
                async with asyncio.timeout(60):
                    while (await scene.other.get_saga(free)).version == 1:
                        pass
                assert not tasks[0].done()
                await holder.rollback()
            await asyncio.gather(*tasks)
            assert (await scene.other.get_saga(locked)).context == {"n": 1}

    async def test_one_that_the_database_refuses_fails_no_other(self, database: Database, driver: str) -> None:
        """What the server made of it the first time is unknown; the others are written all the same."""
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute("ALTER TABLE saga_executions ADD CHECK (context::text <> '{\"bad\":1}')")
        async with Scene.on(database, driver, retry_for=timedelta(seconds=0.2)) as scene:
            ids = await sagas(scene, 5)
            writes = [
                scene.storage.update_context(saga_id, {"bad": int(saga_id == ids[3])}, expected_version=1)
                for saga_id in ids
            ]
            tasks = await lose_batch(scene, Cut.BEFORE_SENDING, *writes)
            scene.proxy.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(outcomes.pop(3), UnknownOutcomeError)
            assert outcomes == [None] * 4
            assert [(await scene.other.get_saga(saga_id)).version for saga_id in ids] == [2, 2, 2, 1, 2]


class TestManyCuts:
    async def test_every_caller_gets_a_definite_answer_and_the_table_agrees(
        self, database: Database, driver: str
    ) -> None:
        """Connections are cut in every way, again and again, under writers who compete for sagas.

        SAGA_STORE_TEST_CUTS says how often for each driver (10).
        """
        refused: set[str] = set()
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            ids = await sagas(scene, 3)
            written: dict[UUID, list[str]] = {saga_id: [] for saga_id in ids}
            changes = dict.fromkeys(ids, 0)
            done = asyncio.Event()
            chance = random.Random(CUTS)  # noqa: S311 - not a secret

            async def writer(name: str) -> None:
                number = 0
                while not done.is_set():
                    saga_id, number = chance.choice(ids), number + 1
                    version = (await scene.other.get_saga(saga_id)).version
                    is_change = chance.random() < 0.5
                    entry = f"{name}-{number}"
                    context = {"by": entry} if is_change else None
                    checkpoint = Checkpoint(saga_id, context=context, steps=[step(entry)], expected_version=version)
                    try:
                        assert await scene.storage.save(checkpoint) == version + is_change
                    except SagaConcurrencyError:
                        refused.add(entry)
                    else:
                        written[saga_id].append(entry)
                        changes[saga_id] += is_change

            async def cutter() -> None:
                for number in range(CUTS):
                    scene.proxy.cut = [Cut.BEFORE_ANSWER, Cut.BEFORE_SENDING, Cut.STRANDED, Cut.AT_ONCE][number % 4]
                    await until(lambda: scene.proxy.cut is None)
                    if number % 8 == 7:
                        await scene.proxy.deliver()
                done.set()

            await asyncio.gather(cutter(), *(writer(name) for name in "abcdef"))
            await scene.proxy.deliver()

            for saga_id in ids:
                history = [entry.step_name for entry in await scene.other.get_step_history(saga_id)]
                assert sorted(history) == sorted(written[saga_id])
                assert not refused & set(history)
                assert (await scene.other.get_saga(saga_id)).version == 1 + changes[saga_id]
