"""``python -m benchmarks.flatness``: what each call costs among millions of finished sagas, and of stubs.

Three databases of one server are alike but for what is over: nothing, finished sagas with their histories, and stubs of
archived ones. Each call is timed in all three by turns, a few times each, so that whatever else the machine does hits
them alike. And the pages that each call touches are counted, which no neighbour changes.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, LiteralString, TypeAlias
from uuid import UUID, uuid4

import psycopg
from psycopg.sql import SQL, Literal
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.__main__ import FOLDER, say
from benchmarks.filling import filling
from benchmarks.machine import VOLATILE, filesystem, libraries, load, machine
from benchmarks.ours import engine_on
from benchmarks.report import markdown
from benchmarks.retention import ENTRIES, FILL
from benchmarks.server import BenchmarkError, Server, serve
from benchmarks.views import STUCK
from benchmarks.workload import NAME, new_order
from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus, schema
from saga_store.inspection import SagaQuery
from saga_store.sqlalchemy import SqlAlchemySagaStorage

MOST_TIMES = 1.2
LIVING, EACH = 200, 8
# As old as these are they come first in claims, and last in lists.
SILENT: LiteralString = """
    INSERT INTO saga_executions (id, name, status, context, created_at, updated_at)
    SELECT gen_random_uuid(), {name}, 'RUNNING', CAST({context} AS json), moment, moment
    FROM generate_series(1, {living}) CROSS JOIN (SELECT now() - interval '1 day') AS s (moment)
"""
THEIR_ENTRIES: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, created_at)
    SELECT e.id, 'Step' || step, 'act', 'COMPLETED', e.created_at
    FROM saga_executions e CROSS JOIN generate_series(1, {each}) AS step
    WHERE e.status = 'RUNNING'
    ORDER BY e.name, e.id, step
"""
# Ten thousand to an archive, as archiving makes them; where their rows were before there is room, as it leaves it.
STUBS: LiteralString = """
    UPDATE saga_executions
    SET context = '{}', archived_at = date_bin('10 s', created_at, '2000-01-01') + interval '60 days'
    WHERE status IN ('COMPLETED', 'FAILED')
"""
LEDGER: LiteralString = """
    INSERT INTO saga_archives (
        id, uri, state, archived_by, begun_at, archived_at, removed_at, sha256, sagas, entries, bytes, removed
    )
    SELECT gen_random_uuid(), 'file:///nowhere', 'REMOVED', 'benchmark', archived_at, archived_at, archived_at,
        repeat('0', 64), count(*), 8 * count(*), 200 * count(*), count(*)
    FROM saga_executions
    WHERE archived_at IS NOT NULL
    GROUP BY archived_at
"""
PAGES: LiteralString = "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = %s"

Call: TypeAlias = Callable[[SqlAlchemySagaStorage, UUID], Awaitable[object]]

MINUTE, AT_ONCE = timedelta(minutes=1), timedelta(0)
STARTED = LogStep("TakePayment", "act", SagaStepStatus.STARTED)


async def claim(storage: SqlAlchemySagaStorage, _: UUID) -> None:
    """Claim ten of those that are silent, for so short a time that they may be claimed again."""
    claimed = await storage.claim_sagas(
        owner="benchmark", lease=timedelta(microseconds=1), limit=10, stale_after=AT_ONCE, name="Silent",
        max_attempts=1_000_000, max_backoff=AT_ONCE,
    )  # fmt: skip
    if len(claimed) != 10:  # noqa: PLR2004 - as it asked
        raise BenchmarkError(f"claimed {len(claimed)} sagas, not 10")


CALLS: dict[str, Call] = {
    "create": lambda storage, _: storage.create_saga(uuid4(), NAME, new_order()),
    "save": lambda storage, saga: storage.save(
        Checkpoint(saga, status=SagaStatus.RUNNING, context=new_order(), steps=[STARTED])
    ),
    "log_step": lambda storage, saga: storage.log_step(saga, "TakePayment", "act", SagaStepStatus.COMPLETED),
    "claim of 10": claim,
    "history": lambda storage, saga: storage.get_step_history(saga),
    "first page of the list": lambda storage, _: storage.find_sagas(),
    "list of what is stuck": lambda storage, _: storage.find_sagas(SagaQuery(conditions=STUCK)),
}
WRITES = {"create", "save", "log_step"}


@dataclass
class World:
    """A database, and whom its calls are about: sagas that are written to, and others that are read."""

    name: str
    url: str
    engine: AsyncEngine
    storage: SqlAlchemySagaStorage
    written: Iterator[UUID]
    read: Iterator[UUID]

    async def time(self, name: str, calls: int) -> float:
        """Return the median seconds of a call."""
        sagas = self.written if name in WRITES else self.read
        taken = []
        for _ in range(calls):
            saga = next(sagas)
            begin = time.perf_counter()
            await CALLS[name](self.storage, saga)
            taken.append(time.perf_counter() - begin)
        return median(taken)

    async def pages(self, name: str, calls: int) -> float:
        """Return how many pages of the buffer cache a call touches, those of indexes, sequences and keys counted."""
        await self._pages()
        await self.time(name, calls)  # whatever a connection looks up but once isn't counted
        before = await self._pages()
        await self.time(name, calls)
        return (await self._pages() - before) / calls

    async def _pages(self) -> int:
        # The engine has one connection, and that tells at once what it has done.
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT pg_stat_force_next_flush()"))
            await connection.commit()
        return await asyncio.to_thread(self._look)

    def _look(self) -> int:
        server, _, name = self.url.rpartition("/")
        # From elsewhere: who connects touches pages, too.
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            [(found,)] = connection.execute(PAGES, [name])
        return int(found)


def fill(url: str, name: str, sagas: int) -> None:
    """Make the tables, and fill them with what is alike in all three, and with what is over."""
    schema.upgrade(url)
    context = Literal(json.dumps(new_order()))
    with filling(url) as connection:
        if name != "none":
            connection.execute(SQL(FILL).format(context=context, sagas=Literal(sagas)))
        if name == "finished":
            connection.execute(SQL(ENTRIES).format(each=Literal(EACH)))
        if name == "stubs":
            connection.execute(STUBS)
            connection.execute(LEDGER)
        for kind in ("Silent", "Written", "Read"):
            connection.execute(SQL(SILENT).format(name=Literal(kind), context=context, living=Literal(LIVING)))
        connection.execute(SQL(THEIR_ENTRIES).format(each=Literal(EACH)))


async def measure(urls: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Time each call in all databases by turns, and count its pages."""
    seconds: dict[str, dict[str, list[float]]] = {name: {world: [] for world in urls} for name in CALLS}
    pages: dict[str, dict[str, float]] = {name: {} for name in CALLS}
    async with AsyncExitStack() as stack:
        worlds = [await _world(stack, name, url) for name, url in urls.items()]
        for number in range(-1, options.rounds):  # the first warms up
            for name in CALLS:
                first = number % len(worlds)
                for world in worlds[first:] + worlds[:first]:
                    took = await world.time(name, options.calls)
                    if number >= 0:
                        seconds[name][world.name].append(took)
            say(f"round {number + 1} of {options.rounds}" if number >= 0 else "warmed up")
        for name in CALLS:
            for world in worlds:
                pages[name][world.name] = await world.pages(name, options.calls)
    return {"seconds": seconds, "pages": pages}


async def _world(stack: AsyncExitStack, name: str, url: str) -> World:
    engine = await stack.enter_async_context(engine_on(url, connections=1))
    return World(
        name, url, engine, SqlAlchemySagaStorage(engine), cycle(_ids(url, "Written")), cycle(_ids(url, "Read"))
    )


def _ids(url: str, name: str) -> Sequence[UUID]:
    with psycopg.connect(url, autocommit=True) as connection:
        rows = connection.execute("SELECT id FROM saga_executions WHERE status = 'RUNNING' AND name = %s", [name])
        return [saga for (saga,) in rows]


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Compare round by round: those of a round were measured within a second of each other."""
    return {
        name: median(one / base for one, base in zip(rounds, seconds["none"], strict=True))
        for name, rounds in seconds.items()
        if name != "none"
    }


def render(report: dict[str, Any]) -> str:
    machine_, plan = report["machine"], report["plan"]
    many = f"{plan['sagas']:,}"
    titles = ["none, ms", f"{many} finished", "ratio", f"{many} stubs", "ratio", "pages: none", "finished", "stubs"]
    rows = [["median of a call", *titles]]
    for name, seconds in report["seconds"].items():
        ratio, pages = ratios(seconds), report["pages"][name]
        cells = [f"{median(seconds['none']) * 1000:.2f}"]
        for world, times in ratio.items():
            met = "met" if times <= MOST_TIMES else "NOT MET"
            cells += [f"{median(seconds[world]) * 1000:.2f}", f"{times:.2f}, <= {MOST_TIMES}: {met}"]
        rows.append([name, *cells, *(f"{pages[world]:.1f}" for world in ("none", *ratio))])
    how = f"{plan['rounds']} rounds of {plan['calls']} calls, one at a time"
    return "\n".join(
        [
            f"- {machine_['cores']} cores ({machine_['cpu']}) for server and client",
            f"- PostgreSQL {report['server']['version']}",
            f"- load {machine_['load_before']} before, {machine_['load_after']} after",
            f"- {3 * LIVING:,} unfinished sagas of {EACH} entries in each database",
            f"- {how}; ratios are medians of those of a round",
            *markdown(rows),
        ]
    )


def misses(report: dict[str, Any]) -> list[str]:
    """Return which calls cost too much."""
    return [
        f"{name} among {world}: {times:.2f} times as long; at most {MOST_TIMES} is allowed"
        for name, seconds in report["seconds"].items()
        for world, times in ratios(seconds).items()
        if times > MOST_TIMES
    ]


def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    urls = {}
    for name in ("none", "finished", "stubs"):
        began = time.monotonic()
        urls[name] = server.create(f"bench_flatness_{name}")
        fill(urls[name], name, options.sagas)
        say(f"{name}: filled in {time.monotonic() - began:.0f} s")
    server.checkpoint()
    return asyncio.run(measure(urls, options))


def main() -> int:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    if filesystem(options.folder) in VOLATILE:
        say(f"WARNING: {options.folder} is in memory, where nothing is durable and commits cost nothing: see --folder")
    facts = machine(options.folder)
    with serve(options.folder) as server:
        found = run(server, options)
        shown = {"version": server.version, "settings": server.settings}
    report = {
        "machine": {**facts, "load_after": load()},
        "libraries": libraries(),
        "server": shown,
        "plan": {name: getattr(options, name) for name in ("sagas", "rounds", "calls")},
        **found,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    say(f"\n{render(report)}\n\nall figures: {options.json}")
    missed = misses(report)
    for miss in missed:
        say(f"MISSED: {miss}")
    return 1 if missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flatness",
        description="Measure what each call costs among no other sagas, among finished ones, and among stubs.",
    )
    parser.add_argument("--sagas", type=int, default=3_000_000, help="finished ones, and stubs (3,000,000)")
    parser.add_argument("--rounds", type=int, default=15, help="of each call in each database (15)")
    parser.add_argument("--calls", type=int, default=50, help="of a round (50)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="whose disk the data is on (.bench)")
    parser.add_argument("--json", type=Path, default=FOLDER / "flatness.json", help="the file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
