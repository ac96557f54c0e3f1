"""``python -m benchmarks.migrations``: how long writers stall while full tables are migrated under them.

The same writers work with and without a migration, for the same time: what the longest of all their calls takes
beyond the longest without is the migration's doing.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from cqrs.saga.storage.sqlalchemy import SqlAlchemySagaStorage as CqrsStorage
from psycopg.sql import SQL, Literal
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks import handwritten
from benchmarks.__main__ import FOLDER, say
from benchmarks.machine import VOLATILE, filesystem, libraries, load, machine
from benchmarks.ours import engine_on
from benchmarks.peers import WORDS as CQRS_WORDS
from benchmarks.peers import create_cqrs_tables
from benchmarks.report import markdown
from benchmarks.server import BenchmarkError, Server, serve
from benchmarks.workload import Clock, SixMethods, Words, new_order, quantile, run_by_calls
from saga_store import schema

LOGS_PER_SAGA = 3
OLD_SAGAS = 10_000
CONNECTIONS = 8
WARM_UP_SECONDS = 2.0
LONGEST_BASELINE_SECONDS = 120.0
MOST_BEYOND_SECONDS = 1.0

# Of a hundred sagas one runs and two have failed; of a thousand one has half a lease, which saga_store_0002 mends.
EXECUTIONS: LiteralString = """
    INSERT INTO saga_executions
        (id, name, status, context, version, recovery_attempts, created_at, updated_at {columns})
    SELECT gen_random_uuid(), 'OrderSaga',
        CAST(CASE WHEN n % 100 = 0 THEN 'RUNNING' WHEN n % 50 = 1 THEN 'FAILED' ELSE 'COMPLETED' END AS {status}),
        {context}, 6, 0, now() - n * interval '1 second', now() - n * interval '1 second' {values}
    FROM generate_series(1, {sagas}) AS n
"""
LOGS: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, created_at)
    SELECT e.id, 'Step' || step, 'act', 'COMPLETED', e.created_at
    FROM saga_executions e CROSS JOIN generate_series(1, {each}) AS step
"""


@dataclass(frozen=True, slots=True)
class Stall:
    """What writers noticed in one stretch of time, in seconds; ``failed`` counts their errors by name."""

    seconds: float
    calls: int
    longest: float
    p99: float
    failed: dict[str, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """One migration: what writers noticed while it ran, and the worst of what they noticed before and after it."""

    migration: str
    during: Stall
    without: Stall

    @property
    def beyond(self) -> float:
        return self.during.longest - self.without.longest

    @property
    def met(self) -> bool:
        return self.beyond <= MOST_BEYOND_SECONDS and not self.during.failed

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "beyond": self.beyond, "met": self.met}


class Writers:
    """So many tasks that write all the time: new sagas from beginning to end, and in between to old ones."""

    def __init__(self, storage: SixMethods, words: Words, old: Sequence[UUID], *, tasks: int) -> None:
        self._storage = storage
        self._words = words
        self._old = old
        self._tasks = tasks

    async def work(self, until: asyncio.Future[None] | asyncio.Task[None]) -> Stall:
        """Write until that is done; calls that are under way then are waited for, and count."""
        clock, failed = Clock(), Counter[str]()
        gc.collect()
        begin = time.perf_counter()

        async def write() -> None:
            while not until.done():
                try:
                    await self._write_once(clock)
                except Exception as exc:  # noqa: BLE001 - whatever a migration does to writers is what is asked
                    failed[f"{type(exc).__name__}: {exc}".splitlines()[0][:200]] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(self._tasks):
                group.create_task(write())
        await until
        ordered = sorted(clock.calls)
        return Stall(
            time.perf_counter() - begin, len(ordered), ordered[-1], quantile(ordered, 0.99), dict(failed.most_common())
        )

    async def _write_once(self, clock: Clock) -> None:
        for saga_id in random.choices(self._old, k=4):  # noqa: S311 - no secret
            await clock.time(self._storage.update_context(saga_id, new_order()))
            await clock.time(self._storage.log_step(saga_id, "Late", "act", self._words.step_completed))
        await run_by_calls(self._storage, self._words, clock)


Open = Callable[[str], AbstractAsyncContextManager[SixMethods]]


def open_statements(url: str) -> AbstractAsyncContextManager[SixMethods]:
    """Today's storage needs the newest revision; those who write while it is applied belong to a release before."""
    return handwritten.open_statements(url, CONNECTIONS)


@asynccontextmanager
async def open_cqrs(url: str) -> AsyncIterator[SixMethods]:
    async with engine_on(url, connections=CONNECTIONS) as engine:
        yield CqrsStorage(async_sessionmaker(engine, expire_on_commit=False))


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables that are full, who writes to them, and the commands of ``saga-store`` that migrate them."""

    name: str
    open: Open
    words: Words
    commands: dict[str, tuple[str, ...]]
    make: Callable[[str], object]
    status: LiteralString
    columns: LiteralString = ""
    values: LiteralString = ""


def our_tables() -> Tables:
    first, *others = (found.revision for found in schema.history())
    return Tables(
        name="bench_revisions",
        open=open_statements,
        words=handwritten.WORDS,
        commands={revision: ("upgrade", revision) for revision in others},
        make=lambda url: schema.upgrade(url, first),
        status="varchar",
        columns=", lease_owner",
        values=", CASE n % 1000 WHEN 0 THEN 'worker-1' END",
    )


def cqrs_tables() -> Tables:
    return Tables(
        name="bench_adoption",
        open=open_cqrs,
        words=CQRS_WORDS,
        # Whatever their size, and so that nobody has to wait.
        commands={"adopt": ("adopt", "--execute", "--rewrite-below=0")},
        make=create_cqrs_tables,
        status="sagastatus",
    )


def fill(url: str, tables: Tables, sagas: int) -> list[UUID]:
    """Fill the tables, and return the ids of some sagas."""
    with psycopg.connect(url, autocommit=True) as connection:
        # The history's sagas are there: a foreign key's trigger needn't look for each.
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET synchronous_commit = off")
        executions = SQL(EXECUTIONS).format(
            columns=SQL(tables.columns),
            values=SQL(tables.values),
            status=SQL(tables.status),
            context=Literal(json.dumps(new_order())),
            sagas=Literal(sagas),
        )
        connection.execute(executions)
        connection.execute(SQL(LOGS).format(each=Literal(LOGS_PER_SAGA)))
        connection.execute("VACUUM (ANALYZE) saga_executions, saga_logs")
        rows = connection.execute("SELECT id FROM saga_executions ORDER BY random() LIMIT %s", [OLD_SAGAS])
        return [row[0] for row in rows]


async def measure(
    tables: Tables, url: str, old: Sequence[UUID], options: argparse.Namespace
) -> AsyncGenerator[Finding, None]:
    async with tables.open(url) as storage:
        writers = Writers(storage, tables.words, old, tasks=options.writers)
        await writers.work(_after(min(WARM_UP_SECONDS, options.seconds)))
        before = await writers.work(_after(options.seconds))
        for migration, command in tables.commands.items():
            during = await writers.work(asyncio.create_task(_saga_store(url, *command)))
            after = await writers.work(_after(min(max(during.seconds, options.seconds), LONGEST_BASELINE_SECONDS)))
            yield Finding(migration, during, max(before, after, key=lambda stall: stall.longest))
            before = after


def _after(seconds: float) -> asyncio.Task[None]:
    return asyncio.create_task(asyncio.sleep(seconds))


async def _saga_store(url: str, *command: str) -> None:
    """Run the command in a process of its own, so that it takes none of the writers' time."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "saga_store",
        *command,
        env=os.environ | {"DATABASE_URL": url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise BenchmarkError(f"saga-store {' '.join(command)} failed:\n{output.decode()}")


async def run(server: Server, tables: Tables, options: argparse.Namespace) -> list[Finding]:
    url = server.create(tables.name)
    tables.make(url)
    say(f"filling {tables.name}: {options.sagas:,} executions and {options.sagas * LOGS_PER_SAGA:,} logs")
    old = await asyncio.to_thread(fill, url, tables, options.sagas)
    await asyncio.to_thread(server.checkpoint)
    found = []
    async with contextlib.aclosing(measure(tables, url, old, options)) as findings:
        async for finding in findings:
            say(f"{finding.migration}: {finding.during.seconds:.1f} s, longest call {finding.during.longest:.2f} s")
            found.append(finding)
    return found


def render(report: dict[str, Any]) -> str:
    machine_, server, plan = report["machine"], report["server"], report["plan"]
    settings = ", ".join(f"{name} {value}" for name, value in server["settings"].items())
    lines = [
        ["migration", "took", "longest call", "without", "beyond", "p99", "without", "calls", "failed", "≤ 1 s beyond"]
    ]
    for found in report["migrations"]:
        during, without = found["during"], found["without"]
        figures = [during["seconds"], during["longest"], without["longest"], found["beyond"]]
        quantiles = [during["p99"], without["p99"]]
        lines.append(
            [
                found["migration"],
                *(f"{seconds:.2f} s" for seconds in figures),
                *(f"{seconds * 1000:.0f} ms" for seconds in quantiles),
                f"{during['calls']:,}",
                str(sum(during["failed"].values())),
                "met" if found["met"] else "NOT MET",
            ]
        )
    return "\n".join(
        [
            f"- {machine_['cores']} cores ({machine_['cpu']}), shared by server and client; {machine_['system']}",
            f"- one page written for good in {machine_['sync_ms']:.2f} ms on {machine_['filesystem']}",
            f"- load {machine_['load_before']} before, {machine_['load_after']} after",
            f"- PostgreSQL {server['version']}: {settings}",
            f"- {plan['sagas']:,} executions, {plan['logs']:,} logs; {plan['writers']} writers, all the time",
            *(f"- SKIPPED: {what}: {reason}" for what, reason in report["skipped"].items()),
            *(
                f"- failed during {found['migration']}: {count} of {what}"
                for found in report["migrations"]
                for what, count in found["during"]["failed"].items()
            ),
            *markdown(lines),
        ]
    )


def main() -> None:
    options = _options()
    skipped = {}
    wanted = [our_tables()]
    if importlib.util.find_spec("saga_store.adoption"):
        wanted.append(cqrs_tables())
    else:
        skipped["adopt"] = "this release has no saga_store.adoption"
    wanted = [tables for tables in wanted if not options.only or options.only == tables.name.removeprefix("bench_")]
    options.folder.mkdir(parents=True, exist_ok=True)
    if filesystem(options.folder) in VOLATILE:
        say(f"WARNING: {options.folder} is in memory, where nothing is durable and commits cost nothing: see --folder")
    facts = machine(options.folder)
    with serve(options.folder) as server:
        findings = [found for tables in wanted for found in asyncio.run(run(server, tables, options))]
        shown = {"version": server.version, "settings": server.settings}
    report = {
        "machine": {**facts, "load_after": load()},
        "libraries": libraries(),
        "server": shown,
        "plan": {
            "sagas": options.sagas,
            "logs": options.sagas * LOGS_PER_SAGA,
            "writers": options.writers,
            "seconds": options.seconds,
        },
        "skipped": skipped,
        "migrations": [found.as_json() for found in findings],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    say(f"\n{render(report)}\n\nall figures: {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.migrations",
        description="Measure how long writers stall while full tables are migrated, on a durable PostgreSQL.",
    )
    parser.add_argument("--sagas", type=int, default=1_000_000, help="rows in saga_executions (1,000,000); 3 logs each")
    parser.add_argument("--writers", type=int, default=16, help="how many write at a time (16)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="how long they are watched without a migration (20)"
    )
    parser.add_argument("--only", choices=["revisions", "adoption"], help="measure these alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="whose disk the server's data is on (.bench)")
    parser.add_argument("--json", type=Path, default=FOLDER / "migrations.json", help="the file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
