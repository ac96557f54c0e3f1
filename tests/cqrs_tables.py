"""python-cqrs's own tables, rows of all kinds in them, and its own storage writing to them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import psycopg
from cqrs.saga.storage.enums import SagaStatus, SagaStepStatus
from cqrs.saga.storage.sqlalchemy import Base, SqlAlchemySagaStorage
from sqlalchemy import create_engine
from sqlalchemy.exc import NotSupportedError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from tests.databases import Database

SAGAS = 700
ENTRIES_OF_EACH = 2

# A process reads again after each change of a type; there are a few on the way.
MOST_STALE_READS = 5

# In what its tables differ from those of 4.7 to 5.3.
OLDER = {
    "4.4.1": "ALTER TABLE saga_executions DROP COLUMN version, DROP COLUMN recovery_attempts",
    "4.6.5": "ALTER TABLE saga_executions DROP COLUMN recovery_attempts",
    "5.3.0": "SELECT 1",
}

# Values that would show a conversion: what jsonb or a float would change, ties, and NULLs.
_ROWS = """
INSERT INTO saga_executions (id, name, status, context, version, recovery_attempts, created_at, updated_at)
SELECT md5('saga ' || n)::uuid, left('Saga-' || n || repeat('é', n % 300), 255), s.labels[1 + n % 5],
    c.contexts[1 + n % 6]::json, 1 + n % 90, n % 6,
    timestamptz '2024-02-29 12:00:00.123456+02' + n * interval '7 min', timestamptz '2024-03-01' + n * interval '1 s'
FROM generate_series(1, {sagas}) n,
    (SELECT enum_range(NULL::sagastatus)) s(labels),
    (SELECT ARRAY[
        '{{}}', '{{"b": 1e16, "a": -0.0,  "b2": [1, null, true]}}', '{{"nul": "\\u0000", "lone": "\\ud800"}}',
        '{{"twice": 1, "twice": 2}}', '{{"text": "' || repeat('naïve 💶 ', 300) || '"}}',
        '{{"n": 12345678901234567890}}'
    ]) c(contexts);
INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
SELECT md5('saga ' || 1 + n % {sagas})::uuid, 'step-' || n % 7, CASE n % 3 WHEN 0 THEN 'compensate' ELSE 'act' END,
    s.labels[1 + n % 4], CASE n % 4 WHEN 0 THEN repeat('why? ', n % 50) END,
    timestamptz '2024-03-01' + (n / 3) * interval '1 s'
FROM generate_series(1, {entries}) n, (SELECT enum_range(NULL::sagastepstatus)) s(labels)
"""

# Every column that python-cqrs knows, as text, whatever its type is now.
_DIGEST = """
SELECT 'saga_executions', count(*), md5(string_agg(ROW(id, name, status::text, context::text, version,
    recovery_attempts, created_at, updated_at)::text, '|' ORDER BY id)) FROM saga_executions WHERE id IN {ids}
UNION ALL
SELECT 'saga_logs', count(*), md5(string_agg(ROW(id, saga_id, step_name, action::text, status::text, details,
    created_at)::text, '|' ORDER BY id)) FROM saga_logs WHERE saga_id IN {ids}
"""
_SEEDED = f"(SELECT md5('saga ' || n)::uuid FROM generate_series(1, {SAGAS}) n)"  # noqa: S608 - a number of ours


def create_tables(database: Database) -> None:
    """Let python-cqrs make its tables, and fill them."""
    engine = create_engine(database.url("psycopg"), poolclass=NullPool)
    Base.metadata.create_all(engine)
    with psycopg.connect(database.url()) as connection:
        connection.execute(_ROWS.format(sagas=SAGAS, entries=SAGAS * ENTRIES_OF_EACH).encode())
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute("ANALYZE")


@contextmanager
def connected(database: Database) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database.url(), autocommit=True) as connection:
        yield connection


def execute(database: Database, statements: str) -> None:
    with connected(database) as connection:
        connection.execute(statements.encode())


def digest(database: Database) -> list[tuple[object, ...]]:
    """Return the number of the seeded rows, and a digest over all of their columns."""
    with connected(database) as connection:
        return connection.execute(_DIGEST.format(ids=_SEEDED).encode()).fetchall()


def undone(before: set[tuple[str | None, ...]]) -> set[tuple[str | None, ...]]:
    """Return what an adoption and its undoing leave: versions keep a default, for processes that set none."""
    version = {fact for fact in before if fact[:2] == ("column", "saga_executions") and "version" in str(fact[2])}
    return before - version | {(*fact[:3], "1", *fact[4:]) for fact in version}


@asynccontextmanager
async def old_storage(database: Database, driver: str, **options: object) -> AsyncIterator[SqlAlchemySagaStorage]:
    """python-cqrs's storage, as one of its processes has it."""
    engine = create_async_engine(database.url(driver), **options)
    try:
        yield SqlAlchemySagaStorage(async_sessionmaker(engine))
    finally:
        await engine.dispose()


@dataclass
class OldProcess:
    """Goes on writing and reading with python-cqrs's storage, and notes what was acknowledged."""

    storage: SqlAlchemySagaStorage
    written: dict[UUID, list[str]] = field(default_factory=dict)
    stale_reads: int = 0
    stopped: bool = False

    async def work(self) -> None:
        """Take one saga after another through its life, until told to stop; any error but a stale read ends it."""
        while not self.stopped:
            await self.one_saga()

    async def one_saga(self) -> UUID:
        saga_id = uuid4()
        await self.storage.create_saga(saga_id, "OrderSaga", {"order": str(saga_id), "items": []})
        entries = self.written[saga_id] = []
        await self.storage.update_status(saga_id, SagaStatus.RUNNING)
        for step in ("reserve", "pay"):
            await self.storage.log_step(saga_id, step, "act", SagaStepStatus.STARTED)
            entries.append(f"{step} STARTED")
            await self.storage.update_context(saga_id, {"order": str(saga_id), "items": [step]})
            await self._read(saga_id)
        async with self.storage.create_run() as run:
            await run.update_context(saga_id, {"order": str(saga_id), "items": ["reserve", "pay", "ship"]})
            await run.log_step(saga_id, "ship", "act", SagaStepStatus.COMPLETED, "done")
            await run.update_status(saga_id, SagaStatus.COMPLETED)
            await asyncio.sleep(0)
            await run.commit()
        entries.append("ship COMPLETED")
        await self.storage.get_sagas_for_recovery(limit=5)
        return saga_id

    async def _read(self, saga_id: UUID) -> None:
        """Read state and history; what a prepared statement returned may have changed its type, which is said once."""
        for attempt in range(MOST_STALE_READS + 1):
            try:
                status, context, _ = await self.storage.load_saga_state(saga_id)
                history = await self.storage.get_step_history(saga_id)
            except NotSupportedError as exc:
                if "cached statement plan is invalid" not in str(exc) or attempt == MOST_STALE_READS:
                    raise
                self.stale_reads += 1
            else:
                assert status is SagaStatus.RUNNING
                assert context["order"] == str(saga_id)
                assert [f"{entry.step_name} {entry.status.name}" for entry in history] == self.written[saga_id]
                return


@asynccontextmanager
async def working(*processes: OldProcess) -> AsyncIterator[None]:
    """Let them work meanwhile; on leaving, each of them has seen to it that it can still do a whole saga."""
    tasks = [asyncio.create_task(process.work()) for process in processes]
    try:
        yield
    finally:
        for process in processes:
            process.stopped = True
        await asyncio.gather(*tasks)
    for process in processes:
        await process.one_saga()


def missing(database: Database, process: OldProcess) -> list[tuple[UUID, list[str]]]:
    """Return what was acknowledged, and isn't in the tables exactly once and in order."""
    query = """
        SELECT l.saga_id, array_agg(step_name || ' ' || status::text ORDER BY l.id) FROM saga_logs l GROUP BY saga_id
    """
    with connected(database) as connection:
        stored = dict(connection.execute(query).fetchall())
    return [(saga_id, entries) for saga_id, entries in process.written.items() if stored.get(saga_id, []) != entries]
