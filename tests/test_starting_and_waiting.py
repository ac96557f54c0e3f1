"""What the kit doesn't ask of sagas that are begun once and waited for: what it costs, and what is left behind.

Who begins a saga, and when:

=====================================================  =========================================================
what happens                                           what the caller gets
=====================================================  =========================================================
it isn't there                                         created, in one statement
it is there                                            what it has come to, by a second statement
another transaction is creating it                     whichever it is once that has ended
the answer to the creation got lost                    created: the row remembers whose write it was
the same, and others have written since                created: the row remembers the last few
it was archived                                        InvalidSagaDataError,
    SagaArchivedError, which names the archive
it was a stub, and is forgotten meanwhile              created
it is there, and reads lead where it isn't yet         SagaAlreadyExistsError
=====================================================  =========================================================

Who waits, and when: see ``TestWaiting``.
"""
# ruff: noqa: SLF001 - what is left behind is seen from inside only

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from saga_store import (
    InvalidSagaDataError,
    MemoryDatabase,
    MemorySagaStorage,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaExecution,
    SagaNotFoundError,
    SagaStatus,
    StorageUnavailableError,
)
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing.retention import RetentiveStorage, let_go
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import PATIENT, Scene, until
from tests.telemetries import Recording

LONG = timedelta(hours=1)
NOBODYS_PORT = 1


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(driver: str, make_engine: Callable[[str], AsyncEngine]) -> AsyncEngine:
    return make_engine(driver)


class ForgetsMeanwhile(MemorySagaStorage):
    """Whatever it is about to read is deleted just before, so many times."""

    times = 1

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        if self.times:
            self.times -= 1
            del self._view()._database._rows[saga_id]
        return await super()._fetch_saga(saga_id)


class ReadsElsewhere(MemorySagaStorage):
    """Reads where nothing has arrived yet."""

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        raise SagaNotFoundError(saga_id)


class TestStarting:
    async def test_a_new_saga_takes_one_round_trip(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver) as scene:
            for _ in range(8):
                await scene.storage.get_or_create_saga(uuid4(), "order", {})
            before = scene.proxy.round_trips
            assert (await scene.storage.get_or_create_saga(uuid4(), "order", {})).created
            assert scene.proxy.round_trips == before + 1

    @pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER], ids=lambda cut: cut.name)
    async def test_a_lost_answer_is_found_out(self, database: Database, driver: str, cut: Cut) -> None:
        """Its caller is told that it has created the saga, and is the only one who is told so."""
        saga_id = uuid4()
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            scene.proxy.cut = cut
            start = await scene.storage.get_or_create_saga(saga_id, "order", {"n": 1})
            assert scene.proxy.cut is None
            again = await scene.other.get_or_create_saga(saga_id, "order", {"n": 2})
        assert (start.created, again.created) == (True, False)
        assert start.context == again.context == {"n": 1}

    async def test_who_waits_for_another_transaction(self, engine: AsyncEngine) -> None:
        """It is told of the saga that this commits, and creates it if that is rolled back."""
        storage = SqlAlchemySagaStorage(engine)
        starts = []
        for commits in (True, False):
            saga_id = uuid4()
            async with AsyncSession(engine) as session:
                await SqlAlchemySagaStorage(session).create_saga(saga_id, "order", {"theirs": True})
                waiting = asyncio.create_task(storage.get_or_create_saga(saga_id, "order", {"theirs": False}))
                await asyncio.wait([waiting], timeout=0.05)
                assert not waiting.done()
                await (session.commit() if commits else session.rollback())
            starts.append(await waiting)
        assert [(start.created, start.context) for start in starts] == [
            (False, {"theirs": True}),
            (True, {"theirs": False}),
        ]

    async def test_in_a_session_it_commits_with_the_business_rows(self, engine: AsyncEngine) -> None:
        saga_id = uuid4()
        async with AsyncSession(engine) as session:
            assert (await SqlAlchemySagaStorage(session).get_or_create_saga(saga_id, "order", {})).created
            await session.rollback()
        with pytest.raises(SagaNotFoundError):
            await SqlAlchemySagaStorage(engine).get_saga(saga_id)

    async def test_an_archived_saga_isnt_begun_again(self, engine: AsyncEngine) -> None:
        """Neither over its stub nor under its name: the error says where it is."""
        for storage in (MemorySagaStorage(), SqlAlchemySagaStorage(engine)):
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
            await let_go(cast("RetentiveStorage", storage), saga_id)
            for name in ("order", "refund"):
                with pytest.raises(SagaArchivedError):
                    await storage.get_or_create_saga(saga_id, name, {})
            with pytest.raises(SagaArchivedError):
                await storage.wait_for_saga(saga_id, LONG)

    async def test_what_is_forgotten_meanwhile_is_created(self) -> None:
        saga_id, storage = uuid4(), ForgetsMeanwhile()
        await storage.create_saga(saga_id, "order", {"n": 1})
        start = await storage.get_or_create_saga(saga_id, "order", {"n": 2})
        assert (start.created, start.context) == (True, {"n": 2})

    async def test_what_is_there_and_cant_be_read_is_told(self) -> None:
        """As where reads lead to a replica that is behind: it doesn't go on asking for ever."""
        saga_id, storage = uuid4(), ReadsElsewhere()
        await storage.create_saga(saga_id, "order", {})
        with pytest.raises(SagaAlreadyExistsError) as refused:
            await storage.get_or_create_saga(saga_id, "order", {})
        assert refused.value.name is None


async def begin_to_wait(storage: SagaStorage, saga_ids: Sequence[UUID]) -> "list[asyncio.Task[SagaExecution]]":
    """Wait for these in tasks each of which has looked once, and looks with the others now."""
    waiting = [asyncio.create_task(storage.wait_for_saga(saga_id, LONG)) for saga_id in saga_ids]
    await until(lambda: looked_for(storage) >= set(saga_ids))
    return waiting


def looked_for(storage: SagaStorage) -> set[UUID]:
    if isinstance(storage, ShardedSagaStorage):
        return set().union(*map(looked_for, storage.shards))
    crowds = storage._waiting._crowds.values() if storage._waiting else []
    return {saga_id for crowd in crowds for saga_id in crowd._told}


async def new_sagas(storage: SagaStorage, count: int) -> list[UUID]:
    saga_ids = [uuid4() for _ in range(count)]
    for saga_id in saga_ids:
        await storage.create_saga(saga_id, "order", {})
    return saga_ids


class TestWaiting:
    async def test_one_statement_for_all(self, engine: AsyncEngine) -> None:
        """All who wait are looked for together: what a look costs depends on nobody's number."""
        recording = Recording()
        storage = SqlAlchemySagaStorage(engine, telemetry=recording)
        saga_ids = await new_sagas(storage, 20)
        waiting = await begin_to_wait(storage, saga_ids)
        reads = recording.operations.count("get_saga")
        await until(lambda: recording.operations.count("wait_for_saga") >= 3)
        assert recording.operations.count("get_saga") == reads
        for saga_id in saga_ids:
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
        assert [saga.id for saga in await asyncio.gather(*waiting)] == saga_ids

    async def test_nothing_is_held_between_two_looks(
        self, driver: str, make_engine: Callable[..., AsyncEngine]
    ) -> None:
        """A pool of one connection serves those who wait, and those who write meanwhile."""
        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=30)
        assert isinstance(engine.pool, AsyncAdaptedQueuePool)
        storage = SqlAlchemySagaStorage(engine)
        saga_ids = await new_sagas(storage, 5)
        waiting = await begin_to_wait(storage, saga_ids)
        await until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined] # see above
        for saga_id in saga_ids:
            await storage.update_status(saga_id, SagaStatus.FAILED)
        assert {saga.status for saga in await asyncio.gather(*waiting)} == {SagaStatus.FAILED}

    async def test_nothing_is_left_behind(self, engine: AsyncEngine) -> None:
        """Whether it was cancelled, came to an end or had no more time: no task, no timer."""
        storage = SqlAlchemySagaStorage(engine)
        saga_ids = await new_sagas(storage, 3)
        cancelled, ended, _ = waiting = await begin_to_wait(storage, saga_ids)
        cancelled.cancel()
        await storage.update_status(saga_ids[1], SagaStatus.COMPLETED)
        await ended
        waiting[2].cancel()
        await asyncio.wait(waiting)
        assert storage._waiting is not None
        assert storage._waiting._crowds == {}
        await until(lambda: len(asyncio.all_tasks()) == 1)

    async def test_a_failure_is_told_to_each(self, database: Database, driver: str) -> None:
        """Each gets an error of its own, whose cause is the driver's."""
        async with Scene.on(database, driver, retry_for=timedelta(seconds=0.1)) as scene:
            saga_ids = await new_sagas(scene.other, 3)
            waiting = await begin_to_wait(scene.storage, saga_ids)
            scene.proxy.target = NOBODYS_PORT
            scene.proxy.sever()
            await asyncio.wait(waiting)
            errors = [task.exception() for task in waiting]
        assert [type(error) for error in errors] == [StorageUnavailableError] * 3
        assert len(set(map(id, errors))) == 3
        assert all(error is not None and error.__cause__ is not None for error in errors)

    async def test_it_goes_on_after_a_restart(self, database: Database, driver: str) -> None:
        """Connections that have died meanwhile are replaced, as for any read."""
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            [waiting] = await begin_to_wait(scene.storage, [scene.saga_id])
            scene.proxy.sever()
            await scene.other.update_status(scene.saga_id, SagaStatus.COMPLETED)
            assert (await waiting).status is SagaStatus.COMPLETED

    @pytest.mark.parametrize("by", ["whoever cancels its task", "the driver"])
    async def test_a_look_that_is_cancelled_isnt_the_last(self, by: str) -> None:
        """Those who wait for it learn of the end from the next."""
        looks = 0

        class CancelledOnce(MemorySagaStorage):
            async def _fetch_unfinished(self, saga_ids: Sequence[UUID]) -> Collection[UUID]:
                nonlocal looks
                looks += 1
                if looks == 1:
                    if by == "the driver":
                        raise asyncio.CancelledError
                    [task] = {crowd._task for crowd in self._waiting._crowds.values()} if self._waiting else {None}
                    assert task is not None
                    task.cancel()
                    await asyncio.sleep(LONG.total_seconds())
                return await super()._fetch_unfinished(saga_ids)

        storage = CancelledOnce()
        [saga_id] = await new_sagas(storage, 1)
        [waiting] = await begin_to_wait(storage, [saga_id])
        await until(lambda: looks > 0)
        await storage.update_status(saga_id, SagaStatus.COMPLETED)
        async with asyncio.timeout(10):
            assert (await waiting).status is SagaStatus.COMPLETED
        assert looks == 2

    def test_one_loop_after_the_other(self) -> None:
        """A storage whose loop was closed while somebody waited serves the next."""

        async def wait_in_vain(storage: MemorySagaStorage) -> UUID:
            [saga_id] = await new_sagas(storage, 1)
            await begin_to_wait(storage, [saga_id])
            return saga_id

        async def wait(storage: MemorySagaStorage, saga_id: UUID) -> SagaExecution:
            [waiting] = await begin_to_wait(storage, [saga_id])
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
            return await waiting

        storage = MemorySagaStorage()
        saga_id = asyncio.run(wait_in_vain(storage))
        assert asyncio.run(wait(storage, saga_id)).status is SagaStatus.COMPLETED

    async def test_each_looks_where_its_caller_would(
        self, driver: str, make_engine: Callable[..., AsyncEngine]
    ) -> None:
        """Callers that a sessionmaker leads to different engines aren't looked for together."""
        engines = [make_engine(driver), make_engine(driver)]
        place = ContextVar("place", default=0)

        class Routed(Session):
            def get_bind(self, *_: Any, **__: Any) -> Engine:  # noqa: ANN401 - whatever SQLAlchemy asks by
                return engines[place.get()].sync_engine

        taken = [0, 0]
        for number, engine in enumerate(engines):

            def count(*_: object, number: int = number) -> None:
                taken[number] += 1

            event.listen(engine.sync_engine, "checkout", count)
        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        saga_ids = await new_sagas(storage, 2)
        before = list(taken)
        waiting = []
        for number, saga_id in enumerate(saga_ids):
            place.set(number)
            waiting += await begin_to_wait(storage, [saga_id])
        place.set(0)
        await until(lambda: min(now - then for now, then in zip(taken, before, strict=True)) >= 4)
        for saga_id in saga_ids:
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
        await asyncio.gather(*waiting)

    async def test_each_key_is_looked_for_in_a_context_of_its_own(self, engine: AsyncEngine) -> None:
        """With group_by an event of the pool sees the tenant of those for whom it looks."""
        tenant = ContextVar("tenant", default="")
        seen = set()
        event.listen(engine.sync_engine, "checkout", lambda *_: seen.add(tenant.get()))
        storage = SqlAlchemySagaStorage(engine, group_by=tenant.get)
        saga_ids = await new_sagas(storage, 2)
        waiting = []
        for name, saga_id in zip(("blue", "green"), saga_ids, strict=True):
            tenant.set(name)
            waiting += await begin_to_wait(storage, [saga_id])
        tenant.set("")
        seen.clear()
        await until(lambda: seen >= {"blue", "green"})
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    async def test_each_shard_is_asked_for_its_own(self) -> None:
        """Over shards all who wait for sagas of one shard are looked for together, and there only."""
        asked: list[set[UUID]] = []

        class Asked(MemorySagaStorage):
            async def _fetch_unfinished(self, saga_ids: Sequence[UUID]) -> Collection[UUID]:
                asked.append(set(saga_ids))
                return await super()._fetch_unfinished(saga_ids)

        storage = ShardedSagaStorage([Asked(MemoryDatabase()) for _ in range(3)])
        saga_ids = await new_sagas(storage, 30)
        waiting = await begin_to_wait(storage, saga_ids)
        asked.clear()
        await until(lambda: len(asked) > 9)
        shards = [{saga_id for saga_id in saga_ids if storage.shard_of(saga_id) == number} for number in range(3)]
        assert all(ids in shards for ids in asked)
        for saga_id in saga_ids:
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
        assert [saga.id for saga in await asyncio.gather(*waiting)] == saga_ids

    async def test_a_sessionmaker_on_a_connection(self, engine: AsyncEngine) -> None:
        """It joins that connection's transaction, which would be open for as long as the wait."""
        async with engine.connect() as connection:
            storage = SqlAlchemySagaStorage(async_sessionmaker(connection))
            [saga_id] = await new_sagas(storage, 1)
            with pytest.raises(InvalidSagaDataError, match="commits its own calls") as refused:
                await storage.wait_for_saga(saga_id, timedelta(seconds=30))
            assert refused.value.field == "bind"
