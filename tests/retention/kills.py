"""Kill an archiver at random moments, and see after each few kills that every saga is in the table or in an archive.

python -m tests.retention.kills [--kills N] [--sagas N] [--seed S]
"""

import argparse
import asyncio
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import schema
from saga_store.errors import ArchiverBusyError
from saga_store.retention import ArchiveError, Target, archive, restore, verify
from saga_store.retention.reading import find, read_archive, read_manifest
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres import serve
from tests.retention.world import ALL

SAGAS_PER_ARCHIVE = 25
LONGEST_LIFE_SECONDS = 0.6
CHECKED_EVERY = 10

FILL = """
INSERT INTO saga_executions (id, name, status, context, version, created_at, updated_at)
SELECT gen_random_uuid(), 'order', CASE WHEN n %% 5 = 0 THEN 'FAILED' ELSE 'COMPLETED' END,
    json_build_object('order', n), 1 + n %% 7, now() - interval '90 days', now() - interval '80 days'
FROM generate_series(1, %s) n;
"""
ENTRIES = """
INSERT INTO saga_logs (saga_id, step_name, action, status, details)
SELECT id, 'step ' || k, 'act', 'COMPLETED', repeat('x', k * 10)
FROM saga_executions, generate_series(1, 8) k ORDER BY id, k
"""
ROWS = """
SELECT e.id::text, e.version, e.context::text, e.archived_at IS NOT NULL,
    (SELECT array_agg(l.step_name || l.details ORDER BY l.id) FROM saga_logs l WHERE l.saga_id = e.id)
FROM saga_executions e
"""
LEDGER = "SELECT state, count(*) FROM saga_archives GROUP BY state"

Content = tuple[int, str, tuple[str, ...]]


@dataclass
class Outcome:
    """What came of it: ``problems`` is empty if nothing was lost."""

    kills: int = 0
    ended: int = 0
    archived: int = 0
    restored: int = 0
    states: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def killed(url: str, kills: int, sagas: int, seed: str, folder: Path) -> Outcome:
    """Fill the database, and kill archivers until there were so many kills."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(FILL.encode(), [sagas])
        admin.execute(ENTRIES.encode())
        originals = {saga: content for saga, content, _ in _rows(admin)}
    outcome = Outcome()
    while outcome.kills < kills:
        if _live(url, folder, rng.uniform(0, LONGEST_LIFE_SECONDS)):
            outcome.ended += 1
        outcome.kills += 1
        if outcome.kills % CHECKED_EVERY == 0:
            asyncio.run(_check(url, folder, originals, outcome))
        if outcome.problems:
            return outcome
    asyncio.run(_run_to_the_end(url, folder))
    asyncio.run(_check(url, folder, originals, outcome, at_the_end=True))
    return outcome


def _live(url: str, folder: Path, seconds: float) -> bool:
    """Run an archiver for this long, and kill it; return whether it had ended by itself, which it doesn't."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            asyncio.run(_archive_for_ever(url, folder, writer))
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)  # it has begun, or ended
    os.close(reader)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


async def _archive_for_ever(url: str, folder: Path, begun: int) -> None:
    """Archive everything, restore everything, and so on."""
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    storage = SqlAlchemySagaStorage(engine)
    os.write(begun, b"x")
    while True:
        try:
            await archive(storage, str(folder), ALL, sagas_per_archive=SAGAS_PER_ARCHIVE)
        except ArchiverBusyError:  # the server hasn't noticed yet that the one before is dead
            await asyncio.sleep(0.01)
            continue
        await restore(storage, archive=str(folder), keep_for=timedelta(0))


async def _run_to_the_end(url: str, folder: Path) -> None:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    await archive(SqlAlchemySagaStorage(engine), str(folder), ALL)
    await engine.dispose()


async def _check(
    url: str, folder: Path, originals: dict[str, Content], outcome: Outcome, *, at_the_end: bool = False
) -> None:
    target = Target(str(folder))
    engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        report = await verify(target, engine)
        outcome.problems += report.problems
        archives = await _archives(target)
    except ArchiveError as exc:
        if "holds no archive" not in str(exc):
            outcome.problems.append(str(exc))
        archives = {}
    finally:
        await engine.dispose()
    with psycopg.connect(url, autocommit=True) as admin:
        rows = list(_rows(admin))
        where: dict[str, str] = dict(
            admin.execute(
                b"SELECT e.id::text, a.uri FROM saga_executions e JOIN saga_archives a USING (archived_at)"
            ).fetchall()
        )
        outcome.states = Counter(dict(admin.execute(LEDGER.encode()).fetchall()))
    if len(rows) != len(originals):
        outcome.problems.append(f"{len(originals)} sagas were made, and {len(rows)} rows are there")
    stubs = 0
    for saga, content, is_stub in rows:
        if is_stub:
            stubs += 1
            if content[2]:
                outcome.problems.append(f"stub {saga} has entries in the table")
            if archives.get(where.get(saga, ""), {}).get(saga) != originals[saga]:
                outcome.problems.append(f"saga {saga} is a stub, and its archive hasn't got it: {where.get(saga)}")
        elif content != originals[saga]:
            outcome.problems.append(f"saga {saga} is in the table, and isn't what it was: {content}")
    outcome.archived, outcome.restored = stubs, len(rows) - stubs
    if at_the_end and (stubs != len(rows) or outcome.states.keys() - {"REMOVED", "FAILED"}):
        outcome.problems.append(f"at the end {stubs} of {len(rows)} are archived, and the ledger has {outcome.states}")


async def _archives(target: Target) -> dict[str, dict[str, Content]]:
    found: dict[str, dict[str, Content]] = {}
    for path in (await find(target)).manifests:
        manifest = await read_manifest(target, path)
        sagas: dict[str, Content] = {}
        async for batch in read_archive(target, manifest):
            for one in batch:
                entries = tuple(entry.step_name + (entry.details or "") for entry in one.record.entries)
                sagas[str(one.record.id)] = (one.record.version, one.record.context, entries)
        found[target.uri(manifest.path)] = sagas
    return found


def _rows(admin: psycopg.Connection) -> Any:  # noqa: ANN401 - id, content, whether it is a stub
    for saga, version, context, is_stub, entries in admin.execute(ROWS.encode()).fetchall():
        yield saga, (version, context, tuple(entries or ())), is_stub


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.retention.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--sagas", type=int, default=500)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--url", help="an empty, migrated database (default: one of its own)")
    given = parser.parse_args()
    print(f"seed {given.seed} (the same moments again: --seed {given.seed})", flush=True)  # noqa: T201 - a program's output
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = given.url
        if url is None:
            url = stack.enter_context(serve("embedded")).url
            schema.upgrade(url)
        outcome = killed(url, given.kills, given.sagas, given.seed, folder)
    print(  # noqa: T201 - as above
        f"{outcome.kills} kills, {outcome.ended} ended by themselves; {outcome.archived} sagas archived, "
        f"{outcome.restored} in the table; ledger {dict(outcome.states)}"
    )
    for problem in outcome.problems[:20]:
        print(f"! {problem}")  # noqa: T201 - as above
    return int(bool(outcome.problems or outcome.ended))


if __name__ == "__main__":
    sys.exit(main())
