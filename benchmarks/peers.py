"""The rows of others: python-cqrs's own storage, and DBOS."""

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

from cqrs.saga.storage.enums import SagaStatus, SagaStepStatus
from cqrs.saga.storage.sqlalchemy import Base, SqlAlchemySagaStorage
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.engine import run_by_engine
from benchmarks.ours import engine_on
from benchmarks.workload import STEPS, Clock, RunSaga, Words, new_order, receipt, run_by_calls

WORDS = Words(SagaStatus.RUNNING, SagaStatus.COMPLETED, SagaStepStatus.STARTED, SagaStepStatus.COMPLETED)


def create_cqrs_tables(url: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    engine.dispose()


@asynccontextmanager
async def cqrs_storage(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with _cqrs_storage(url, connections) as storage:
        yield partial(run_by_calls, storage, WORDS)


@asynccontextmanager
async def cqrs_engine(url: str, connections: int) -> AsyncIterator[RunSaga]:
    async with _cqrs_storage(url, connections) as storage:
        yield partial(run_by_engine, storage)


@asynccontextmanager
async def _cqrs_storage(url: str, connections: int) -> AsyncIterator[SqlAlchemySagaStorage]:
    async with engine_on(url, connections=connections) as engine:
        yield SqlAlchemySagaStorage(async_sessionmaker(engine, expire_on_commit=False))


@asynccontextmanager
async def dbos_workflow(url: str, connections: int) -> AsyncIterator[RunSaga]:
    dbos = importlib.import_module("dbos").DBOS
    run_saga = _dbos_saga()
    dbos(
        config={
            "name": "saga-store-bench",
            "system_database_url": url,
            "sys_db_pool_size": connections,
            "log_level": "ERROR",
        }
    )
    dbos.launch()
    try:
        yield run_saga
    finally:
        dbos.destroy()


@cache
def _dbos_saga() -> RunSaga:
    """Register the workflow, once; asyncio throughout, and each step has its result recorded."""
    dbos = importlib.import_module("dbos").DBOS
    now = Clock()

    async def act(order: dict[str, Any], step: str) -> dict[str, Any]:
        order["receipts"][step] = receipt(step)
        return order

    async def run_steps(order: dict[str, Any]) -> dict[str, Any]:
        for step in STEPS:
            order = await now.time(recorded_act(order, step))
        return order

    recorded_act = dbos.step(name="bench_step")(act)
    workflow = dbos.workflow(name="bench_order")(run_steps)

    async def run_saga(clock: Clock) -> None:
        nonlocal now
        now = clock
        await workflow(new_order())

    return run_saga
