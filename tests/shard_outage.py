"""One server of several is SIGKILLed under load, is away for a while, and comes back: what its sagas and others notice.

python -m tests.shard_outage [--servers N] [--seconds S] [--callers N]

Callers run sagas by fenced commits and leave each before its last step; a recovery worker finishes what they leave. So
claims have work all the time, and each step is in a history once, however often its caller and the worker meet.
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import (
    SagaConcurrencyError,
    SagaLeasedError,
    SagaRun,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    schema,
)
from saga_store.recovery import RecoveryWorker
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres import RestartableServer, restartable

STEPS = ("reserve", "pay", "ship")
MOMENT = timedelta(seconds=0.2)
PAUSE_SECONDS = 0.02
LOADED_SECONDS = 1.0
PATIENCE_SECONDS = 120
HISTORIES = """
SELECT s.id, s.status, array_agg(l.step_name ORDER BY l.id) FILTER (WHERE l.id IS NOT NULL)
FROM saga_executions s LEFT JOIN saga_logs l ON l.saga_id = s.id GROUP BY s.id
"""


async def finish(run: SagaRun) -> None:
    """Do the steps that the saga's caller, or an attempt before, hasn't done."""
    done = {entry.step_name for entry in await run.get_step_history(run.saga_id)}
    for step in STEPS:
        if step not in done:
            await run.log_step(run.saga_id, step, "act", SagaStepStatus.COMPLETED)
    await run.update_status(run.saga_id, SagaStatus.COMPLETED)
    await run.commit()


@dataclass(slots=True)
class Heard:
    """What callers of one shard's sagas heard: in seconds, how long each call took that went through, and errors.

    ``overtaken`` counts sagas that the worker took from their callers, which is nobody's fault.
    """

    calls: list[tuple[float, float]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    overtaken: int = 0

    def slowest(self, since: float, until: float) -> float:
        """Return the longest of the calls that ended in between."""
        return max((took for ended, took in self.calls if since <= ended < until), default=0.0)

    def ended(self, since: float, until: float) -> int:
        return sum(since <= ended < until for ended, _ in self.calls)


class Load:
    """Callers of sagas in all shards; it keeps what each of them was promised."""

    def __init__(self, storage: ShardedSagaStorage) -> None:
        self._storage = storage
        self.heard = [Heard() for _ in storage.shards]
        self.created: set[UUID] = set()
        self.logged: set[tuple[UUID, str]] = set()
        self.is_over = False

    async def call(self) -> None:
        while not self.is_over:
            saga_id = uuid4()
            heard = self.heard[self._storage.shard_of(saga_id)]
            try:
                async with self._storage.run(saga_id) as run:
                    await run.create_saga(saga_id, "order", {})
                    await self._commit(run, heard)
                    self.created.add(saga_id)
                    for step in STEPS[:-1]:
                        await run.log_step(saga_id, step, "act", SagaStepStatus.COMPLETED)
                        await self._commit(run, heard)
                        self.logged.add((saga_id, step))
            except (SagaConcurrencyError, SagaLeasedError):
                heard.overtaken += 1
            except SagaStoreError as exc:
                heard.errors[type(exc).__name__] += 1
            await asyncio.sleep(PAUSE_SECONDS)

    @staticmethod
    async def _commit(run: SagaRun, heard: Heard) -> None:
        began = time.monotonic()
        try:
            await run.commit()
        except BaseException:
            await run.rollback()
            raise
        ended = time.monotonic()
        heard.calls.append((ended, ended - began))


@dataclass(slots=True)
class Outcome:
    """What came of it; times are in seconds.

    Attributes:
        shard: The one whose server was killed.
        heard: What callers heard, by shard.
        killed: When it was killed, on the clock of ``heard``; likewise the next two.
        started: When it was started again.
        recovered: When all sagas were finished.
        completed_meanwhile: How many sagas elsewhere the worker claimed and finished while it was away.
        missing: What lists said was missing meanwhile.
        wrong: Sagas that aren't what their callers were promised, and why.
        sagas: How many there are in the end.
    """

    shard: int
    heard: Sequence[Heard]
    killed: float = 0.0
    started: float = 0.0
    recovered: float = 0.0
    completed_meanwhile: int = 0
    missing: tuple[int, ...] = ()
    wrong: list[str] = field(default_factory=list)
    sagas: int = 0

    @property
    def failed_elsewhere(self) -> Counter[str]:
        return sum((heard.errors for index, heard in enumerate(self.heard) if index != self.shard), Counter())

    @property
    def failed_there(self) -> Counter[str]:
        return self.heard[self.shard].errors

    @property
    def lines(self) -> list[str]:
        others = [heard for index, heard in enumerate(self.heard) if index != self.shard]
        away = self.started - self.killed
        first = min((ended for ended, _ in self.heard[self.shard].calls if ended >= self.started), default=None)
        before = max(heard.slowest(0, self.killed) for heard in others)
        meanwhile = max(heard.slowest(self.killed, self.started) for heard in others)
        calls = sum(heard.ended(self.killed, self.started) for heard in others)
        back = "never" if first is None else f"after {first - self.started:.1f} s"
        return [
            f"shard {self.shard} of {len(self.heard)} away for {away:.1f} s; {self.sagas:,} sagas in all",
            f"its sagas: {_told(self.failed_there)}; a call went through again {back}",
            f"others: {_told(self.failed_elsewhere)}; meanwhile {calls:,} calls, {self.completed_meanwhile:,} finished",
            f"their slowest call: {meanwhile * 1000:.0f} ms meanwhile, {before * 1000:.0f} ms before",
            f"all recovered {self.recovered - self.started:.1f} s after the return",
            f"taken over by the worker while their callers had them: {sum(heard.overtaken for heard in self.heard)}",
            f"not as promised: {len(self.wrong)}",
            *self.wrong[:10],
        ]


def _told(errors: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(errors.items())) or "0 failures"


async def outage(  # noqa: PLR0913 - what breaks, and how long it is waited for
    urls: Sequence[str], shard: int, server: RestartableServer, *, seconds: float, callers: int, retry_for: timedelta
) -> Outcome:
    """Kill the server of one shard under load, start it so many seconds later, and wait until all is recovered."""
    async with sharded(urls, retry_for) as storage:
        await storage.find_sagas(limit=1)
        load = Load(storage)
        outcome = Outcome(shard, load.heard)
        async with working(storage):
            calling = [asyncio.create_task(load.call()) for _ in range(callers)]
            await asyncio.sleep(LOADED_SECONDS)
            await asyncio.to_thread(server.kill)
            outcome.killed = time.monotonic()
            before = await asyncio.to_thread(_completed, urls, shard)
            await asyncio.sleep(seconds)
            outcome.missing = (await storage.find_sagas(limit=1)).missing
            outcome.completed_meanwhile = await asyncio.to_thread(_completed, urls, shard) - before
            outcome.started = time.monotonic()
            server.start()
            await asyncio.to_thread(server.wait_until_ready)
            await asyncio.sleep(LOADED_SECONDS)
            load.is_over = True
            await asyncio.gather(*calling)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (figures := await storage.get_figures()).unfinished or figures.missing:
                if time.monotonic() > deadline:
                    outcome.wrong.append(f"not recovered within {PATIENCE_SECONDS} s: {figures}")
                    break
                await asyncio.sleep(PAUSE_SECONDS)
            outcome.recovered = time.monotonic()
    outcome.sagas, wrong = await asyncio.to_thread(_compared, urls, load)
    outcome.wrong += wrong
    return outcome


@asynccontextmanager
async def sharded(urls: Sequence[str], retry_for: timedelta) -> AsyncIterator[ShardedSagaStorage]:
    async with AsyncExitStack() as stack:
        engines = [create_async_engine(make_url(url).set(drivername="postgresql+asyncpg")) for url in urls]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        yield ShardedSagaStorage([SqlAlchemySagaStorage(engine, retry_for=retry_for) for engine in engines])


@asynccontextmanager
async def working(storage: ShardedSagaStorage) -> AsyncIterator[None]:
    worker = RecoveryWorker(
        storage,
        {"order": finish},
        stale_after=MOMENT,
        lease=10 * MOMENT,
        backoff=MOMENT,
        max_backoff=MOMENT,
        max_attempts=10_000,
        poll_every=MOMENT / 4,
        concurrency=20,
    )
    recovering = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        await recovering


def _completed(urls: Sequence[str], shard: int) -> int:
    """Count what is completed in all shards but this one."""
    found = 0
    for url in (url for index, url in enumerate(urls) if index != shard):
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM saga_executions WHERE status = 'COMPLETED'").fetchone()
            found += row[0] if row else 0
    return found


def _compared(urls: Sequence[str], load: Load) -> tuple[int, list[str]]:
    """Return how many sagas there are, and which aren't what their callers were promised."""
    stored: dict[UUID, tuple[str, list[str]]] = {}
    wrong: list[str] = []
    for index, url in enumerate(urls):
        with psycopg.connect(url) as connection:
            for saga_id, status, steps in connection.execute(HISTORIES):
                if saga_id in stored:
                    wrong.append(f"{saga_id} is in shard {index} and in another one")
                stored[saga_id] = status, steps or []
    for saga_id, (status, steps) in stored.items():
        if status != "COMPLETED" or sorted(steps) != sorted(STEPS):
            wrong.append(f"{saga_id} is {status} with the steps {steps}")
    wrong += [f"{saga_id} was created, and isn't there" for saga_id in load.created - stored.keys()]
    wrong += [
        f"{step} of {saga_id} was logged, and isn't there"
        for saga_id, step in load.logged
        if step not in stored.get(saga_id, ("", []))[1]
    ]
    return len(stored), wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.shard_outage", description=__doc__)
    parser.add_argument("--servers", type=int, default=4, help="servers, each a shard (4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for how long one of them is away (30)")
    parser.add_argument("--callers", type=int, default=64, help="sagas at a time (64)")
    options = parser.parse_args()
    # Of a shard that is away, the storage and the worker tell in every line; the figures are what is wanted here.
    logging.getLogger("saga_store").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        servers = [stack.enter_context(restartable()) for _ in range(options.servers)]
        urls = [server.facts.url for server in servers]
        for url in urls:
            schema.upgrade(url.replace("postgresql://", "postgresql+psycopg://"))
        shard = random.randrange(options.servers)  # noqa: S311 - any of them
        outcome = asyncio.run(
            outage(
                urls,
                shard,
                servers[shard],
                seconds=options.seconds,
                callers=options.callers,
                retry_for=timedelta(seconds=5),
            )
        )
    print("\n".join(outcome.lines))  # noqa: T201 - a program's output
    return int(bool(outcome.wrong or outcome.failed_elsewhere or not outcome.completed_meanwhile))


if __name__ == "__main__":
    sys.exit(main())
