"""The two worlds that are compared: the twin, and the storage under test, each with its units and its clock."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias
from uuid import UUID, uuid4

from saga_store.errors import SagaNotFoundError
from saga_store.memory import MemoryDatabase, MemorySagaStorage, MemorySession
from saga_store.model import Checkpoint, SagaExecution, SagaLogEntry, SagaStatus
from saga_store.retention_model import SagaRecord
from saga_store.storage import SagaStorage
from saga_store.testing.claim import Age
from saga_store.testing.commit_into import Joinable
from saga_store.testing.differential.comparison import Eyes
from saga_store.testing.transaction import Transaction

Unit: TypeAlias = tuple[SagaStorage, Transaction | None]
"""A storage, and the transaction that it joins, if it joins one."""

Opener: TypeAlias = Callable[[], AbstractAsyncContextManager[Unit]]
"""Opens a unit that stays open for a whole schedule."""

ACTORS = 2


class World:
    """One of the two, for one schedule.

    Args:
        units: Those that act.
        observer: One that only reads, and sees what is committed.
        age: Moves a saga back in time.
        eyes: Tell what a result says, without its times, which no other world shares.
        joinable: Opens a transaction that a run may commit into.
    """

    def __init__(
        self, units: Sequence[Unit], observer: Unit, age: Age, eyes: Eyes, joinable: Joinable | None = None
    ) -> None:
        self.eyes: Final = eyes
        self._units = units
        self._observer = observer
        self._age = age
        self._joinable = joinable
        self._changed: dict[UUID, datetime] = {}
        self.records: Final = dict[UUID, SagaRecord]()  # of sagas that were let go

    def storage(self, who: int) -> SagaStorage:
        return self._units[who][0]

    def joinable(self) -> AbstractAsyncContextManager[Transaction]:
        assert self._joinable is not None
        return self._joinable()

    async def commit(self, who: int) -> None:
        if transaction := self._units[who][1]:
            await transaction.commit()

    async def roll_back(self, who: int) -> None:
        if transaction := self._units[who][1]:
            await transaction.rollback()

    async def make_older(self, saga_id: UUID, by: timedelta) -> None:
        await self._age(saga_id, by)
        if saga_id in self._changed:
            self._changed[saga_id] -= by

    async def is_committed(self, saga_id: UUID) -> bool:
        try:
            await self._observer[0].get_saga(saga_id)
        except SagaNotFoundError:
            return False
        return True

    async def look_as(self, who: int, saga_id: UUID) -> object:
        """Return what somebody sees of a saga who may have written what isn't committed yet."""
        return await everything_of(self.storage(who), saga_id)

    async def look(self, saga_id: UUID) -> object:
        """Return what is committed of a saga, and whether it has changed since the last look."""
        saga, *rest = await everything_of(self._observer[0], saga_id)
        before = self._changed.get(saga_id, saga.updated_at)
        self._changed[saga_id] = saga.updated_at
        return saga, *rest, _direction(before, saga.updated_at)

    async def populate(self, names: Mapping[UUID, str]) -> None:
        for saga_id, name in names.items():
            await self.storage(0).create_saga(saga_id, name, {})
        await self.commit(0)

    async def finish(self, saga_ids: Sequence[UUID]) -> None:
        """Leave nothing behind that a later schedule would claim."""
        for saga_id in saga_ids:
            await self.storage(0).update_status(saga_id, SagaStatus.COMPLETED)
        await self.commit(0)


async def everything_of(storage: SagaStorage, saga_id: UUID) -> tuple[SagaExecution, list[SagaLogEntry], list[int]]:
    """Return a saga's row, its history, and which of its entries are in doubt."""
    saga, history = await storage.get_saga(saga_id), await storage.get_step_history(saga_id)
    return saga, history, [history.index(entry) for entry in await storage.get_in_doubt_steps(saga_id)]


def _direction(before: datetime, after: datetime) -> str:
    if before == after:
        return "changed at the same time as when it was last seen"
    return "changed since it was last seen" if after > before else "changed before it was last seen"


@asynccontextmanager
async def world(
    opener: Opener, age: Age, names: Mapping[UUID, str], joinable: Joinable | None = None
) -> AsyncIterator[World]:
    """Open a world for the sagas that ``names`` has."""
    async with AsyncExitStack() as stack:
        observer, *units = [await stack.enter_async_context(opener()) for _ in range(ACTORS + 1)]
        yield World(units, observer, age, Eyes(names, epoch=await _now(observer)), joinable)


async def _now(unit: Unit) -> datetime:
    """Read the database's clock, from a saga that is finished as soon as it is created."""
    storage, transaction = unit
    saga_id = uuid4()
    await storage.save(Checkpoint(saga_id, name="now", status=SagaStatus.COMPLETED))
    now = (await storage.get_saga(saga_id)).created_at
    if transaction is not None:
        await transaction.rollback()
    return now


class Twin:
    """A new twin, to be opened as a world.

    Args:
        joins: Whether its units are transactions of the caller's.
    """

    def __init__(self, *, joins: bool) -> None:
        self._database = MemoryDatabase(clock=TwinClock())
        self._joins = joins

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Unit]:
        if self._joins:
            async with MemorySession(self._database) as session:
                yield MemorySagaStorage(session), session
        else:
            yield MemorySagaStorage(self._database), None

    def joinable(self) -> MemorySession:
        return MemorySession(self._database)

    async def age(self, saga_id: UUID, by: timedelta) -> None:
        self._database.age(saga_id, by)


class TwinClock:
    """The time of day, later at every look: as it is for statements that travel to a server one after the other."""

    def __init__(self) -> None:
        self._last = datetime.min.replace(tzinfo=UTC)

    def __call__(self) -> datetime:
        self._last = max(datetime.now(UTC), self._last + timedelta(microseconds=1))
        return self._last
