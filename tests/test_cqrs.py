"""python-cqrs's own engine over our storages, and the adapter beside its own memory storage."""

import ast
import asyncio
import datetime as dt
import enum
import functools
import inspect
import re
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar
from unittest.mock import create_autospec

import cqrs
import psycopg
import pytest
from cqrs.bootstrap.saga import bootstrap
from cqrs.dispatcher.exceptions import SagaConcurrencyError as CqrsConcurrencyError
from cqrs.saga.fallback import Fallback
from cqrs.saga.models import SagaContext
from cqrs.saga.recovery import recover_saga
from cqrs.saga.saga import Saga
from cqrs.saga.storage.enums import SagaStatus, SagaStepStatus
from cqrs.saga.storage.memory import MemorySagaStorage as CqrsMemoryStorage
from cqrs.saga.storage.protocol import ISagaStorage
from sqlalchemy.pool import QueuePool

import saga_store
from saga_store import (
    ICheckpointStorage,
    InvalidSagaDataError,
    IRetentionStorage,
    MemoryDatabase,
    MemorySagaStorage,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaNotFoundError,
)
from saga_store.cqrs import CqrsSagaStorage
from saga_store.retention_model import SagaMark
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.databases import Database
from tests.proxy import Proxy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# --- an order saga, and the world that it acts on ---


class Size(enum.Enum):
    SMALL = "small"


@dataclass
class Address:
    street_name: str
    position: tuple[float, float]


@dataclass
class OrderContext(SagaContext):
    order_id: str
    items: tuple[str, ...] = ("book",)
    payment_id: str | None = None
    shipment: str | None = None
    price: Decimal = Decimal("10.50")
    ordered_at: dt.datetime = dt.datetime(2030, 1, 2, 3, 4, 5, 6, dt.UTC)
    sizes: set[Size] = field(default_factory=lambda: {Size.SMALL})
    address: Address = field(default_factory=lambda: Address("High Street", (1.5, -2.5)))
    per_shelf: dict[int, str] = field(default_factory=lambda: {7: "book"})


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits: nothing of it runs any more, no ``except Exception`` either."""


class World:
    """What the steps did, and what is to go wrong; it outlives the process that is killed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.trouble: dict[str, BaseException] = {}
        self.look: Callable[[str], None] = lambda _: None

    def call(self, name: str) -> None:
        self.calls.append(name)
        self.look(name)
        if name in self.trouble:
            raise self.trouble[name]


class Step(cqrs.SagaStepHandler[OrderContext, None]):
    def __init__(self, world: World) -> None:
        self.world = world

    async def act(self, context: OrderContext) -> cqrs.SagaStepResult[OrderContext, None]:
        self.change(context)
        self.world.call(f"act {type(self).__name__}")
        return self._generate_step_result(None)

    async def compensate(self, context: OrderContext) -> None:
        assert context.order_id == "o-1"
        self.world.call(f"compensate {type(self).__name__}")

    def change(self, context: OrderContext) -> None: ...


class Reserve(Step): ...


class Pay(Step):
    def change(self, context: OrderContext) -> None:
        context.payment_id = "p-1"


class Ship(Step): ...


class Courier(Step):
    def change(self, context: OrderContext) -> None:
        context.shipment = "by courier"


class OrderSaga(Saga[OrderContext]):
    steps: ClassVar[list[type[cqrs.SagaStepHandler[Any, Any]] | Fallback]] = [Reserve, Pay, Ship]


class SagaWithFallback(Saga[OrderContext]):
    steps: ClassVar[list[type[cqrs.SagaStepHandler[Any, Any]] | Fallback]] = [
        Reserve,
        Fallback(step=Ship, fallback=Courier),
        Pay,
    ]


T = TypeVar("T")


class WorldContainer(Generic[T]):
    """The smallest container that python-cqrs takes: it builds steps with the world, and sagas with nothing."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def external_container(self) -> NoReturn:
        raise NotImplementedError

    def attach_external_container(self, container: object) -> NoReturn:
        raise NotImplementedError

    async def resolve(self, type_: type[Any]) -> Any:  # noqa: ANN401 - the engine's protocol
        return type_(self._world) if issubclass(type_, Step) else type_()


NewStorage = Callable[[], ICheckpointStorage]


@pytest.fixture(params=["memory", "asyncpg", "psycopg"])
def new_storage(request: pytest.FixtureRequest) -> NewStorage:
    """A factory of storages over one and the same set of sagas, as several processes would have them."""
    if request.param == "memory":
        database = MemoryDatabase()
        return lambda: MemorySagaStorage(database)
    make_engine: Callable[[str], AsyncEngine] = request.getfixturevalue("make_engine")
    return lambda: SqlAlchemySagaStorage(make_engine(request.param))


class PerCall(CqrsSagaStorage):
    """The adapter as it is over a storage without runs: the engine calls it, and each call is written."""

    def create_run(self) -> NoReturn:
        raise NotImplementedError


ADAPTERS: dict[str, Callable[[ICheckpointStorage], CqrsSagaStorage]] = {
    "calls": PerCall,
    "runs": CqrsSagaStorage,
    "write-ahead": functools.partial(CqrsSagaStorage, write_ahead=True),
}
NewAdapter = Callable[[], CqrsSagaStorage]


@pytest.fixture(params=ADAPTERS)
def way(request: pytest.FixtureRequest) -> str:
    """How the engine writes."""
    return str(request.param)


@pytest.fixture
def new_adapter(new_storage: NewStorage, way: str) -> NewAdapter:
    return lambda: ADAPTERS[way](new_storage())


class Shop:
    """The application around the saga: all its objects are new in each 'process'."""

    def __init__(self, world: World, new_adapter: NewAdapter, saga: Saga[OrderContext] | None = None) -> None:
        self.world = world
        self.saga = saga or OrderSaga()
        self.storage = new_adapter()
        self.container: WorldContainer[Any] = WorldContainer(world)

    async def run(self, saga_id: uuid.UUID) -> None:
        async with self.saga.transaction(
            OrderContext("o-1"), self.container, self.storage, saga_id, compensation_retry_delay=0
        ) as steps:
            async for _ in steps:
                pass

    async def run_until_killed(self, saga_id: uuid.UUID) -> None:
        """Run without ``async with``, whose exit would compensate: a killed process has no such luck."""
        with pytest.raises(Killed):
            async for _ in self.saga.transaction(OrderContext("o-1"), self.container, self.storage, saga_id):
                pass

    async def recover(self, saga_id: uuid.UUID) -> None:
        await recover_saga(self.saga, saga_id, OrderContext, self.container, self.storage)

    async def status(self, saga_id: uuid.UUID) -> SagaStatus:
        return (await self.storage.load_saga_state(saga_id))[0]

    async def context(self, saga_id: uuid.UUID) -> OrderContext:
        return OrderContext.from_dict((await self.storage.load_saga_state(saga_id))[1])

    async def history(self, saga_id: uuid.UUID) -> list[str]:
        return [
            f"{entry.action} {entry.step_name} {entry.status}" for entry in await self.storage.get_step_history(saga_id)
        ]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def saga_id() -> uuid.UUID:
    return uuid.uuid4()


# --- the engine ---


async def test_forward(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A saga whose steps all succeed is COMPLETED, with each step started and completed in its history."""
    shop = Shop(world, new_adapter)
    await shop.run(saga_id)
    assert await shop.status(saga_id) is SagaStatus.COMPLETED
    assert (await shop.context(saga_id)).payment_id == "p-1"
    assert await shop.history(saga_id) == [
        "act Reserve started",
        "act Reserve completed",
        "act Pay started",
        "act Pay completed",
        "act Ship started",
        "act Ship completed",
    ]


async def test_context_comes_back_by_its_types(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """Tuples, sets, dates, Decimals, enums, nested dataclasses and numbers as keys come back as the fields say."""
    shop = Shop(world, new_adapter)
    await shop.run(saga_id)
    assert await shop.context(saga_id) == OrderContext("o-1", payment_id="p-1")


async def test_compensation(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A step that fails has the completed ones undone, last first, and the saga ends FAILED."""
    shop = Shop(world, new_adapter)
    world.trouble["act Ship"] = RuntimeError("no courier")
    with pytest.raises(RuntimeError, match="no courier"):
        await shop.run(saga_id)
    assert world.calls == ["act Reserve", "act Pay", "act Ship", "compensate Pay", "compensate Reserve"]
    assert await shop.status(saga_id) is SagaStatus.FAILED
    assert await shop.history(saga_id) == [
        "act Reserve started",
        "act Reserve completed",
        "act Pay started",
        "act Pay completed",
        "act Ship started",
        "act Ship failed",
        "compensate Pay started",
        "compensate Pay completed",
        "compensate Reserve started",
        "compensate Reserve completed",
    ]


async def test_error_text_that_cannot_be_stored(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """An error whose text holds NUL or a lone surrogate doesn't keep the saga from compensating."""
    shop = Shop(world, new_adapter)
    world.trouble["act Ship"] = RuntimeError("row \0 of \ud800 café")
    with pytest.raises(RuntimeError, match="café"):
        await shop.run(saga_id)
    assert world.calls[-2:] == ["compensate Pay", "compensate Reserve"]
    [failed] = [entry for entry in await shop.storage.get_step_history(saga_id) if entry.details]
    assert failed.details == r"row \x00 of \ud800 café"


async def test_compensation_that_fails(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A compensation that fails is in the history with its reason, and the others still run."""
    shop = Shop(world, new_adapter)
    world.trouble = {"act Ship": RuntimeError("no courier"), "compensate Pay": RuntimeError("bank closed\0")}
    with pytest.raises(RuntimeError, match="no courier"):
        await shop.run(saga_id)
    assert world.calls[-1] == "compensate Reserve"
    [failed] = [
        entry
        for entry in await shop.storage.get_step_history(saga_id)
        if entry.action == "compensate" and entry.status is SagaStepStatus.FAILED
    ]
    assert (failed.step_name, failed.details) == ("Pay", r"bank closed\x00")


async def test_recover_forward(world: World, new_adapter: NewAdapter, way: str, saga_id: uuid.UUID) -> None:
    """A saga killed in the middle of a step goes on from that step in another process."""
    world.trouble["act Pay"] = Killed()
    await Shop(world, new_adapter).run_until_killed(saga_id)
    world.trouble.clear()
    shop = Shop(world, new_adapter)
    assert await shop.status(saga_id) is SagaStatus.RUNNING
    left_behind = ["act Reserve started", "act Reserve completed", "act Pay started"]
    # A run keeps STARTED in memory until the step's checkpoint, unless it is written ahead.
    assert await shop.history(saga_id) == (left_behind[:2] if way == "runs" else left_behind)

    assert await shop.storage.get_sagas_for_recovery(10) == [saga_id]
    await shop.recover(saga_id)
    assert world.calls == ["act Reserve", "act Pay", "act Pay", "act Ship"]
    assert await shop.status(saga_id) is SagaStatus.COMPLETED
    assert await shop.context(saga_id) == OrderContext("o-1", payment_id="p-1")
    assert await shop.storage.get_sagas_for_recovery(10) == []


async def test_recover_pending(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A saga whose process died before it was RUNNING is found, and run from its first step."""
    await Shop(world, new_adapter).storage.create_saga(saga_id, "OrderSaga", OrderContext("o-1").to_dict())
    shop = Shop(world, new_adapter)
    assert await shop.storage.get_sagas_for_recovery(10) == [saga_id]
    await shop.recover(saga_id)
    assert world.calls == ["act Reserve", "act Pay", "act Ship"]
    assert await shop.status(saga_id) is SagaStatus.COMPLETED


async def test_recover_compensation(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A saga killed while it compensates goes on compensating, and what was undone isn't undone again."""
    world.trouble = {"act Ship": RuntimeError("no courier"), "compensate Reserve": Killed()}
    await Shop(world, new_adapter).run_until_killed(saga_id)
    world.trouble.clear()
    shop = Shop(world, new_adapter)
    assert await shop.status(saga_id) is SagaStatus.COMPENSATING
    assert await shop.storage.get_sagas_for_recovery(10) == [saga_id]
    with pytest.raises(RuntimeError, match="was recovered in compensating state"):
        await shop.recover(saga_id)
    assert [call for call in world.calls if call.startswith("compensate")] == [
        "compensate Pay",
        "compensate Reserve",
        "compensate Reserve",
    ]
    assert await shop.status(saga_id) is SagaStatus.FAILED
    assert await shop.storage.get_sagas_for_recovery(10) == []


async def test_recovery_that_fails(
    world: World, new_storage: NewStorage, new_adapter: NewAdapter, saga_id: uuid.UUID
) -> None:
    """A recovery whose step fails compensates, is counted as an attempt, and leaves the saga FAILED."""
    world.trouble["act Pay"] = Killed()
    await Shop(world, new_adapter).run_until_killed(saga_id)
    world.trouble["act Pay"] = OSError("bank closed")
    shop = Shop(world, new_adapter)
    with pytest.raises(OSError, match="bank closed"):
        await shop.recover(saga_id)
    assert world.calls[-1] == "compensate Reserve"
    saga = await new_storage().get_saga(saga_id)
    assert (saga.status, saga.recovery_attempts) == (saga_store.SagaStatus.FAILED, 1)


async def test_recover_completed(
    world: World, new_storage: NewStorage, new_adapter: NewAdapter, saga_id: uuid.UUID
) -> None:
    """Recovering a saga that is done does nothing."""
    shop = Shop(world, new_adapter)
    await shop.run(saga_id)
    before = await new_storage().get_saga(saga_id)
    await shop.recover(saga_id)
    assert len(world.calls) == 3
    assert await new_storage().get_saga(saga_id) == before


async def test_recover_missing(
    world: World, new_storage: NewStorage, new_adapter: NewAdapter, saga_id: uuid.UUID
) -> None:
    """Recovering a saga that doesn't exist is a ValueError, and creates none."""
    shop = Shop(world, new_adapter)
    with pytest.raises(ValueError, match=str(saga_id)):
        await shop.recover(saga_id)
    with pytest.raises(SagaNotFoundError):
        await new_storage().get_saga(saga_id)


async def test_fallback(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A step that fails is replaced by its fallback, and it's the fallback that is in the history as completed."""
    shop = Shop(world, new_adapter, SagaWithFallback())
    world.trouble["act Ship"] = RuntimeError("no truck")
    await shop.run(saga_id)
    assert world.calls == ["act Reserve", "act Ship", "act Courier", "act Pay"]
    assert (await shop.context(saga_id)).shipment == "by courier"
    assert "act Courier completed" in await shop.history(saga_id)


async def test_recover_after_fallback(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """After a crash a fallback that completed isn't run again, and is what is compensated."""
    world.trouble = {"act Ship": RuntimeError("no truck"), "act Pay": Killed()}
    await Shop(world, new_adapter, SagaWithFallback()).run_until_killed(saga_id)
    world.trouble = {"act Pay": RuntimeError("no money")}
    shop = Shop(world, new_adapter, SagaWithFallback())
    with pytest.raises(RuntimeError, match="no money"):
        await shop.recover(saga_id)
    assert world.calls.count("act Courier") == 1
    assert world.calls[-2:] == ["compensate Courier", "compensate Reserve"]


async def test_mediator(world: World, new_adapter: NewAdapter, saga_id: uuid.UUID) -> None:
    """A SagaMediator runs its sagas on the storage, compensates them, and runs no saga twice."""
    storage = new_adapter()
    mediator = bootstrap(
        WorldContainer(world),
        sagas_mapper=lambda sagas: sagas.bind(OrderContext, OrderSaga),
        saga_storage=storage,
    )
    steps = [result.step_type async for result in mediator.execute(OrderContext("o-1"), saga_id)]
    assert steps == [Reserve, Pay, Ship]
    assert (await storage.load_saga_state(saga_id))[0] is SagaStatus.COMPLETED
    assert [result async for result in mediator.execute(OrderContext("o-1"), saga_id)] == []

    world.trouble["act Pay"] = RuntimeError("no money")
    failed = uuid.uuid4()
    with pytest.raises(RuntimeError, match="no money"):
        _ = [result async for result in mediator.execute(OrderContext("o-1"), failed)]
    assert world.calls[-1] == "compensate Reserve"
    assert (await storage.load_saga_state(failed))[0] is SagaStatus.FAILED


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(("write_ahead", "round_trips"), [(False, 6), (True, 9)])
async def test_runs_hold_nothing_while_a_step_acts(
    database: Database, world: World, driver: str, *, write_ahead: bool, round_trips: int
) -> None:
    """In a run each checkpoint is one round trip; in between no connection is out and no transaction open.

    Create, RUNNING, three steps and the end are six; writing ahead makes one more for each step.
    """
    async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
        storage = CqrsSagaStorage(SqlAlchemySagaStorage(engine), write_ahead=write_ahead)
        shop = Shop(world, lambda: storage)
        for _ in range(4):  # until the statements are prepared
            await shop.run(uuid.uuid4())
        world.calls.clear()

        with psycopg.connect(database.url(), autocommit=True) as admin:

            def look(_: str) -> None:
                assert isinstance(engine.pool, QueuePool)
                assert engine.pool.checkedout() == 0
                query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state LIKE 'idle in%%'"
                assert admin.execute(query, [database.name]).fetchone() == (0,)

            world.look = look
            before = proxy.round_trips
            async with shop.saga.transaction(OrderContext("o-1"), shop.container, storage) as steps:
                async for _ in steps:
                    pass
        assert proxy.round_trips - before == round_trips
    assert world.calls == ["act Reserve", "act Pay", "act Ship"]


async def test_two_runs_of_one_saga(world: World, new_storage: NewStorage, saga_id: uuid.UUID) -> None:
    """A worker that comes back after another has finished the saga is refused, and its history stays clean."""
    shop = Shop(world, lambda: CqrsSagaStorage(new_storage()))
    world.trouble["act Pay"] = Killed()
    await shop.run_until_killed(saga_id)
    world.trouble.clear()
    async with shop.storage.create_run() as zombie:
        await zombie.load_saga_state(saga_id)
        await zombie.log_step(saga_id, "Pay", "act", SagaStepStatus.COMPLETED)
        await shop.recover(saga_id)
        with pytest.raises(CqrsConcurrencyError):
            await zombie.commit()
    history = await shop.history(saga_id)
    assert history.count("act Pay completed") == 1
    assert await shop.status(saga_id) is SagaStatus.COMPLETED


async def test_many_at_once(world: World, new_adapter: NewAdapter) -> None:
    """One adapter serves many sagas at once."""
    shop = Shop(world, new_adapter)
    ids = [uuid.uuid4() for _ in range(20)]
    await asyncio.gather(*map(shop.run, ids))
    assert {await shop.status(saga_id) for saga_id in ids} == {SagaStatus.COMPLETED}


# --- beside python-cqrs's own memory storage ---

ID = uuid.UUID(int=1)
OTHER = uuid.UUID(int=2)
Scenario = Callable[[ISagaStorage], Awaitable[object]]


async def state(storage: ISagaStorage) -> object:
    return await storage.load_saga_state(ID)


async def creates(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {"a": [1, None, {"b": 0.5}]})
    return await state(storage)


async def create_refuses_a_second(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {"a": 1})
    await storage.create_saga(ID, "other", {"a": 2})
    return await state(storage)


async def update_context_replaces(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {"a": 1, "b": 2})
    await storage.update_context(ID, {"a": 3})
    return await state(storage)


async def update_context_takes_a_version(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    await storage.update_context(ID, {"a": 1}, 1)
    await storage.update_context(ID, {"a": 2}, current_version=2)
    return await state(storage)


async def update_context_refuses_a_version(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    await storage.update_context(ID, {"a": 1}, 7)
    return await state(storage)


async def update_status_raises_the_version(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    states = []
    for status in SagaStatus:
        await storage.update_status(ID, status)
        states.append(await state(storage))
    return states


async def log_keeps_order_and_version(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    for number, status in enumerate(SagaStepStatus):
        await storage.log_step(ID, f"Step{number}", "act", status)
        await storage.log_step(ID, f"Step{number}", "compensate", status, f"line {number}\nline")
    return [
        (entry.saga_id, entry.step_name, entry.action, entry.status, entry.details, entry.timestamp.utcoffset())
        for entry in await storage.get_step_history(ID)
    ], await state(storage)


async def history_starts_empty(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    return await storage.get_step_history(ID)


async def load_takes_read_for_update(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    return await storage.load_saga_state(ID, read_for_update=True)


async def increments_attempts(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    await storage.update_status(ID, SagaStatus.RUNNING)
    await storage.increment_recovery_attempts(ID)
    await storage.increment_recovery_attempts(ID, SagaStatus.COMPENSATING)
    return await state(storage), [await storage.get_sagas_for_recovery(10, most) for most in (2, 3)]


async def sets_attempts(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    await storage.update_status(ID, SagaStatus.RUNNING)
    await storage.set_recovery_attempts(ID, 5)
    excluded = await storage.get_sagas_for_recovery(10)
    await storage.set_recovery_attempts(ID, 0)
    return await state(storage), excluded, await storage.get_sagas_for_recovery(10)


async def recovery_looks_at_the_status(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    found = []
    for status in set(SagaStatus) - {SagaStatus.PENDING}:
        await storage.update_status(ID, status)
        found.append((status, await storage.get_sagas_for_recovery(10)))
    return sorted(found)


async def recovery_goes_by_the_last_change(storage: ISagaStorage) -> object:
    for saga_id in (ID, OTHER):
        await storage.create_saga(saga_id, "order", {})
        await storage.update_status(saga_id, SagaStatus.RUNNING)
    await storage.update_context(ID, {"a": 1})
    return [await storage.get_sagas_for_recovery(limit) for limit in (0, 1, 2)]


async def recovery_goes_by_the_name(storage: ISagaStorage) -> object:
    for saga_id, name in ((ID, "order"), (OTHER, "refund")):
        await storage.create_saga(saga_id, name, {})
        await storage.update_status(saga_id, SagaStatus.RUNNING)
    return [await storage.get_sagas_for_recovery(9, saga_name=name) for name in ("order", "refund", "neither")]


async def recovery_spares_the_fresh(storage: ISagaStorage) -> object:
    await storage.create_saga(ID, "order", {})
    await storage.update_status(ID, SagaStatus.RUNNING)
    return await storage.get_sagas_for_recovery(9, stale_after_seconds=3600)


SCENARIOS: list[Scenario] = [
    creates,
    create_refuses_a_second,
    update_context_replaces,
    update_context_takes_a_version,
    update_context_refuses_a_version,
    update_status_raises_the_version,
    log_keeps_order_and_version,
    load_takes_read_for_update,
    history_starts_empty,
    increments_attempts,
    sets_attempts,
    recovery_looks_at_the_status,
    recovery_goes_by_the_last_change,
    recovery_goes_by_the_name,
    recovery_spares_the_fresh,
]


async def outcome(scenario: Scenario, storage: ISagaStorage) -> object:
    try:
        return await scenario(storage)
    except (ValueError, CqrsConcurrencyError) as exc:
        return type(exc)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_same_as_its_own_storage(scenario: Scenario, new_storage: NewStorage) -> None:
    """What python-cqrs's memory storage does, the adapter does: the same results, the same exceptions."""
    expected = await outcome(scenario, CqrsMemoryStorage())
    assert await outcome(scenario, CqrsSagaStorage(new_storage())) == expected


MISSING: dict[str, Scenario] = {
    "update_context": lambda storage: storage.update_context(ID, {}),
    "update_context with a version": lambda storage: storage.update_context(ID, {}, 1),
    "update_status": lambda storage: storage.update_status(ID, SagaStatus.RUNNING),
    "log_step": lambda storage: storage.log_step(ID, "Step", "act", SagaStepStatus.STARTED),
    "load_saga_state": lambda storage: storage.load_saga_state(ID),
    "increment_recovery_attempts": lambda storage: storage.increment_recovery_attempts(ID),
    "set_recovery_attempts": lambda storage: storage.set_recovery_attempts(ID, 1),
}


@pytest.mark.parametrize("method", MISSING)
async def test_missing_saga(method: str, new_storage: NewStorage) -> None:
    """Every method but the history, of which more below, says ValueError for a missing saga, as it does."""
    for storage in (CqrsMemoryStorage(), CqrsSagaStorage(new_storage())):
        with pytest.raises(ValueError, match=str(ID)):
            await MISSING[method](storage)


# --- where it differs, or says more ---


async def test_history_of_a_missing_saga(new_storage: NewStorage) -> None:
    """The history of a missing saga is a ValueError, where python-cqrs returns an empty list."""
    with pytest.raises(ValueError, match=f"^Saga {ID} not found$"):
        await CqrsSagaStorage(new_storage()).get_step_history(ID)


async def test_errors_keep_their_cause(new_storage: NewStorage) -> None:
    """The engine's exceptions are chained to the storage's own, which carry the facts."""
    storage = CqrsSagaStorage(new_storage())
    with pytest.raises(ValueError, match=f"^Saga {ID} not found$") as missing:
        await storage.load_saga_state(ID)
    assert isinstance(missing.value.__cause__, SagaNotFoundError)
    await storage.create_saga(ID, "order", {})
    with pytest.raises(ValueError, match=f"^Saga {ID} already exists$") as taken:
        await storage.create_saga(ID, "order", {})
    assert isinstance(taken.value.__cause__, SagaAlreadyExistsError)
    with pytest.raises(CqrsConcurrencyError, match="version 1, not at the expected version 2") as conflict:
        await storage.update_context(ID, {}, 2)
    assert isinstance(conflict.value.__cause__, saga_store.SagaConcurrencyError)


async def test_other_errors_pass(new_storage: NewStorage) -> None:
    """Errors that python-cqrs has no word for are the storage's own."""
    storage = CqrsSagaStorage(new_storage())
    with pytest.raises(InvalidSagaDataError, match=r"context\['price'\]"):
        await storage.create_saga(ID, "order", {"price": float("nan")})


async def test_an_archived_saga_does_not_begin_again(
    new_storage: NewStorage, new_adapter: NewAdapter, world: World
) -> None:
    """What the engine doesn't find it would begin; of an archived saga it hears that, and calls no step."""
    ours = new_storage()
    shop = Shop(world, new_adapter)
    await shop.run(ID)
    done, before = list(world.calls), await ours.get_step_history(ID)
    assert isinstance(ours, IRetentionStorage)
    archive, mark = await ours.begin_archive(uuid.uuid4(), uri="file:///archive", by="me"), await ours.get_saga(ID)
    await ours.verify_archive(archive.id, sha256=None, sagas=1, entries=len(before), bytes=1, watermark=None)
    made = await ours.make_stubs(archive.id, [SagaMark(ID, mark.version, len(before), before[-1].id)])
    assert list(made.made) == [ID]
    with pytest.raises(SagaArchivedError):
        await Shop(world, new_adapter).run(ID)
    assert world.calls == done
    adapter = CqrsSagaStorage(ours)
    with pytest.raises(ValueError, match=f"^Saga {ID} already exists$"):
        await adapter.create_saga(ID, "order", {})
    assert await adapter.get_sagas_for_recovery(10) == []


async def test_concurrent_increments(new_storage: NewStorage) -> None:
    """Attempts counted at the same time are all counted."""
    ours = new_storage()
    storage = CqrsSagaStorage(ours)
    await storage.create_saga(ID, "order", {})
    await asyncio.gather(*(storage.increment_recovery_attempts(ID) for _ in range(8)))
    assert (await ours.get_saga(ID)).recovery_attempts == 8


async def test_recovery_order() -> None:
    """The page is ordered by the last change; who is on it, by the number of attempts."""
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    ours = MemorySagaStorage(MemoryDatabase(clock=lambda: now))
    storage = CqrsSagaStorage(ours)
    tried, fresh, freshest = (uuid.UUID(int=number) for number in (1, 2, 3))
    for saga_id in (tried, fresh, freshest):
        await storage.create_saga(saga_id, "order", {})
        await storage.set_recovery_attempts(saga_id, 1 if saga_id == tried else 0)
        now += dt.timedelta(seconds=10)
    assert await storage.get_sagas_for_recovery(3) == [tried, fresh, freshest]
    assert await storage.get_sagas_for_recovery(2) == [fresh, freshest]
    assert await storage.get_sagas_for_recovery(3, stale_after_seconds=20) == [tried, fresh]


@pytest.mark.parametrize(
    ("context", "stored"),
    [
        ({"a": (1, (2, [3, (4,)]))}, {"a": [1, [2, [3, [4]]]]}),
        ({"a": {1: {2.5: "x"}}}, {"a": {"1": {"2.5": "x"}}}),
        ({"a": {1: 0, 2.5: 0, False: 0}}, {"a": {"1": 0, "2.5": 0, "false": 0}}),
        ({"a": {}, "b": [], "c": ()}, {"a": {}, "b": [], "c": []}),
    ],
)
async def test_json_form(context: dict[str, Any], stored: dict[str, Any], new_storage: NewStorage) -> None:
    """Tuples are stored as lists and scalar keys as strings; the caller's own dict is left alone."""
    storage = CqrsSagaStorage(new_storage())
    before = repr(context)
    await storage.create_saga(ID, "order", context)
    assert (await storage.load_saga_state(ID))[1] == stored
    await storage.update_context(ID, context)
    assert (await storage.load_saga_state(ID))[1] == stored
    assert repr(context) == before


def _nested(depth: int) -> dict[str, Any]:
    context: dict[str, Any] = {}
    for _ in range(depth):
        context = {"a": context}
    return context


@pytest.mark.parametrize(
    ("context", "path"),
    [
        ({"a": {1: "x", "1": "y"}}, r"context\['a'\]"),
        ({"a": [{1, 2}]}, r"context\['a'\]\[0\]"),
        ({"a": (b"bytes",)}, r"context\['a'\]\[0\]"),
        (_nested(5000), "levels deep"),
        ("not a dict", "must be a dict"),
    ],
    ids=["keys that would collide", "set", "bytes", "too deep", "no dict"],
)
async def test_contexts_refused(context: dict[str, Any], path: str) -> None:
    """What JSON can't hold is refused by its path, as the storage below would."""
    with pytest.raises(InvalidSagaDataError, match=path):
        await CqrsSagaStorage(MemorySagaStorage()).create_saga(ID, "order", context)


def test_no_scoped_runs() -> None:
    """Over a storage that has no runs the engine writes through the storage itself, which commits each call."""
    theirs: ICheckpointStorage = create_autospec(ICheckpointStorage, instance=True)
    with pytest.raises(NotImplementedError, match="has no runs"):
        CqrsSagaStorage(theirs).create_run()


async def test_page(database: Database, world: World, saga_id: uuid.UUID, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs on the documentation's page run as they stand."""
    page = (Path(__file__).parent.parent / "docs" / "cqrs.md").read_text()
    names: dict[str, Any] = {
        "container": WorldContainer(world),
        "saga_id": saga_id,
        "OrderContext": OrderContext,
        "OrderSaga": OrderSaga,
    }
    for program in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        code = re.sub(r"postgresql\+asyncpg://[^\"]+", database.url("asyncpg"), program)
        running = eval(compile(code, "cqrs.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)  # noqa: S307 - our own page
        if inspect.isawaitable(running):
            await running
    await names["engine"].dispose()
    assert capsys.readouterr().out == "Reserve\nPay\nShip\n"
    assert names["interrupted"] == []


def _python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_python_cqrs() -> None:
    """Without python-cqrs the import says what to install."""
    process = _python("import sys; sys.modules['cqrs'] = None; import saga_store.cqrs")
    assert process.stderr.splitlines()[-1].endswith("saga_store.cqrs needs python-cqrs 5: pip install saga-store[cqrs]")


def test_import_is_light() -> None:
    """The adapter over the memory storage loads no SQLAlchemy."""
    process = _python("import sys, saga_store.cqrs; sys.exit('sqlalchemy' in sys.modules)")
    assert process.returncode == 0, process.stderr
