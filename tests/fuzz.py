"""``make fuzz``: compare PostgreSQL with the twin, in random schedules, over both drivers and all kinds of bind."""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing.differential import Opener, Tally, find_difference
from saga_store.testing.postgres import PostgresServer, serve
from tests.databases import Databases
from tests.test_contract import DRIVERS, JOINING_BINDS, OWNING_BINDS, make_older

LATEST = Path(__file__).parent.parent / ".fuzz" / "latest.json"
BINDS = tuple(f"{driver}-{bind}" for bind in (*OWNING_BINDS, *JOINING_BINDS) for driver in DRIVERS)
LIBRARIES = ("hypothesis", "SQLAlchemy", "asyncpg", "psycopg")
# So few that a failure is found again soon.
SCHEDULES_PER_BATCH = 25


@dataclass(frozen=True, slots=True)
class Batch:
    """Some schedules over one bind; the same ones for the same seed."""

    bind: str
    seed: int
    schedules: int
    steps: int

    @property
    def command(self) -> str:
        return (
            f'make fuzz ARGS="--bind {self.bind} --seed {self.seed} --schedules {self.schedules} --steps {self.steps}"'
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a batch."""

    batch: Batch
    schedules: int
    steps: int
    difference: str | None


def plan(binds: Sequence[str], seed: int, schedules: int, steps: int) -> list[Batch]:
    """Spread the schedules over the binds, in batches of consecutive seeds."""
    batches: list[Batch] = []
    for number in range(-(-schedules // SCHEDULES_PER_BATCH)):
        few = min(SCHEDULES_PER_BATCH, schedules - number * SCHEDULES_PER_BATCH)
        batches.append(Batch(binds[number % len(binds)], seed + number, few, steps))
    return batches


def run(batch: Batch, url: str) -> Outcome:
    """Run a batch, in a process of its own."""
    logging.getLogger("saga_store").setLevel(logging.ERROR)  # runs that are left with something uncommitted warn
    tally = Tally()
    try:
        asyncio.run(_compare(batch, url, tally))
    except AssertionError as exc:
        return Outcome(batch, tally.schedules, tally.steps, "".join(traceback.format_exception(exc)))
    return Outcome(batch, tally.schedules, tally.steps, None)


async def _compare(batch: Batch, url: str, tally: Tally) -> None:
    driver, _, bind = batch.bind.partition("-")
    engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
    try:
        await find_difference(
            _opener(engine, bind),
            partial(make_older, engine),
            joins=bind in JOINING_BINDS,
            schedules=batch.schedules,
            steps=batch.steps,
            start=batch.seed,
            tally=tally,
            joinable=None if bind in JOINING_BINDS else partial(JOINING_BINDS[_JOINED_BY[bind]], engine),
        )
    finally:
        await engine.dispose()


# What runs of each of them commit into.
_JOINED_BY = {"engine": "connection", "sessionmaker": "session"}


def _opener(engine: AsyncEngine, bind: str) -> Opener:
    if bind in OWNING_BINDS:
        storage = SqlAlchemySagaStorage(OWNING_BINDS[bind](engine))
        return lambda: nullcontext((storage, None))

    @asynccontextmanager
    async def opener() -> AsyncIterator[tuple[SagaStorage, AsyncSession | AsyncConnection]]:
        async with JOINING_BINDS[bind](engine) as joined:
            yield SqlAlchemySagaStorage(joined), joined

    return opener


class Progress:
    """Says how far it has come: on a terminal in one line, otherwise in some twenty."""

    def __init__(self, schedules: int) -> None:
        self._wanted = schedules
        self._began = time.monotonic()
        self._told = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        done = sum(outcome.schedules for outcome in outcomes)
        share = min(done / self._wanted, 1.0)
        if not sys.stdout.isatty() and share < min(self._told + 0.05, 1.0):
            return
        self._told = share
        left = self.seconds / share - self.seconds if share else 0
        differences = sum(outcome.difference is not None for outcome in outcomes)
        say(
            f"[{share:4.0%}] {done:,} schedules, {sum(outcome.steps for outcome in outcomes):,} steps, "
            f"{differences} differences; {left:.0f} s left",
            end="\r" if sys.stdout.isatty() and share < 1 else "\n",
        )


def fuzz(batches: Sequence[Batch], processes: int, server: PostgresServer) -> tuple[list[Outcome], float]:
    """Run all batches, each process with a database of its own; return what came of them, and the seconds it took."""
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        admin = stack.enter_context(psycopg.connect(server.url, autocommit=True))
        databases = Databases(server, admin)
        stack.callback(databases.drop_doomed)
        lanes = []
        for _ in range(processes):
            url = stack.enter_context(databases.migrated()).url("psycopg")
            context = multiprocessing.get_context("spawn")
            lanes.append((stack.enter_context(ProcessPoolExecutor(1, mp_context=context)), url))
        progress = Progress(sum(batch.schedules for batch in batches))
        work: list[Future[Outcome]] = []
        for number, batch in enumerate(batches):
            lane, url = lanes[number % processes]
            work.append(lane.submit(run, batch, url))
        for future in as_completed(work):
            outcomes.append(future.result())
            progress.tell(outcomes)
            if difference := outcomes[-1].difference:
                say(f"\n{difference}\nThe same again: {outcomes[-1].batch.command}\n")
        return outcomes, progress.seconds


def report(outcomes: Sequence[Outcome], seconds: float, seed: int, server: PostgresServer) -> dict[str, Any]:
    per_bind = {
        bind: {
            "schedules": sum(outcome.schedules for outcome in outcomes if outcome.batch.bind == bind),
            "steps": sum(outcome.steps for outcome in outcomes if outcome.batch.bind == bind),
            "differences": sum(outcome.difference is not None for outcome in outcomes if outcome.batch.bind == bind),
        }
        for bind in sorted({outcome.batch.bind for outcome in outcomes})
    }
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "seconds": round(seconds),
        "schedules": sum(outcome.schedules for outcome in outcomes),
        "steps": sum(outcome.steps for outcome in outcomes),
        "differences": [
            {**asdict(outcome.batch), "difference": outcome.difference} for outcome in outcomes if outcome.difference
        ],
        "binds": per_bind,
        "postgresql": server.version,
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def line(figures: dict[str, Any]) -> str:
    """The line that docs/reliability.md quotes."""
    return (
        f"`make fuzz`: {figures['schedules']:,} schedules, {figures['steps']:,} steps, over {len(figures['binds'])} "
        f"binds: {len(figures['differences'])} differences (PostgreSQL {figures['postgresql']}, "
        f"seed {figures['seed']}, {figures['when'][:10]})"
    )


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)  # noqa: T201 - the program's output


def main() -> int:
    options = _options()
    batches = plan(options.bind or BINDS, options.seed, options.schedules, options.steps)
    with serve(os.environ.get("SAGA_STORE_TEST_PG") or "auto") as server:
        say(f"PostgreSQL {server.version}: {server.how}; seed {options.seed}")
        outcomes, seconds = fuzz(batches, min(options.processes, len(batches)), server)
        figures = report(outcomes, seconds, options.seed, server)
    LATEST.parent.mkdir(exist_ok=True)
    LATEST.write_text(json.dumps(figures, indent=1))
    say("")
    for bind, tried in figures["binds"].items():
        counts = f"{tried['schedules']:>6,} schedules {tried['steps']:>8,} steps {tried['differences']:>3} differences"
        say(f"{bind:<22}{counts}")
    say(f"\n{line(figures)}\nall figures: {LATEST}")
    return 1 if figures["differences"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make fuzz", description="Compare PostgreSQL with the twin in memory, in random schedules of calls."
    )
    parser.add_argument("--schedules", type=int, default=2_500, metavar="N", help="how many in all (2,500)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="the length of each (50)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9), help="random unless given")
    parser.add_argument("--bind", action="append", choices=BINDS, help="only this one; may be given several times")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="one for each CPU")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
