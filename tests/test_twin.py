"""The twin is honest: whatever is done to it and to PostgreSQL, both answer the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from saga_store import (
    Checkpoint,
    ICheckpointStorage,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing import Transaction
from tests.databases import Database, Databases

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)

Step: TypeAlias = Checkpoint | str
"""What is done: a checkpoint of saga 0 or 1 (its id comes later), or what the word says."""

sagas = st.sampled_from([UUID(int=0), UUID(int=1)])
names = st.sampled_from(["order", "refund"])
statuses = st.none() | st.sampled_from(SagaStatus)
contexts = st.sampled_from([None, {}, {"a": 1}, {"a": 1.0}])
versions = st.sampled_from([None, None, 1, 2, 3, 4])
step = st.builds(
    LogStep,
    st.sampled_from(["reserve", "pay", "ship"]),
    st.sampled_from(["act", "compensate"]),
    st.sampled_from(SagaStepStatus),
    st.sampled_from([None, "", "declined"]),
)
steps = st.lists(step, max_size=3)
# Creations, changes, mere entries, and whatever a checkpoint can say, most of which is refused.
checkpoints = (
    st.builds(Checkpoint, sagas, name=names, status=statuses, context=contexts, steps=steps)
    | st.builds(Checkpoint, sagas, status=statuses, context=contexts, steps=steps, expected_version=versions)
    | st.builds(Checkpoint, sagas, steps=st.lists(step, min_size=1, max_size=3), expected_version=versions)
    | st.builds(
        Checkpoint,
        sagas,
        name=st.none() | names | st.just(""),
        status=statuses,
        context=contexts | st.just({"a": float("nan")}),
        steps=steps,
        recovery_attempts=st.none() | st.integers(-1, 6),
        expected_version=st.none() | st.integers(0, 4),
    )
)
stories = st.lists(checkpoints | st.sampled_from(["read", "list", "commit", "rollback"]), min_size=10, max_size=25)


@pytest.fixture(scope="module")
def database(databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        yield database


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("connect", [AsyncSession, AsyncEngine.connect], ids=["session", "connection"])
@given(stories)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_both_answer_the_same(
    make_engine: Callable[[str], AsyncEngine],
    connect: Callable[[AsyncEngine], AsyncSession | AsyncConnection],
    driver: str,
    story: Sequence[Step],
) -> None:
    """Any story of checkpoints, good or bad, of reads, commits and rollbacks goes the same way on both."""
    ids = [uuid4(), uuid4()]
    engine = make_engine(driver)
    async with connect(engine) as bind, MemorySession(MemoryDatabase()) as session:
        real = [await answer(SqlAlchemySagaStorage(bind), bind, step, ids) for step in story]
        twins = [await answer(MemorySagaStorage(session), session, step, ids) for step in story]
        for saga_id in ids:
            real.append(await read(SqlAlchemySagaStorage(bind), saga_id))
            twins.append(await read(MemorySagaStorage(session), saga_id))
        await bind.rollback()
    await engine.dispose()
    assert repr(real) == repr(twins)


async def answer(storage: ICheckpointStorage, tx: Transaction, step: Step, ids: Sequence[UUID]) -> object:
    """Do one step, and return what came of it, without ids and times that each database gives out by itself."""
    try:
        match step:
            case Checkpoint():
                name = step.name and f"{step.name}-{ids[0]}"
                return await storage.save(replace(step, saga_id=ids[step.saga_id.int], name=name))
            case "read":
                return [await read(storage, saga_id) for saga_id in ids]
            case "list":
                listed = await storage.find_stale_sagas(stale_after=timedelta(0), name=f"order-{ids[0]}")
                return sorted(saga.id for saga in listed)
            case "commit":
                return await tx.commit()
            case _:
                return await tx.rollback()
    except SagaStoreError as error:
        return type(error), error.args


async def read(storage: ICheckpointStorage, saga_id: UUID) -> object:
    try:
        saga = await storage.get_saga(saga_id)
        history = await storage.get_step_history(saga_id)
    except SagaStoreError as error:
        return type(error), error.args
    return (
        replace(saga, created_at=LONG_AGO, updated_at=LONG_AGO),
        [replace(entry, id=0, created_at=LONG_AGO) for entry in history],
    )
