"""Uses the whole public face; test_facade.py lets mypy --strict reveal its types."""

from datetime import timedelta
from typing import reveal_type
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncSession

from saga_store import (
    Checkpoint,
    IRunStorage,
    ISagaStorage,
    LogStep,
    MemorySagaStorage,
    SagaExecution,
    SagaStatus,
    SagaStepStatus,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage


async def use(storage: ISagaStorage) -> None:
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {"items": [1, 2]})
    await storage.update_context(saga_id, {})
    await storage.update_status(saga_id, SagaStatus.RUNNING)
    await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)


async def run(storage: IRunStorage) -> None:
    saga_id = uuid4()
    reveal_type(await storage.get_or_create_saga(saga_id, "order", {}))
    async with storage.run(saga_id, owner="w", lease=timedelta(minutes=1)) as one:
        await one.update_status(saga_id, SagaStatus.COMPLETED)
        await one.commit()
        reveal_type(one.version)
    reveal_type(await storage.wait_for_saga(saga_id, timedelta(seconds=1)))


async def use_checkpoints(storage: MemorySagaStorage, session: AsyncSession) -> SagaExecution:
    saga_id = uuid4()
    steps = [LogStep("pay", "act", SagaStepStatus.COMPLETED)]
    reveal_type(await storage.save(Checkpoint(saga_id, name="order", context={}, steps=steps)))
    reveal_type(await storage.load_saga_state(saga_id))
    reveal_type(await storage.get_step_history(saga_id))
    saga = await storage.get_saga(saga_id)
    reveal_type(saga)
    reveal_type(await storage.find_stale_sagas(stale_after=timedelta(minutes=5)))
    claimed = await storage.claim_sagas(owner="w", lease=timedelta(1), limit=1, stale_after=timedelta(1))
    reveal_type(claimed)
    reveal_type(await storage.get_in_doubt_steps(saga_id))
    reveal_type(SqlAlchemySagaStorage(session).session)
    reveal_type([entry async for entry in storage.iter_step_history(saga_id, batch_size=10)])
    [entry] = await storage.get_step_history(saga_id)
    reveal_type(entry.action)
    return saga
