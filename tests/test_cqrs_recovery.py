"""python-cqrs's engine in the hands of a RecoveryWorker: one worker at a time, and no saga given up too early."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from saga_store import MemoryDatabase, MemorySagaStorage, SagaStatus, SagaStepStatus
from saga_store.cqrs import CqrsSagaStorage, recovery_handler
from saga_store.recovery import RecoveryWorker
from tests.test_cqrs import Killed, OrderContext, OrderSaga, Shop, World, WorldContainer

HOUR = timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2024, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> MemorySagaStorage:
    return MemorySagaStorage(MemoryDatabase(clock=clock))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def worker(storage: MemorySagaStorage, world: World) -> RecoveryWorker:
    container: WorldContainer[Any] = WorldContainer(world)
    return RecoveryWorker(storage, {"OrderSaga": recovery_handler(OrderSaga(), OrderContext, container)})


async def interrupted(storage: MemorySagaStorage, world: World, where: str) -> UUID:
    """Begin a saga in a process that is killed there."""
    saga_id = uuid4()
    world.trouble[where] = Killed()
    shop = Shop(world, lambda: CqrsSagaStorage(storage))
    await shop.run_until_killed(saga_id)
    world.trouble.clear()
    world.calls.clear()
    return saga_id


async def test_a_saga_goes_on_under_a_lease(
    storage: MemorySagaStorage, world: World, worker: RecoveryWorker, clock: Clock
) -> None:
    """The worker holds the lease while the steps act, writes ahead, and the saga ends COMPLETED."""
    saga_id = await interrupted(storage, world, "act Pay")
    owners = []
    world.look = lambda _: owners.append(storage._bind._rows[saga_id].lease_owner)  # noqa: SLF001 - steps can't await
    clock.now += HOUR
    assert await worker.poll() == 1
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.lease_owner, saga.recovery_attempts) == (SagaStatus.COMPLETED, None, 1)
    assert world.calls == ["act Pay", "act Ship"]
    assert owners == [worker.owner] * 2


async def test_one_failed_recovery_is_not_the_end(
    storage: MemorySagaStorage, world: World, worker: RecoveryWorker, clock: Clock
) -> None:
    """A saga whose context can't be rebuilt stays as it is; once it can, the next attempt sees it through."""
    saga_id = await interrupted(storage, world, "act Pay")
    _, context = await storage.load_saga_state(saga_id)
    await storage.update_context(saga_id, {"price": "a lot"})
    clock.now += HOUR
    assert await worker.poll() == 1
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.lease_owner, saga.recovery_attempts) == (SagaStatus.RUNNING, None, 1)
    assert world.calls == []
    await storage.update_context(saga_id, context)
    clock.now += HOUR
    assert await worker.poll() == 1
    assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED


async def test_a_saga_that_fails_is_undone_once(
    storage: MemorySagaStorage, world: World, worker: RecoveryWorker, clock: Clock
) -> None:
    """A step that fails in the recovery has the completed ones undone; the saga is FAILED, and not claimed again."""
    saga_id = await interrupted(storage, world, "act Pay")
    world.trouble["act Ship"] = RuntimeError("no courier")
    for _ in range(2):
        clock.now += HOUR
        await worker.poll()
    assert world.calls == ["act Pay", "act Ship", "compensate Pay", "compensate Reserve"]
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.recovery_attempts) == (SagaStatus.FAILED, 1)


async def test_what_cant_be_undone_is_tried_again(
    storage: MemorySagaStorage, world: World, worker: RecoveryWorker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step can't be undone the saga stays COMPENSATING; the next attempt undoes just what is left."""
    monkeypatch.setattr("asyncio.sleep", _no_sleep)  # the engine retries after seconds
    saga_id = await interrupted(storage, world, "act Pay")
    world.trouble = {"act Ship": RuntimeError("no courier"), "compensate Pay": RuntimeError("bank closed")}
    clock.now += HOUR
    await worker.poll()
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.lease_owner) == (SagaStatus.COMPENSATING, None)
    assert world.calls[-1] == "compensate Reserve"
    world.trouble.clear()
    world.calls.clear()
    clock.now += HOUR
    await worker.poll()
    assert world.calls == ["compensate Pay"]
    assert (await storage.get_saga(saga_id)).status is SagaStatus.FAILED


async def test_what_a_person_has_settled_isnt_undone_again(
    storage: MemorySagaStorage, world: World, worker: RecoveryWorker, clock: Clock
) -> None:
    """A compensation in doubt that is settled as COMPENSATED is one that the engine has done with."""
    saga_id = await interrupted(storage, world, "act Pay")
    for status in (SagaStepStatus.STARTED, SagaStepStatus.COMPLETED):
        await storage.log_step(saga_id, "Pay", "act", status)
    await storage.log_step(saga_id, "Pay", "compensate", SagaStepStatus.STARTED)
    await storage.update_status(saga_id, SagaStatus.COMPENSATING)
    [entry] = await storage.get_in_doubt_steps(saga_id)
    await storage.settle_step(
        saga_id, entry.id, SagaStepStatus.COMPENSATED, by="alice", reason="refunded, says the bank"
    )
    clock.now += HOUR
    await worker.poll()

    assert world.calls == ["compensate Reserve"]
    assert (await storage.get_saga(saga_id)).status is SagaStatus.FAILED


async def test_who_lost_the_lease_undoes_nothing(
    storage: MemorySagaStorage,
    world: World,
    worker: RecoveryWorker,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker whose lease somebody else got in the middle of a step neither writes nor compensates any more."""
    saga_id = await interrupted(storage, world, "act Pay")

    def lose(_: str) -> None:
        world.look = lambda _: None
        database = storage._bind  # noqa: SLF001 - steps can't await
        assert isinstance(database, MemoryDatabase)
        row = database._rows[saga_id]  # noqa: SLF001 - likewise
        database._rows[saga_id] = replace(row, lease_owner="other", version=row.version + 1)  # noqa: SLF001 - likewise

    world.look = lose
    clock.now += HOUR
    await worker.poll()
    assert world.calls == ["act Pay"]
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.lease_owner) == (SagaStatus.RUNNING, "other")
    assert "outcome=lost" in caplog.text


async def _no_sleep(_: float) -> None:
    pass
