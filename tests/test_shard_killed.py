"""One of two servers is SIGKILLed under load: what stops, what goes on, and that everything is recovered."""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import SagaRun, SagaStatus, SagaStepStatus, StorageUnavailableError, UnknownOutcomeError, schema
from saga_store.inspection import SagaQuery
from saga_store.recovery import RecoveryWorker
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres import restartable
from tests.databases import Database, Databases

CALLERS = 8
STEPS = [f"step-{number}" for number in range(3)]
MOMENT = timedelta(seconds=0.2)


async def finish(run: SagaRun) -> None:
    """Do the steps that the saga's caller, or an attempt before, hasn't done."""
    done = {entry.step_name for entry in await run.get_step_history(run.saga_id)}
    for step in STEPS:
        if step not in done:
            await run.log_step(run.saga_id, step, "act", SagaStepStatus.COMPLETED)
    await run.update_status(run.saga_id, SagaStatus.COMPLETED)
    await run.commit()


class Load:
    """Callers that begin sagas, and leave them to a worker after the first steps; it remembers whose calls failed."""

    def __init__(self, storage: ShardedSagaStorage) -> None:
        self._storage = storage
        self.begun: list[UUID] = []
        self.failed: set[UUID] = set()
        self.is_over = False

    async def call(self) -> None:
        while not self.is_over:
            saga_id = uuid4()
            self.begun.append(saga_id)
            try:
                await self._storage.create_saga(saga_id, "order", {})
                for step in STEPS[:-1]:
                    await self._storage.log_step(saga_id, step, "act", SagaStepStatus.COMPLETED)
            except (StorageUnavailableError, UnknownOutcomeError):
                self.failed.add(saga_id)


async def completed(storage: ShardedSagaStorage) -> set[UUID]:
    page = await storage.find_sagas(SagaQuery(statuses=[SagaStatus.COMPLETED]), limit=1000)
    return {saga.id for saga in page.sagas}


async def test_sagas_elsewhere_do_not_notice(
    databases: Databases, template: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """None of the other shard fails, claims there go on, and at the end every saga is finished, each step done once."""
    caplog.set_level(logging.CRITICAL, "saga_store")
    with databases.clone(template) as there, restartable() as server:
        url = server.facts.url.replace("postgresql://", "postgresql+psycopg://")
        await asyncio.to_thread(schema.upgrade, url)
        async with AsyncExitStack() as stack:
            engines = [create_async_engine(address) for address in (there.url("psycopg"), url)]
            for engine in engines:
                stack.push_async_callback(engine.dispose)
            storage = ShardedSagaStorage([SqlAlchemySagaStorage(engine, retry_for=MOMENT) for engine in engines])
            await storage.find_sagas()
            load = Load(storage)
            worker = RecoveryWorker(
                storage,
                {"order": finish},
                stale_after=MOMENT,
                lease=10 * MOMENT,
                backoff=MOMENT,
                max_backoff=MOMENT,
                max_attempts=1000,
                poll_every=MOMENT / 4,
                concurrency=20,
            )
            recovering = asyncio.create_task(worker.run())
            callers = [asyncio.create_task(load.call()) for _ in range(CALLERS)]
            await asyncio.sleep(0.5)
            server.kill()
            await asyncio.sleep(1)
            at_first = await completed(storage)
            await asyncio.sleep(1)
            assert (await storage.find_sagas(limit=1)).missing == (1,)
            later = await completed(storage)
            load.is_over = True
            server.start()
            await asyncio.to_thread(server.wait_until_ready)
            await asyncio.gather(*callers)
            deadline = time.monotonic() + 60
            while (figures := await storage.get_figures()).unfinished or figures.missing:
                assert time.monotonic() < deadline, figures
                await asyncio.sleep(0.1)
            worker.stop()
            await recovering

            assert later - at_first
            assert load.failed
            assert {storage.shard_of(saga_id) for saga_id in load.failed} == {1}
            for saga_id in set(load.begun) - load.failed:
                assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED
                steps = [entry.step_name for entry in await storage.get_step_history(saga_id)]
                assert sorted(steps) == STEPS
