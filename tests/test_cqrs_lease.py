"""First executions of python-cqrs's engine under a lease; and what cancelling one does, and stopping it instead."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID, uuid4

import cqrs
import pytest
from cqrs.bootstrap.saga import bootstrap
from cqrs.saga.fallback import Fallback
from cqrs.saga.recovery import recover_saga
from cqrs.saga.saga import Saga
from cqrs.saga.storage.memory import MemorySagaStorage as CqrsMemoryStorage
from sqlalchemy.ext.asyncio import async_sessionmaker

from saga_store import InvalidSagaDataError, MemoryDatabase, MemorySagaStorage, SagaLeasedError, SagaStatus
from saga_store.cqrs import CqrsSagaStorage, recovery_handler
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from tests.test_cqrs import OrderContext, OrderSaga, PerCall, Reserve, Ship, Step, World, WorldContainer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

LEASE = timedelta(seconds=30)


class Bank:
    """A service that answers when it is told to."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()


class SlowWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()


class Charge(Step):
    async def act(self, context: OrderContext) -> cqrs.SagaStepResult[OrderContext, None]:
        assert isinstance(self.world, SlowWorld)
        self.world.bank.asked.set()
        await self.world.bank.answers.wait()
        return await super().act(context)


class SlowSaga(Saga[OrderContext]):
    steps: ClassVar[list[type[cqrs.SagaStepHandler[Any, Any]] | Fallback]] = [Reserve, Charge, Ship]


@pytest.fixture(params=["memory", "asyncpg", "psycopg"])
def new_storage(request: pytest.FixtureRequest) -> Callable[[], SagaStorage]:
    """A factory of storages over the same sagas, as several processes would have them."""
    if request.param == "memory":
        database = MemoryDatabase()
        return lambda: MemorySagaStorage(database)
    make_engine: Callable[[str], AsyncEngine] = request.getfixturevalue("make_engine")
    return lambda: SqlAlchemySagaStorage(make_engine(request.param))


@pytest.fixture
def storage(new_storage: Callable[[], SagaStorage]) -> SagaStorage:
    return new_storage()


@pytest.fixture
async def world() -> SlowWorld:
    return SlowWorld()


async def one_turn() -> None:
    await asyncio.sleep(0)


def execute(world: World, adapter: CqrsSagaStorage, saga_id: UUID) -> AsyncIterator[Any]:
    mediator = bootstrap(
        WorldContainer(world), sagas_mapper=lambda sagas: sagas.bind(OrderContext, SlowSaga), saga_storage=adapter
    )
    return mediator.execute(OrderContext("o-1"), saga_id)


async def run(world: World, adapter: CqrsSagaStorage, saga_id: UUID) -> None:
    async for _ in execute(world, adapter, saga_id):
        pass


async def recover(world: World, adapter: CqrsSagaStorage, saga_id: UUID) -> None:
    await recover_saga(SlowSaga(), saga_id, OrderContext, WorldContainer(world), adapter)


class TestLease:
    async def test_while_a_step_acts_the_saga_is_nobody_elses(
        self, storage: SagaStorage, new_storage: Callable[[], SagaStorage], world: SlowWorld
    ) -> None:
        """It isn't listed, claimed, recovered or started a second time, however short ``stale_after`` is."""
        saga_id, at_once = uuid4(), timedelta(0)
        theirs = CqrsSagaStorage(new_storage(), lease=LEASE, owner="second")
        first = asyncio.create_task(run(world, CqrsSagaStorage(storage, lease=LEASE, owner="first"), saga_id))
        await world.bank.asked.wait()
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner) == (SagaStatus.RUNNING, "first")
        assert await storage.find_stale_sagas(stale_after=at_once) == []
        assert await storage.claim_sagas(owner="worker", lease=LEASE, limit=10, stale_after=at_once) == []
        assert await theirs.get_sagas_for_recovery(10) == []
        with pytest.raises(SagaLeasedError, match="is leased to 'first'"):
            await run(world, theirs, saga_id)
        with pytest.raises(SagaLeasedError, match="is leased to 'first'"):
            await recover(world, theirs, saga_id)
        assert await storage.get_saga(saga_id) == saga

        world.bank.answers.set()
        await first
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner, saga.recovery_attempts) == (SagaStatus.COMPLETED, None, 0)
        assert world.calls == ["act Reserve", "act Charge", "act Ship"]

    async def test_an_expired_lease_keeps_nobody_from_counting(
        self, storage: SagaStorage, new_storage: Callable[[], SagaStorage]
    ) -> None:
        """An attempt on what a process has left behind is counted; on what it is working on it is refused."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "SlowSaga", {})
        ours = CqrsSagaStorage(new_storage(), lease=LEASE, owner="second")
        async with storage.run(saga_id, owner="first", lease=LEASE):
            with pytest.raises(SagaLeasedError):
                await ours.increment_recovery_attempts(saga_id)
        await storage.run(saga_id, owner="first", lease=timedelta(milliseconds=1)).__aenter__()  # and it dies
        await asyncio.sleep(0.05)
        assert (await storage.get_saga(saga_id)).lease_owner == "first"
        await ours.increment_recovery_attempts(saga_id)
        assert (await storage.get_saga(saga_id)).recovery_attempts == 1

    async def test_it_is_renewed_while_a_step_takes_longer(self, storage: SagaStorage, world: SlowWorld) -> None:
        saga_id = uuid4()
        adapter = CqrsSagaStorage(storage, lease=timedelta(seconds=0.6))
        first = asyncio.create_task(run(world, adapter, saga_id))
        await world.bank.asked.wait()
        taken = (await storage.get_saga(saga_id)).lease_expires_at
        assert taken
        async with asyncio.timeout(30):
            while (await storage.get_saga(saga_id)).lease_expires_at == taken:
                await one_turn()
        world.bank.answers.set()
        await first
        assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED

    async def test_a_saga_that_fails_is_undone_under_it(self, storage: SagaStorage, world: SlowWorld) -> None:
        """FAILED ends the lease, and nothing of it stays."""
        saga_id = uuid4()
        world.bank.answers.set()
        world.trouble["act Ship"] = RuntimeError("no courier")
        with pytest.raises(RuntimeError, match="no courier"):
            await run(world, CqrsSagaStorage(storage, lease=LEASE), saga_id)
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner) == (SagaStatus.FAILED, None)
        assert world.calls[-2:] == ["compensate Charge", "compensate Reserve"]

    async def test_who_lost_it_undoes_nothing(self, storage: SagaStorage, world: SlowWorld) -> None:
        """An execution that somebody else has taken over neither writes nor compensates any more."""
        saga_id = uuid4()
        first = asyncio.create_task(run(world, CqrsSagaStorage(storage, lease=LEASE), saga_id))
        await world.bank.asked.wait()
        await storage.break_lease(saga_id, by="ops", reason="it hangs")
        async with storage.run(saga_id, owner="other", lease=LEASE):
            world.bank.answers.set()
            with pytest.raises(SagaLeasedError, match="is leased to 'other'"):
                await first
            assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING
        assert world.calls == ["act Reserve", "act Charge"]


@pytest.mark.parametrize("adapt", [PerCall, CqrsSagaStorage, lambda it: CqrsSagaStorage(it, lease=LEASE)])
class TestShutdown:
    async def test_cancelling_compensates(
        self, storage: SagaStorage, world: SlowWorld, adapt: Callable[[SagaStorage], CqrsSagaStorage]
    ) -> None:
        """The engine takes a cancellation for a failure: it undoes what was done, and the saga is FAILED."""
        saga_id = uuid4()
        running = asyncio.create_task(run(world, adapt(storage), saga_id))
        await world.bank.asked.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert world.calls == ["act Reserve", "compensate Reserve"]
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner) == (SagaStatus.FAILED, None)

    async def test_stopping_between_two_steps_leaves_the_saga_to_be_gone_on_with(
        self, storage: SagaStorage, world: SlowWorld, adapt: Callable[[SagaStorage], CqrsSagaStorage]
    ) -> None:
        """Whoever stops to iterate undoes nothing: the saga is RUNNING, and another process goes on at once."""
        saga_id = uuid4()
        async with aclosing(execute(world, adapt(storage), saga_id)) as steps:  # type: ignore[type-var] # a generator
            async for _ in steps:
                break
        async with asyncio.timeout(30):
            while (saga := await storage.get_saga(saga_id)).lease_owner:
                await one_turn()  # the engine's inner generators are closed by the event loop
        assert (saga.status, world.calls) == (SagaStatus.RUNNING, ["act Reserve"])
        world.bank.answers.set()
        await recover(world, adapt(storage), saga_id)
        assert world.calls == ["act Reserve", "act Charge", "act Ship"]
        assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED


class TestArguments:
    @pytest.mark.parametrize(
        "wrong", [None, "postgresql://", CqrsMemoryStorage(), MemorySagaStorage, async_sessionmaker()]
    )
    def test_what_is_no_storage(self, wrong: Any) -> None:  # noqa: ANN401 - anything
        """It is refused at once, and the message names what is wanted."""
        with pytest.raises(TypeError, match=rf"ICheckpointStorage.*, not {type(wrong).__name__}$"):
            CqrsSagaStorage(wrong)

    def test_a_saga_is_an_object(self) -> None:
        with pytest.raises(TypeError, match=r"saga must be a Saga of python-cqrs, such as OrderSaga\(\), not <class"):
            recovery_handler(OrderSaga, OrderContext, WorldContainer(World()))  # type: ignore[arg-type] # which is the point

    @pytest.mark.parametrize(
        ("given", "field"),
        [
            ({"owner": "me"}, "owner"),
            ({"lease": timedelta(0)}, "lease"),
            ({"lease": 30}, "lease"),
            ({"lease": LEASE, "owner": "x" * 300}, "owner"),
        ],
    )
    def test_leases(self, given: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidSagaDataError) as caught:
            CqrsSagaStorage(MemorySagaStorage(), **given)
        assert caught.value.field == field


async def test_errors_are_in_python_cqrss_words(storage: SagaStorage) -> None:
    """Applications look for them, so they are the same to the letter."""
    saga_id = uuid4()
    said: list[list[str]] = []
    for each in (CqrsMemoryStorage(), CqrsSagaStorage(storage)):
        said.append([])
        with pytest.raises(ValueError, match=str(saga_id)) as missing:
            await each.load_saga_state(saga_id)
        await each.create_saga(saga_id, "order", {})
        with pytest.raises(ValueError, match=str(saga_id)) as taken:
            await each.create_saga(saga_id, "order", {})
        said[-1] += [str(missing.value), str(taken.value)]
    assert said[0] == said[1] == [f"Saga {saga_id} not found", f"Saga {saga_id} already exists"]
