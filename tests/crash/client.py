"""A client process: many tasks that write through one storage until SIGTERM, or SIGKILL.

python -m tests.crash.client '{"urls": [...], "driver": "asyncpg", ...}'. SIGUSR1 takes all connections out of its pools
for a while.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from tests.crash.journal import Journal
from tests.crash.workload import Client, OwnSaga, SharedSagas

POOL_SIZE = 6
POOL_TIMEOUT_SECONDS = 0.2
DRY_SECONDS = 0.6
SHARED_SHARE = 0.35
WRITES_PER_SAGA = (5, 25)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a client is told on its command line."""

    name: str
    urls: list[str]
    journal: str
    driver: str
    bind: str
    group_commit: bool
    tasks: int
    seed: str


async def write(client: Client, rng: random.Random, stopping: asyncio.Event) -> None:
    shared = SharedSagas(client, rng)
    while not stopping.is_set():
        own = OwnSaga(client, rng, UUID(int=rng.getrandbits(128), version=4))
        if not await own.create():
            continue
        for _ in range(rng.randint(*WRITES_PER_SAGA)):
            if stopping.is_set():
                break
            await (shared.write() if rng.random() < SHARED_SHARE else own.write())


async def run_pools_dry(engines: Sequence[AsyncEngine]) -> None:
    await asyncio.gather(*map(run_pool_dry, engines))


async def run_pool_dry(engine: AsyncEngine) -> None:
    """Borrow whatever there is, until nobody else gets any, and give it back after a while."""
    async with AsyncExitStack() as held:
        try:
            while True:
                await held.enter_async_context(engine.connect())
        except (PoolTimeoutError, DBAPIError, OSError):
            await asyncio.sleep(DRY_SECONDS)


async def main(setup: Setup) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    # Standard input is a pipe from the one who started this process: when that is killed, so is this.
    loop.add_reader(sys.stdin, os._exit, 1)
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    async with opened(setup) as engines, asyncio.TaskGroup() as tasks:
        storage = storage_on(engines, setup)
        client = Client(storage, engines, Journal(Path(setup.journal)), setup.name, ordered=setup.group_commit)
        loop.add_signal_handler(signal.SIGUSR1, lambda: tasks.create_task(run_pools_dry(engines)))
        for number in range(setup.tasks):
            tasks.create_task(write(client, random.Random(f"{setup.seed}/{number}"), stopping))  # noqa: S311 - repeatable


def storage_on(engines: Sequence[AsyncEngine], setup: Setup) -> SagaStorage:
    shards = [
        SqlAlchemySagaStorage(
            engine if setup.bind == "engine" else async_sessionmaker(engine), group_commit=setup.group_commit
        )
        for engine in engines
    ]
    return ShardedSagaStorage(shards) if len(shards) > 1 else shards[0]


@asynccontextmanager
async def opened(setup: Setup) -> AsyncIterator[list[AsyncEngine]]:
    engines = [
        create_async_engine(
            make_url(url).set(drivername=f"postgresql+{setup.driver}"),
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_SECONDS,
        )
        for url in setup.urls
    ]
    try:
        yield engines
    finally:
        for engine in engines:
            await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(Setup(**json.loads(sys.argv[1]))))
