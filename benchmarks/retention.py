"""``python -m benchmarks.retention``: what letting go costs among writers, and what archiving a million sagas takes.

Side by side, in one run, among the same writers: what a DELETE by hand does, our removal alone, and the whole way of
reading, writing, verifying and removing. Each in a process of its own, so that it takes none of the writers' time.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
from psycopg.sql import SQL, Literal
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.__main__ import FOLDER, say
from benchmarks.handwritten import WORDS
from benchmarks.machine import VOLATILE, filesystem, libraries, load, machine
from benchmarks.migrations import Stall, Writers
from benchmarks.ours import engine_on
from benchmarks.report import markdown
from benchmarks.server import BenchmarkError, Server, serve
from benchmarks.workload import new_order
from saga_store import schema
from saga_store.retention import RetentionPolicy, archive, restore, verify
from saga_store.retention.removing import make_stubs
from saga_store.retention_model import SagaMark
from saga_store.sqlalchemy import SqlAlchemySagaStorage

POLICY = RetentionPolicy(completed=timedelta(days=30), failed=timedelta(days=30))
CONNECTIONS = 8
# What has to come out: shares of the rate of bare deletion, seconds, times the size after the first cycle, megabytes.
LEAST_REMOVAL, LEAST_ARCHIVING = 0.75, 0.25
MOST_BEYOND_SECONDS = 0.5
MOST_GROWTH = 1.1
MOST_MEGABYTES = 300
LIVING = 1000
BATCH = 2000
# As a DBA writes it: sagas that are old enough, their entries with them, a batch in a transaction.
DELETE: LiteralString = """
    WITH doomed AS (
        SELECT id FROM saga_executions
        WHERE status IN ('COMPLETED', 'FAILED') AND archived_at IS NULL AND updated_at < now() - interval '30 days'
        ORDER BY created_at LIMIT {batch}
    ), entries AS (
        DELETE FROM saga_logs l USING doomed d WHERE l.saga_id = d.id
    )
    DELETE FROM saga_executions e USING doomed d WHERE e.id = d.id
"""
FILL: LiteralString = """
    INSERT INTO saga_executions (id, name, status, context, version, created_at, updated_at)
    SELECT gen_random_uuid(), 'OrderSaga', CASE WHEN n % 50 = 1 THEN 'FAILED' ELSE 'COMPLETED' END,
        CAST({context} AS json), 9, now() - interval '90 days' + n * interval '1 ms', now() - interval '80 days'
    FROM generate_series(1, {sagas}) AS n
"""
ENTRIES: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, created_at)
    SELECT e.id, 'Step' || step, 'act', 'COMPLETED', e.created_at
    FROM saga_executions e CROSS JOIN generate_series(1, {each}) AS step
    WHERE e.updated_at < now() - interval '30 days' AND e.archived_at IS NULL
    ORDER BY e.created_at, e.id, step
"""
# What is finished and young: tables that are full, whose indexes don't fit into the server's memory.
STANDING: LiteralString = """
    INSERT INTO saga_executions (id, name, status, context, version, created_at, updated_at)
    SELECT gen_random_uuid(), 'OrderSaga', 'COMPLETED', CAST({context} AS json), 9, now(), now()
    FROM generate_series(1, {sagas}) AS n
"""
STANDING_ENTRIES: LiteralString = """
    INSERT INTO saga_logs (saga_id, step_name, action, status)
    SELECT e.id, 'Step' || step, 'act', 'COMPLETED' FROM saga_executions e CROSS JOIN generate_series(1, {each}) AS step
"""
MARKS: LiteralString = """
    SELECT e.id, e.version, count(l.id), coalesce(max(l.id), 0)
    FROM saga_executions e LEFT JOIN saga_logs l ON l.saga_id = e.id
    WHERE e.updated_at < now() - interval '30 days' AND e.archived_at IS NULL
    GROUP BY e.id ORDER BY e.created_at, e.id
"""
SIZES: LiteralString = "SELECT pg_total_relation_size('saga_executions'), pg_total_relation_size('saga_logs')"
# Without what only the database that they came from can have: the ids of the entries.
DIGEST: LiteralString = """
    SELECT md5(string_agg(md5(row_to_json(s)::text), '' ORDER BY s.id)) FROM (
        SELECT e.id, e.name, e.status, e.context::text, e.version, e.recovery_attempts, e.created_at, e.updated_at,
            (SELECT json_agg(json_build_array(l.step_name, l.action, l.status, l.details, l.created_at) ORDER BY l.id)
                FROM saga_logs l WHERE l.saga_id = e.id) AS history
        FROM saga_executions e WHERE e.updated_at < now() - interval '30 days'
    ) s
"""


async def step(name: str, url: str, folder: str) -> dict[str, Any]:
    """Do one thing, in this process, and return what it took."""
    async with _opened(url) as storage:
        begin = time.perf_counter()
        sagas = await STEPS[name](storage, url, folder)
        return {
            "sagas": sagas,
            "seconds": time.perf_counter() - begin,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


async def _delete(_: SqlAlchemySagaStorage, url: str, _folder: str) -> int:
    deleted = 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        statement = SQL(DELETE).format(batch=Literal(BATCH))
        while gone := (await connection.execute(statement)).rowcount:
            deleted += gone
    return deleted


async def _remove(storage: SqlAlchemySagaStorage, _: str, folder: str) -> int:
    """Removal alone: what there is to remove has been written down already."""
    written = await asyncio.to_thread(Path(folder, "marks.json").read_text)
    marks = [SagaMark(UUID(saga), *rest) for saga, *rest in json.loads(written)]
    row = await storage.begin_archive(uuid4(), uri="file:///nowhere", by="benchmark")
    await storage.verify_archive(row.id, sha256="0" * 64, sagas=len(marks), entries=0, bytes=0, watermark=None)
    await make_stubs(storage, row.id, marks, lambda: False, lambda _: None)
    return (await storage.finish_archive(row.id)).removed


async def _archive(storage: SqlAlchemySagaStorage, _: str, folder: str) -> int:
    report = await archive(storage, folder, POLICY)
    if report.removed != report.sagas:
        raise BenchmarkError(f"{report.sagas} sagas were archived, and {report.removed} removed")
    return report.removed


async def _verify(storage: SqlAlchemySagaStorage, _: str, folder: str) -> int:
    report = await verify(folder, storage if (await storage.find_archives(limit=1)).archives else None)
    if report.problems:
        raise BenchmarkError("\n".join(report.problems))
    return sum(one.sagas for one in report.archives)


async def _restore(storage: SqlAlchemySagaStorage, _: str, folder: str) -> int:
    report = await restore(storage, archive=folder, keep_for=timedelta(0))
    if report.other:
        raise BenchmarkError(f"{len(report.other)} sagas weren't restored")
    return report.restored


STEPS: dict[str, Callable[[SqlAlchemySagaStorage, str, str], Awaitable[int]]] = {
    "delete": _delete,
    "remove": _remove,
    "archive": _archive,
    "verify": _verify,
    "restore": _restore,
}
WAYS = ("delete", "remove", "archive")


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[SqlAlchemySagaStorage]:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    try:
        yield SqlAlchemySagaStorage(engine)
    finally:
        await engine.dispose()


async def in_a_process(name: str, url: str, folder: Path) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.retention", "--step", name, url, str(folder),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode:
        raise BenchmarkError(f"{name} failed, see above")
    found: dict[str, Any] = json.loads(output)
    return found


def fill(url: str, sagas: int, each: int, folder: Path | None = None) -> None:
    """Fill the tables with sagas that are old enough to go; and write down their marks."""
    _fill(url, FILL, ENTRIES, sagas, each)
    if folder is not None:
        with psycopg.connect(url, autocommit=True) as connection:
            marks = connection.execute(MARKS).fetchall()
        (folder / "marks.json").write_text(json.dumps([[str(saga), *mark] for saga, *mark in marks]))


def fill_standing(url: str, sagas: int, each: int) -> None:
    """Fill the tables with finished sagas that stay."""
    _fill(url, STANDING, STANDING_ENTRIES, sagas, each)


def _fill(url: str, rows: LiteralString, entries: LiteralString, sagas: int, each: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET session_replication_role = replica")
        connection.execute(SQL(rows).format(context=Literal(json.dumps(new_order())), sagas=Literal(sagas)))
        connection.execute(SQL(entries).format(each=Literal(each)))
        connection.execute("VACUUM (ANALYZE) saga_executions, saga_logs")


def one(url: str, query: LiteralString) -> Any:  # noqa: ANN401 - a row of any types
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query).fetchone()


async def among_writers(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Let sagas go in three ways, by turns, while the writers work."""
    url = server.create("bench_retention")
    await asyncio.to_thread(schema.upgrade, url)
    say(f"filling {options.standing:,} sagas that stay")
    await asyncio.to_thread(fill_standing, url, options.standing, options.entries)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    stalls: dict[str, list[Stall]] = {"baseline": [], **{way: [] for way in WAYS}}
    async with engine_on(url, connections=CONNECTIONS) as engine:
        storage = SqlAlchemySagaStorage(engine)
        living = [uuid4() for _ in range(LIVING)]
        for saga_id in living:
            await storage.create_saga(saga_id, "OrderSaga", new_order())
        writers = Writers(storage, WORDS, living, tasks=options.writers)
        await writers.work(asyncio.create_task(asyncio.sleep(2)))
        for turn in range(options.rounds):
            for way in WAYS:
                with TemporaryDirectory(dir=options.folder) as folder:
                    await asyncio.to_thread(fill, url, options.sagas, options.entries, Path(folder))
                    server.checkpoint()
                    stalls["baseline"].append(await writers.work(asyncio.create_task(asyncio.sleep(options.seconds))))
                    (Path(folder) / "archive").mkdir()
                    place = Path(folder) / ("archive" if way == "archive" else "")
                    letting_go = asyncio.create_task(in_a_process(way, url, place))
                    # The writers take a task that returns nothing.
                    stalls[way].append(await writers.work(asyncio.create_task(_done(letting_go))))
                    took = await letting_go
                if took["sagas"] != options.sagas:
                    raise BenchmarkError(f"{way} let {took['sagas']} sagas go, of {options.sagas}")
                rates[way].append(took["sagas"] / took["seconds"])
                say(f"round {turn + 1}, {way}: {rates[way][-1]:,.0f} sagas/s")
    return {
        "rates": rates,
        "longest": {name: max(stall.longest for stall in found) for name, found in stalls.items()},
        "failed": {name: sum(sum(stall.failed.values()) for stall in found) for name, found in stalls.items()},
        "stalls": {name: [asdict(stall) for stall in found] for name, found in stalls.items()},
    }


async def _done(task: "asyncio.Task[Any]") -> None:
    await asyncio.wait([task])


async def cycles(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Fill and archive, again and again; stubs are forgotten, as by a policy that has come to its steady state."""
    sizes: dict[str, list[int]] = {}
    for forgets in (True, False):
        name = "bench_cycles_forgotten" if forgets else "bench_cycles_stubs"
        url = server.create(name)
        await asyncio.to_thread(schema.upgrade, url)
        sizes[name] = []
        with TemporaryDirectory(dir=options.folder) as folder:
            for _ in range(options.cycles):
                await asyncio.to_thread(fill, url, options.sagas, options.entries)
                await in_a_process("archive", url, Path(folder))
                async with _opened(url) as storage:
                    while forgets and await storage.forget_stubs(older_than=timedelta(0)):
                        pass
                with psycopg.connect(url, autocommit=True) as connection:
                    # As autovacuum does, which is off here, and which comes more than once while so much is deleted:
                    # what its first visit empties of an index may only be used again after the next.
                    for _ in range(2):
                        connection.execute("SELECT pg_current_xact_id()")
                        connection.execute("VACUUM saga_executions, saga_logs")
                sizes[name].append(sum(one(url, SIZES)))
        say(f"{name}: {', '.join(f'{size / 2**20:,.1f} MiB' for size in sizes[name])}")
    return sizes


async def round_trip(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Archive a great many, verify, and restore into another database and into their stubs; compare digests."""
    url, other = server.create("bench_million"), server.create("bench_restored")
    for each in (url, other):
        await asyncio.to_thread(schema.upgrade, each)
    say(f"filling {options.million:,} sagas")
    await asyncio.to_thread(fill, url, options.million, options.million_entries)
    digest = await asyncio.to_thread(one, url, DIGEST)
    found: dict[str, Any] = {}
    with TemporaryDirectory(dir=options.folder) as folder:
        for name, where in (("archive", url), ("verify", url), ("restore", other), ("restore again", url)):
            found[name] = await in_a_process(name.split()[0], where, Path(folder))
            say(f"{name}: {found[name]}")
        found["bytes"] = await asyncio.to_thread(_size, Path(folder))
    found["equal"] = {
        "another database": await asyncio.to_thread(one, other, DIGEST) == digest,
        "the same database": await asyncio.to_thread(one, url, DIGEST) == digest,
    }
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def render(report: dict[str, Any]) -> str:
    machine_, plan = report["machine"], report["plan"]
    text = [
        f"- {machine_['cores']} cores ({machine_['cpu']}) for server, writers and archiver",
        f"- PostgreSQL {report['server']['version']}",
        f"- load {machine_['load_before']} before, {machine_['load_after']} after",
    ]
    if "among_writers" in report:
        text += _rates(report["among_writers"], plan)
    for name, sizes in report.get("cycles", {}).items():
        share = max(sizes[1:], default=sizes[0]) / sizes[0]
        met = "" if "stubs" in name else f"; <= {MOST_GROWTH}: {_met(share <= MOST_GROWTH)}"
        first = f"{sizes[0] / 2**20:.1f} MiB after the first"
        text.append(f"- {name}: {len(sizes)} cycles, {first}, at most {share:.2f}x that{met}")
    if "million" in report:
        text += _round_trip(report["million"], plan)
    return "\n".join(text)


def _rates(found: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    rates = {way: median(each) for way, each in found["rates"].items()}
    baseline = found["longest"]["baseline"]
    targets = {"delete": None, "remove": LEAST_REMOVAL, "archive": LEAST_ARCHIVING}
    names = {"delete": "bare deletion", "remove": "removal alone", "archive": "read, write, verify, remove"}
    rows = [[f"among {plan['writers']} writers", "sagas/s", "of bare deletion", "longest call", "beyond the baseline"]]
    rows.append(["writers alone", "", "", f"{baseline:.2f} s", ""])
    for way, target in targets.items():
        share, beyond = rates[way] / rates["delete"], found["longest"][way] - baseline
        met = "" if target is None else f", >= {target}: {_met(share >= target)}"
        stalled = f"{beyond:+.2f} s, <= {MOST_BEYOND_SECONDS}: {_met(beyond <= MOST_BEYOND_SECONDS)}"
        longest = f"{found['longest'][way]:.2f} s"
        rows.append([names[way], f"{rates[way]:,.0f}", f"{share:.2f}{met}", longest, stalled])
    return [
        f"- {plan['sagas']:,} sagas of {plan['entries']} entries among {plan['standing']:,} that stay",
        f"- {plan['rounds']} rounds, medians",
        f"- writers' failures: {found['failed']}",
        *markdown(rows),
    ]


def _round_trip(found: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    rows = [[f"{plan['million']:,} sagas of {plan['million_entries']} entries", "seconds", "sagas/s", "peak memory"]]
    for name in ("archive", "verify", "restore", "restore again"):
        took = found[name]
        memory = f"{took['peak_mb']:.0f} MB, < {MOST_MEGABYTES}: {_met(took['peak_mb'] < MOST_MEGABYTES)}"
        rows.append([name, f"{took['seconds']:,.0f}", f"{took['sagas'] / took['seconds']:,.0f}", memory])
    equal = ", ".join(f"{where}: {'yes' if is_equal else 'NO'}" for where, is_equal in found["equal"].items())
    return [*markdown(rows), f"- digests of rows and histories equal in {equal}; {found['bytes']:,} bytes"]


def _met(is_met: bool) -> str:  # noqa: FBT001 - what it says
    return "met" if is_met else "NOT MET"


PARTS = {"among_writers": among_writers, "cycles": cycles, "million": round_trip}


async def _run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    return {name: await part(server, options) for name, part in PARTS.items() if options.only in {None, name}}


def main() -> None:
    options = _options()
    if options.step:
        name, url, folder = options.step
        print(json.dumps(asyncio.run(step(name, url, folder))))  # noqa: T201 - for the process that began this one
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if filesystem(options.folder) in VOLATILE:
        say(f"WARNING: {options.folder} is in memory, where nothing is durable and commits cost nothing: see --folder")
    facts = machine(options.folder)
    with serve(options.folder) as server:
        found = asyncio.run(_run(server, options))
        shown = {"version": server.version, "settings": server.settings}
    plan = {
        name: getattr(options, name)
        for name in ("sagas", "standing", "entries", "rounds", "cycles", "writers", "million", "million_entries")
    }
    report = {
        "machine": {**facts, "load_after": load()},
        "libraries": libraries(),
        "server": shown,
        "plan": plan,
        **found,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    say(f"\n{render(report)}\n\nall figures: {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retention",
        description="Measure what letting go costs among writers, and archive, verify and restore a million sagas.",
    )
    parser.add_argument(
        "--sagas", type=int, default=20_000, help="let go each time, among writers and in cycles (20,000)"
    )
    parser.add_argument("--standing", type=int, default=500_000, help="finished ones that stay meanwhile (500,000)")
    parser.add_argument("--entries", type=int, default=8, help="of each of them (8)")
    parser.add_argument("--rounds", type=int, default=3, help="of each way (3)")
    parser.add_argument("--cycles", type=int, default=10, help="of fill and archive (10)")
    parser.add_argument("--million", type=int, default=1_000_000, help="archived, verified and restored (1,000,000)")
    parser.add_argument("--million-entries", type=int, default=8, help="of each of these (8)")
    parser.add_argument("--writers", type=int, default=16, help="how many write at a time (16)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long they are watched alone (10)")
    parser.add_argument("--only", choices=PARTS, help="measure this alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="whose disk data and archives are on (.bench)")
    parser.add_argument("--json", type=Path, default=FOLDER / "retention.json", help="the file to write")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "URL", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
