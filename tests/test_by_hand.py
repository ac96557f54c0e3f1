"""examples/by_hand dies at every point where it may: before and after each write, each commit and each effect.

What is killed is a process, so nothing of it works any more: whatever it still tries raises, and its lease stays until
it expires. Then another one takes the saga up, and may die as well.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, groupby
from typing import Any
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.by_hand.runner import RefusedError, Saga, Step
from saga_store import (
    Context,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLogEntry,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    StepAction,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.write import Write
from tests.extent import stride

LEASE = timedelta(hours=1)
NOW = timedelta(0)
EXPIRE = """
UPDATE saga_executions SET lease_expires_at = now() - interval '1 second' WHERE id = %s AND lease_owner IS NOT NULL
"""
ROWS = "CREATE TABLE own_rows (saga_id uuid, step text, action text)"
STARTED, COMPLETED, FAILED, COMPENSATED = SagaStepStatus


class KilledError(BaseException):
    """The process is gone."""


class Process:
    """One that dies when it has come to so many points, and then does nothing any more."""

    def __init__(self, dies_at: int | None = None) -> None:
        self._points = count()
        self._dies_at = dies_at
        self.is_dead = False

    def point(self) -> None:
        self.is_dead = self.is_dead or next(self._points) == self._dies_at
        if self.is_dead:
            raise KilledError


class Mortal:
    """Writes that are points, before and after."""

    process: Process

    async def _write(self, write: Write) -> int:
        self.process.point()
        version = await super()._write(write)  # type: ignore[misc] # of the storage beside it
        self.process.point()
        return int(version)


class MortalMemoryStorage(Mortal, MemorySagaStorage):
    pass


class MortalSqlStorage(Mortal, SqlAlchemySagaStorage):
    pass


@dataclass
class Place:
    """Where sagas are kept: a storage for each process, its transactions, and what time does to leases."""

    storage: Callable[[Process], SagaStorage]
    transaction: Callable[[], AbstractAsyncContextManager[Any]]
    write_row: Callable[[Any, UUID, str, str], Any]
    rows: Callable[[UUID], Any]
    expire: Callable[[UUID], None]


def memory() -> Place:
    database = MemoryDatabase()

    def storage(process: Process) -> SagaStorage:
        made = MortalMemoryStorage(database)
        made.process = process
        return made

    @asynccontextmanager
    async def transaction() -> AsyncIterator[MemorySession]:
        async with MemorySession(database) as session:
            yield session
            await session.commit()

    # The twin keeps nothing but sagas, so rows of one's own are sagas there: a second one would be refused.
    async def write_row(session: MemorySession, saga_id: UUID, step: str, action: str) -> None:
        await MemorySagaStorage(session).create_saga(uuid5(saga_id, step + action), "row", {})

    async def rows(saga_id: UUID) -> list[tuple[str, str]]:
        found = []
        for step in ("Reserve", "Pay", "Ship"):
            for action in ("act", "compensate"):
                with suppress(SagaNotFoundError):
                    await MemorySagaStorage(database).get_saga(uuid5(saga_id, step + action))
                    found.append((step, action))
        return found

    return Place(storage, transaction, write_row, rows, lambda saga_id: database.age(saga_id, 2 * LEASE))


def postgres(engine: AsyncEngine, admin: psycopg.Connection) -> Place:
    admin.execute(ROWS)

    def storage(process: Process) -> SagaStorage:
        made = MortalSqlStorage(engine)
        made.process = process
        return made

    @asynccontextmanager
    async def transaction() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session, session.begin():
            yield session

    async def write_row(session: AsyncSession, saga_id: UUID, step: str, action: str) -> None:
        values = {"saga_id": saga_id, "step": step, "action": action}
        await session.execute(text("INSERT INTO own_rows VALUES (:saga_id, :step, :action)"), values)

    async def rows(saga_id: UUID) -> list[tuple[str, str]]:
        return admin.execute("SELECT step, action FROM own_rows WHERE saga_id = %s", [saga_id]).fetchall()

    def expire(saga_id: UUID) -> None:
        admin.execute(EXPIRE, [saga_id])

    return Place(storage, transaction, write_row, rows, expire)


@pytest.fixture(params=["memory", "asyncpg", "psycopg"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "memory":
        return memory()
    make_engine = request.getfixturevalue("make_engine")
    return postgres(make_engine(request.param), request.getfixturevalue("admin"))


@dataclass
class World:
    """What steps have done elsewhere, for each key once; a process may die before and after."""

    refuses: str | None = None
    forgets_keys: bool = False
    done: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)

    def do(self, process: Process, step: str) -> None:
        process.point()
        if step == self.refuses:
            raise RefusedError(f"no {step} today")
        if step not in self.done or self.forgets_keys:
            self.done.append(step)
        process.point()

    def undo(self, process: Process, step: str) -> None:
        process.point()
        if step not in self.undone or self.forgets_keys:
            self.undone.append(step)
        process.point()


class WorldStep(Step):
    """One that does something elsewhere, and writes a row of its own."""

    def __init__(self, world: World, process: Process, place: Place) -> None:
        self._world, self._process, self._place = world, process, place

    async def act(self, saga_id: UUID, context: Context) -> Context:
        self._world.do(self._process, self.name)
        return {self.name: "done"}

    async def undo(self, saga_id: UUID, context: Context) -> None:
        self._world.undo(self._process, self.name)

    async def record(self, session: Any, action: StepAction, saga_id: UUID, context: Context) -> None:  # noqa: ANN401 - of either kind
        assert action == "compensate" or context[self.name] == "done"
        await self._place.write_row(session, saga_id, self.name, action)


class Reserve(WorldStep):
    pass


class Pay(WorldStep):
    pass


class Ship(WorldStep):
    pass


class LookingPay(Pay):
    """One whose service knows no keys, and can be asked."""

    @property
    def name(self) -> str:
        return "Pay"

    async def find_out(self, saga_id: UUID, context: Context) -> Context | None:
        return {self.name: "done"} if self.name in self._world.done else None


async def live(place: Place, world: World, saga_id: UUID, process: Process, pay: type[WorldStep] = Pay) -> None:
    """Be a process that starts the saga, or takes it up where another one has left it; it may die."""

    @asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        async with place.transaction() as session:
            yield session
            process.point()
        process.point()

    saga = Saga([step(world, process, place) for step in (Reserve, pay, Ship)], transaction)
    storage = place.storage(process)
    owner = f"worker {uuid4()}"
    with suppress(KilledError):
        async with storage.run(saga_id, owner=owner, lease=LEASE, write_ahead=True) as run:
            try:
                await run.load_saga_state(saga_id)
            except SagaNotFoundError:
                await run.create_saga(saga_id, "order", {})
                await run.commit()
            await saga.see_through(run)
    if process.is_dead:
        with suppress(SagaNotFoundError):
            check_at_death(await place.storage(Process()).get_step_history(saga_id), world)
            place.expire(saga_id)


def check_at_death(history: Sequence[SagaLogEntry], world: World) -> None:
    """Nothing has been done, or undone, of which the history doesn't know that it was begun."""
    begun = {(entry.step_name, entry.action) for entry in history}
    assert {(step, "act") for step in world.done} | {(step, "compensate") for step in world.undone} <= begun


Told = list[tuple[str, str, SagaStepStatus]]
ACTS: Told = [(step, "act", status) for step in ("Reserve", "Pay", "Ship") for status in (STARTED, COMPLETED)]
NO_PARCEL: Told = [
    *ACTS[:-1],
    ("Ship", "act", FAILED),
    *((step, "compensate", status) for step in ("Pay", "Reserve") for status in (STARTED, COMPENSATED)),
]
NO_GOODS: Told = [("Reserve", "act", STARTED), ("Reserve", "act", FAILED)]
STORIES: dict[str | None, tuple[SagaStatus, Told]] = {
    None: (SagaStatus.COMPLETED, ACTS),
    "Ship": (SagaStatus.FAILED, NO_PARCEL),
    "Reserve": (SagaStatus.FAILED, NO_GOODS),
}


async def check(place: Place, world: World, saga_id: UUID) -> None:
    """What was done, was done once, or undone once; the history tells it, and nothing else."""
    status, told = STORIES[world.refuses]
    storage = place.storage(Process())
    saga = await storage.get_saga(saga_id)
    history = [(entry.step_name, entry.action, entry.status) for entry in await storage.get_step_history(saga_id)]
    assert (saga.status, saga.lease_owner) == (status, None)
    assert [entry for entry, _ in groupby(history)] == told  # what was begun once more in a row is told once more
    assert await storage.get_in_doubt_steps(saga_id) == []
    ends = [(step, action) for step, action, end in told if end in {COMPLETED, COMPENSATED}]
    assert sorted(await place.rows(saga_id)) == sorted(ends)
    assert world.done == [step for step, action in ends if action == "act"]
    assert world.undone == [step for step, action in ends if action == "compensate"]
    assert saga.context == dict.fromkeys(world.done, "done")


@pytest.mark.parametrize("refuses", STORIES, ids=str)
async def test_it_dies_anywhere_once(place: Place, refuses: str | None) -> None:
    """Another process takes the saga up, and it ends as if nobody had died."""
    points, is_over = 0, False
    while not is_over:
        saga_id, world, process = uuid4(), World(refuses), Process(points)
        await live(place, world, saga_id, process)
        await live(place, world, saga_id, Process())
        await check(place, world, saga_id)
        is_over, points = not process.is_dead, points + 1
    assert points > 3 * len(STORIES[refuses][1])


@pytest.mark.parametrize("refuses", STORIES, ids=str)
async def test_it_dies_anywhere_twice(place: Place, refuses: str | None) -> None:
    """The process that takes the saga up dies as well, anywhere."""
    is_over = False
    first = 0
    while not is_over:
        second, second_is_over = 0, False
        while not second_is_over:
            saga_id, world = uuid4(), World(refuses)
            processes = Process(first), Process(second), Process()
            for process in processes:
                await live(place, world, saga_id, process)
            await check(place, world, saga_id)
            is_over, second_is_over = not processes[0].is_dead, not processes[1].is_dead
            second += stride(12)
        first += stride(12)


async def test_a_service_without_keys_is_asked(place: Place) -> None:
    """A payment in doubt is looked for, and taken again only if it isn't there."""
    points, is_over = 0, False
    while not is_over:
        saga_id, world, process = uuid4(), World(forgets_keys=True), Process(points)
        for one in (process, Process()):
            await live(place, world, saga_id, one, LookingPay)
        is_over, points = not process.is_dead, points + 1
        assert world.done.count("Pay") == 1
        assert (await place.storage(Process()).get_saga(saga_id)).status is SagaStatus.COMPLETED


class OutageError(Exception):
    """A service doesn't answer."""


async def test_whatever_else_is_raised_leaves_the_saga_to_be_taken_up(place: Place) -> None:
    """An outage says nothing of what was done: the step is in doubt, nothing is undone, and later it is done once."""

    class Silent(Pay):
        @property
        def name(self) -> str:
            return "Pay"

        async def act(self, saga_id: UUID, context: Context) -> Context:
            await super().act(saga_id, context)
            raise OutageError

    saga_id, world = uuid4(), World()
    with pytest.raises(OutageError):
        await live(place, world, saga_id, Process(), Silent)
    storage = place.storage(Process())
    saga = await storage.get_saga(saga_id)
    assert (saga.status, saga.lease_owner) == (SagaStatus.RUNNING, None)
    assert [entry.step_name for entry in await storage.get_in_doubt_steps(saga_id)] == ["Pay"]
    await live(place, world, saga_id, Process())
    await check(place, world, saga_id)


async def test_a_process_that_was_away_for_too_long_writes_nothing(place: Place) -> None:
    """Another one has got its saga meanwhile, and seen it through; its version is the fence.

    On the twin its own row, which is a saga there, is in its way before.
    """

    class Slow(Pay):
        @property
        def name(self) -> str:
            return "Pay"

        async def act(self, saga_id: UUID, context: Context) -> Context:
            done = await super().act(saga_id, context)
            place.expire(saga_id)
            await live(place, world, saga_id, Process())
            return done

    saga_id, world = uuid4(), World()
    with pytest.raises((SagaConcurrencyError, SagaAlreadyExistsError)):
        await live(place, world, saga_id, Process(), Slow)
    await check(place, world, saga_id)


async def test_what_is_in_doubt_on_the_way_back_is_undone(place: Place) -> None:
    """Whether it was done nobody knows, and ``undo`` has to see to it that it isn't, and won't be."""
    saga_id, world = uuid4(), World()
    storage = place.storage(Process())
    await storage.create_saga(saga_id, "order", {})
    for step, status in (("Reserve", STARTED), ("Reserve", COMPLETED), ("Pay", STARTED)):
        await storage.log_step(saga_id, step, "act", status)
    await storage.update_status(saga_id, SagaStatus.COMPENSATING)
    await live(place, world, saga_id, Process())
    assert world.undone == ["Pay", "Reserve"]
    assert (await storage.get_saga(saga_id)).status is SagaStatus.FAILED


@pytest.mark.parametrize(
    ("settled", "done", "undone"), [(COMPLETED, [], 0), (FAILED, ["Pay"], 0), (COMPENSATED, ["Pay"], 0)]
)
async def test_it_goes_by_what_a_person_has_settled(
    place: Place, settled: SagaStepStatus, done: list[str], undone: int
) -> None:
    """COMPLETED isn't done again; what FAILED, or was undone by hand, is begun anew."""
    saga_id, world = uuid4(), World()
    storage = place.storage(Process())
    await storage.create_saga(saga_id, "order", {})
    await storage.log_step(saga_id, "Pay", "act", STARTED)
    await storage.update_status(saga_id, SagaStatus.RUNNING)
    [entry] = await storage.get_in_doubt_steps(saga_id)
    await storage.settle_step(saga_id, entry.id, settled, by="alice", reason="the bank says so")
    await live(place, world, saga_id, Process())
    assert world.done == ["Reserve", *done, "Ship"]
    assert len(world.undone) == undone
    assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED


async def test_a_finished_saga_is_left_alone(place: Place) -> None:
    """Whoever hands it in once more changes nothing."""
    saga_id, world = uuid4(), World()
    await live(place, world, saga_id, Process())
    before = await place.storage(Process()).get_step_history(saga_id)
    await live(place, world, saga_id, Process())
    assert await place.storage(Process()).get_step_history(saga_id) == before
    await check(place, world, saga_id)
