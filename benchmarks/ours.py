"""The rows of this package: its storage, in each of the ways to use it."""

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from statistics import median
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from benchmarks.engine import run_by_engine
from benchmarks.workload import NAME, STEPS, Clock, RunSaga, Words, new_order, receipt, run_by_calls
from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.cqrs import CqrsSagaStorage
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage

WORDS = Words(SagaStatus.RUNNING, SagaStatus.COMPLETED, SagaStepStatus.STARTED, SagaStepStatus.COMPLETED)

TENANT = ContextVar("TENANT", default="acme")


@asynccontextmanager
async def engine_on(url: str, *, connections: int, driver: str = "asyncpg") -> AsyncIterator[AsyncEngine]:
    address = make_url(url).set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(address, pool_size=connections, max_overflow=0)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def methods(
    url: str, connections: int, *, driver: str = "asyncpg", group_commit: bool = True
) -> AsyncIterator[RunSaga]:
    async with engine_on(url, connections=connections, driver=driver) as engine:
        yield partial(run_by_calls, SqlAlchemySagaStorage(engine, group_commit=group_commit), WORDS)


@asynccontextmanager
async def routed(url: str, connections: int) -> AsyncIterator[RunSaga]:
    """A sessionmaker whose sessions choose the engine by the tenant whose context it is."""
    async with engine_on(url, connections=connections) as engine:
        engines = {TENANT.get(): engine.sync_engine}

        class Routed(Session):
            def get_bind(self, *_: Any, **__: Any) -> Engine:  # noqa: ANN401 - whatever SQLAlchemy hands over
                return engines[TENANT.get()]

        maker = async_sessionmaker(sync_session_class=Routed)
        yield partial(run_by_calls, SqlAlchemySagaStorage(maker), WORDS)


@asynccontextmanager
async def translated(url: str, connections: int) -> AsyncIterator[RunSaga]:
    """An engine whose statements are for a schema that it names."""
    async with engine_on(url, connections=connections) as engine:
        named = engine.execution_options(schema_translate_map={None: "public"})
        yield partial(run_by_calls, SqlAlchemySagaStorage(named), WORDS)


@asynccontextmanager
async def grouped(url: str, connections: int) -> AsyncIterator[RunSaga]:
    """An engine, and statements that callers of one tenant share."""
    async with engine_on(url, connections=connections) as engine:
        yield partial(run_by_calls, SqlAlchemySagaStorage(engine, group_by=TENANT.get), WORDS)


@asynccontextmanager
async def sharded(url: str, connections: int) -> AsyncIterator[RunSaga]:
    """A storage that is made of shards, of which there is one."""
    async with engine_on(url, connections=connections) as engine:
        yield partial(run_by_calls, ShardedSagaStorage([SqlAlchemySagaStorage(engine)]), WORDS)


@asynccontextmanager
async def checkpoints(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with engine_on(url, connections=connections) as engine:
        yield partial(run_by_checkpoints, SqlAlchemySagaStorage(engine))


@asynccontextmanager
async def runs(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with engine_on(url, connections=connections) as engine:
        yield partial(run_by_runs, SqlAlchemySagaStorage(engine))


@asynccontextmanager
async def cqrs_engine(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with engine_on(url, connections=connections) as engine:
        yield partial(run_by_engine, CqrsSagaStorage(SqlAlchemySagaStorage(engine)))


async def run_by_checkpoints(storage: SagaStorage, clock: Clock) -> None:
    """Run a saga in 6 checkpoints: create, RUNNING, one for each step, COMPLETED."""
    saga_id, order = uuid4(), new_order()
    await clock.time(storage.save(Checkpoint(saga_id, name=NAME, context=order)))
    await clock.time(storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING)))
    for step in STEPS:
        order["receipts"][step] = receipt(step)
        log = (LogStep(step, "act", SagaStepStatus.STARTED), LogStep(step, "act", SagaStepStatus.COMPLETED))
        await clock.time(storage.save(Checkpoint(saga_id, context=order, steps=log)))
    await clock.time(storage.save(Checkpoint(saga_id, status=SagaStatus.COMPLETED)))


async def run_by_runs(storage: SagaStorage, clock: Clock) -> None:
    """Run a saga in the 12 calls, of which a run makes the same 6 checkpoints."""
    saga_id, order = uuid4(), new_order()
    async with storage.run(saga_id) as run:
        await run.create_saga(saga_id, NAME, order)
        await clock.time(run.commit())
        await run.update_status(saga_id, SagaStatus.RUNNING)
        await clock.time(run.commit())
        for step in STEPS:
            await run.log_step(saga_id, step, "act", SagaStepStatus.STARTED)
            order["receipts"][step] = receipt(step)
            await run.update_context(saga_id, order)
            await run.log_step(saga_id, step, "act", SagaStepStatus.COMPLETED)
            await clock.time(run.commit())
        await run.update_status(saga_id, SagaStatus.COMPLETED)
        await clock.time(run.commit())


async def time_lonely_calls(url: str, *, pairs: int) -> tuple[float, float]:
    """Return the median seconds of a lonely call with group commit and without, called in turn on one connection."""
    with_group, without = Clock(), Clock()
    async with engine_on(url, connections=1) as engine:
        sides = [
            (SqlAlchemySagaStorage(engine), await _new_saga(engine), with_group),
            (SqlAlchemySagaStorage(engine, group_commit=False), await _new_saga(engine), without),
        ]
        for _ in range(pairs):
            random.shuffle(sides)
            for storage, saga_id, clock in sides:
                await clock.time(storage.update_context(saga_id, new_order()))
    return median(with_group.calls), median(without.calls)


async def _new_saga(engine: AsyncEngine) -> UUID:
    saga_id = uuid4()
    await SqlAlchemySagaStorage(engine).create_saga(saga_id, NAME, new_order())
    return saga_id


async def create_running(url: str, sagas: int) -> list[UUID]:
    async with engine_on(url, connections=1) as engine:
        storage = SqlAlchemySagaStorage(engine)
        ids = [uuid4() for _ in range(sagas)]
        for saga_id in ids:
            await storage.save(Checkpoint(saga_id, name=NAME, status=SagaStatus.RUNNING, context=new_order()))
    return ids


def update_contexts(storage: SagaStorage, ids: list[UUID]) -> RunSaga:
    """Return what updates the context of one saga of these; each call takes the next one."""
    turn = iter(range(2**62))

    async def update(clock: Clock) -> None:
        order = new_order() | {"seen_at": time.time()}
        await clock.time(storage.update_context(ids[next(turn) % len(ids)], order))

    return update
