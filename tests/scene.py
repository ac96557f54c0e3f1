"""A saga, a storage that reaches the database through a proxy, and another worker that reaches it directly."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from saga_store import Checkpoint, LogStep, SagaExecution, SagaNotFoundError, SagaStepStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.repository import RETRY_FOR
from tests.connections import engine_on
from tests.databases import Database
from tests.proxy import Cut, Proxy

# More than the five executions after which psycopg prepares a statement: from then on each is one round trip.
WARM_UP = 8
# For tests in which trying again has to succeed, however slow the machine is.
PATIENT = timedelta(seconds=60)
# For tests in which no attempt can succeed.
BRIEFLY = timedelta(seconds=0.2)
NEVER = timedelta(0)


def step(name: str) -> LogStep:
    return LogStep(name, "act", SagaStepStatus.COMPLETED)


@dataclass
class Scene:
    """``storage`` goes through ``proxy``; ``other`` doesn't, and is both another worker and the truth."""

    proxy: Proxy
    engine: AsyncEngine
    direct: AsyncEngine
    storage: SqlAlchemySagaStorage
    other: SqlAlchemySagaStorage
    saga_id: UUID

    @classmethod
    @asynccontextmanager
    async def on(
        cls,
        database: Database,
        driver: str,
        *,
        bind: str = "engine",
        group_commit: bool = True,
        retry_for: timedelta = RETRY_FOR,
    ) -> AsyncIterator["Scene"]:
        async with (
            Proxy.before(database.url(driver)) as (proxy, url),
            engine_on(url) as engine,
            engine_on(database.url(driver)) as direct,
        ):
            target = engine if bind == "engine" else async_sessionmaker(engine)
            storage = SqlAlchemySagaStorage(target, group_commit=group_commit, retry_for=retry_for)
            scene = cls(proxy, engine, direct, storage, SqlAlchemySagaStorage(direct), uuid4())
            await scene.other.create_saga(scene.saga_id, "order", {"n": 0})
            await scene.warm_up(storage)
            yield scene

    async def warm_up(self, storage: SqlAlchemySagaStorage) -> None:
        """Have the driver look up all types that it doesn't know: what it executes for that counts, too."""
        with suppress(SagaNotFoundError):
            await storage.log_step(uuid4(), "nowhere", "act", SagaStepStatus.STARTED)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        for _ in range(WARM_UP):
            await storage.log_step(saga_id, "warm", "act", SagaStepStatus.STARTED)

    async def saga(self) -> SagaExecution:
        return await self.other.get_saga(self.saga_id)

    async def steps(self) -> list[str]:
        return [entry.step_name for entry in await self.other.get_step_history(self.saga_id)]

    async def lose(self, cut: Cut, write: Awaitable[object], *, let_pass: int = 0) -> "asyncio.Task[object]":
        """Have the write's answer lost, and keep the storage from connecting again before the gate is opened."""
        self.proxy.let_pass, self.proxy.cut = let_pass, cut
        self.proxy.gate.clear()
        connections = self.proxy.connections
        task = asyncio.ensure_future(write)
        await until(lambda: self.proxy.cut is None and self.proxy.connections > connections)
        return task

    async def write_meanwhile(self, times: int, *, versioned: bool = True, changes: bool = True) -> None:
        for number in range(times):
            version = (await self.saga()).version
            await self.other.save(
                Checkpoint(
                    self.saga_id,
                    context={"meanwhile": number} if changes else None,
                    steps=[step("theirs")],
                    expected_version=version if versioned else None,
                )
            )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await _a_moment()


async def _a_moment() -> None:
    await asyncio.sleep(0.001)


Write = Callable[[Scene], Awaitable[object]]


async def change(scene: Scene) -> int:
    return await scene.storage.save(
        Checkpoint(scene.saga_id, context={"n": 1}, steps=[step("mine")], expected_version=1)
    )


async def log(scene: Scene) -> int:
    return await scene.storage.save(Checkpoint(scene.saga_id, steps=[step("mine")], expected_version=1))
