"""What a saga goes through, on any storage that commits by itself: all that an application would ask of one."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from saga_store import (
    Checkpoint,
    LogStep,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SagaStorage,
)

NOW = timedelta()
MINUTE = timedelta(minutes=1)
STARTED = LogStep("pay", "act", SagaStepStatus.STARTED, "café")


def context(number: int) -> dict[str, Any]:
    return {"n": number, "half": number + 0.5, "text": "né à 7 €, \\ \" ' 水", "none": None, "list": [True, {}]}


async def live_through(storage: SagaStorage) -> None:
    """Go through creation, checkpoints, refusals, a crowd, claims, a leased run and the lists."""
    await _alone(storage)
    await _crowd(storage)
    await _recovery(storage)


async def _alone(storage: SagaStorage) -> None:
    saga_id, name = uuid4(), f"order {uuid4()}"
    await storage.create_saga(saga_id, name, context(1))
    assert await storage.save(Checkpoint(saga_id, context=context(2), steps=[STARTED, STARTED])) == 2
    assert await storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING, expected_version=2)) == 3
    with pytest.raises(SagaConcurrencyError):
        await storage.update_context(saga_id, {}, expected_version=2)
    with pytest.raises(SagaAlreadyExistsError):
        await storage.create_saga(saga_id, name, {})
    with pytest.raises(SagaNotFoundError):
        await storage.log_step(uuid4(), "pay", "act", SagaStepStatus.STARTED)
    saga = await storage.get_saga(saga_id)
    assert (saga.id, saga.name, saga.status, saga.version) == (saga_id, name, SagaStatus.RUNNING, 3)
    assert type(saga.id) is UUID
    assert saga.context == context(2)
    assert abs(datetime.now(UTC) - saga.created_at) < timedelta(hours=1)
    history = await storage.get_step_history(saga_id)
    assert [(entry.step_name, entry.details) for entry in history] == [("pay", "café")] * 2
    assert [entry.id for entry in await storage.get_in_doubt_steps(saga_id)] == [entry.id for entry in history]
    assert [entry async for entry in storage.iter_step_history(saga_id, batch_size=1)] == history
    assert all(abs(datetime.now(UTC) - entry.created_at) < timedelta(hours=1) for entry in history)
    await storage.update_status(saga_id, SagaStatus.COMPLETED)


async def _crowd(storage: SagaStorage) -> None:
    async def one(number: int) -> None:
        saga_id = uuid4()
        await storage.create_saga(saga_id, "crowd", context(number))
        await asyncio.gather(
            storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING, steps=[STARTED], expected_version=1)),
            storage.log_step(saga_id, "ship", "act", SagaStepStatus.STARTED, None),
        )
        with pytest.raises(SagaConcurrencyError):
            await storage.save(Checkpoint(saga_id, context={}, expected_version=1))
        await storage.save(Checkpoint(saga_id, status=SagaStatus.COMPLETED, context=context(-number)))
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.context) == (3, context(-number))
        assert len(await storage.get_step_history(saga_id)) == 2

    await asyncio.gather(*(one(number) for number in range(20)))


async def _recovery(storage: SagaStorage) -> None:
    name = f"stuck {uuid4()}"
    ids = {uuid4() for _ in range(3)}
    for saga_id in ids:
        await storage.save(Checkpoint(saga_id, name=name, status=SagaStatus.RUNNING, steps=[STARTED]))
    assert {saga.id for saga in await storage.find_stale_sagas(stale_after=NOW, name=name)} == ids
    claimed = await storage.claim_sagas(owner="wörker", lease=MINUTE, limit=2, stale_after=NOW, name=name)
    assert len(claimed) == 2
    mine, other = claimed
    assert mine.lease_owner == "wörker"
    assert mine.lease_expires_at is not None
    assert mine.lease_expires_at - mine.updated_at == MINUTE
    with pytest.raises(SagaLeasedError, match="wörker"):
        async with storage.run(other.id, owner="another", lease=MINUTE):
            pass
    async with storage.run(mine.id, owner="wörker", lease=MINUTE) as run:
        await run.heartbeat()
        assert await run.holds_lease()
        await run.log_step(mine.id, "pay", "act", SagaStepStatus.COMPLETED)
        await run.update_status(mine.id, SagaStatus.COMPLETED)
        await run.commit()
    await storage.give_up_saga(other.id, by="ann", reason="tests")
    assert (await storage.get_saga(other.id)).status is SagaStatus.FAILED
    [left] = ids - {mine.id, other.id}
    assert [saga.id for saga in await storage.find_exhausted_sagas(name=name, max_attempts=0)] == [left]
    page = await storage.find_sagas()
    assert page.sagas
    await storage.update_status(left, SagaStatus.FAILED)
