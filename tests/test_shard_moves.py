"""A shard moves to another server, by what docs/scale.md says: nothing is lost, and nobody writes in between."""

import asyncio
import itertools
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import cast
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import (
    Checkpoint,
    LogStep,
    SagaStatus,
    SagaStepStatus,
    SchemaError,
    ShardingError,
    StorageUnavailableError,
    UnknownOutcomeError,
    schema,
)
from saga_store.grants import grants
from saga_store.retention_model import Restored
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing.postgres import RestartableServer, restartable
from saga_store.testing.retention import RetentiveStorage, let_go
from tests.databases import Database, Databases
from tests.programs import client_programs, psql
from tests.test_shards import NOW, PAGE, fill


def dump_of(database: Database) -> str:
    """Return the schema with its rows, as the page has it dumped."""
    line = [str(client_programs() / "pg_dump"), "--schema=public", "--no-owner", "-d", database.url()]
    script = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    # Which a pg_dump that is newer than the servers sets, and these don't have.
    return script.replace("SET transaction_timeout = 0;\n", "")


async def test_by_dump_and_restore(databases: Databases, template: Database, empty_database: Database) -> None:
    """As the page tells: its sagas pause, nothing is lost, its sequence goes on, and old and new aren't both taken."""
    async with AsyncExitStack() as stack:
        places = [stack.enter_context(databases.clone(template)) for _ in range(2)]
        first, old, new = engines = [create_async_engine(place.url("psycopg")) for place in (*places, empty_database)]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        before = ShardedSagaStorage([SqlAlchemySagaStorage(engine, retry_for=NOW) for engine in (first, old)])
        ids = await fill(before)
        for saga_id in itertools.chain.from_iterable(ids):
            await before.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        stayed = [(await before.get_saga(saga_id), await before.get_step_history(saga_id)) for saga_id in ids[1]]
        with psycopg.connect(places[1].url(), autocommit=True) as connection:
            connection.execute("ALTER SCHEMA public RENAME TO moved")
        with pytest.raises(SchemaError):
            await before.update_context(ids[1][0], {"n": 1})
        with psycopg.connect(places[1].url(), autocommit=True) as connection:
            connection.execute("ALTER SCHEMA moved RENAME TO public")
        done = await asyncio.to_thread(psql, empty_database, "DROP SCHEMA public;\n" + dump_of(places[1]))
        assert done.returncode == 0, done.stderr

        after = ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in (first, new)])
        moved = [(await after.get_saga(saga_id), await after.get_step_history(saga_id)) for saga_id in ids[1]]
        assert moved == stayed
        await after.log_step(ids[1][0], "pay", "act", SagaStepStatus.COMPLETED)
        assert len(await after.get_step_history(ids[1][0])) == 2
        both = ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in (old, new)])
        with pytest.raises(ShardingError, match="one is a copy of the other"):
            await both.find_sagas()


BLOCKS = re.compile(
    r"^```sql\n-- on (the old server|the new server|shard \d|each shard)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
NOTED = re.compile(r"'[0-9A-F]+/[0-9A-F]+'|(?<= )[0-9]{7}(?=\))")
SCHEMA = "saga_03"
PATIENCE_SECONDS = 60
PAID = LogStep("pay", "act", SagaStepStatus.COMPLETED)
PASSWORD = "none-of-a-secret"  # noqa: S105 - the role ends with its server


class Typist:
    """Types the page's SQL on the servers that it is for, which go by the words that it has for them."""

    def __init__(self, begins: str, servers: Mapping[str, str]) -> None:
        section = PAGE.partition(begins)[2].partition("\n## ")[0]
        self._blocks = BLOCKS.findall(section)
        self._servers = servers
        self._noted = ""

    @property
    def is_done(self) -> bool:
        return not self._blocks

    def type_until(self, mark: str) -> None:
        """Type what stands before the block that has this in it, and that block."""
        while True:
            where, told, block = self._blocks.pop(0)
            self._type(where, told, block)
            if mark in block:
                return

    def _type(self, where: str, told: str, block: str) -> None:
        if "with what was noted" in told:
            block, count = NOTED.subn(
                lambda found: f"'{self._noted}'" if found[0].startswith("'") else self._noted, block
            )
            assert count == 1, block
        old = make_url(self._servers["the old server"]).translate_connect_args(username="user", database="dbname")
        block = block.replace(
            "host=old port=5432 dbname=sagas user=replicator password=...",
            " ".join(f"{name}={value}" for name, value in old.items()),
        )
        for name, url in self._servers.items():
            if name == where or (where == "each shard" and name.startswith("shard")):
                with psycopg.connect(url, autocommit=True) as admin:
                    self._type_on(admin, told, block)

    def _type_on(self, admin: psycopg.Connection, told: str, block: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            rows = [self._run(admin, statement) for statement in block.split(";\n") if statement.strip()]
            if "until it is true" not in told or rows == [True]:
                break
            assert time.monotonic() < deadline, block
            time.sleep(0.05)
        if "note it" in told:
            self._noted = str(rows[0])

    @staticmethod
    def _run(admin: psycopg.Connection, statement: str) -> object:
        cursor = admin.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def driven(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def as_app(url: str) -> str:
    return make_url(driven(url)).set(username="app", password=PASSWORD).render_as_string(hide_password=False)


def let_app_in(url: str, name: str = SCHEMA) -> None:
    """Make the application's role, with what the command grants it."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'".encode())
        admin.execute(f"GRANT USAGE ON SCHEMA {name} TO app".encode())
        admin.execute(grants("app", schema=name).encode())


def restart(server: RestartableServer) -> None:
    """In this thread: it dies with the one that started it."""
    server.stop(signal.SIGINT)
    server.start()
    server.wait_until_ready()


@pytest.fixture
def servers() -> Iterator[tuple[RestartableServer, RestartableServer]]:
    with restartable() as old, restartable() as new:
        yield old, new


class Writer:
    """Logs step after step, to one saga after the other, until their shard is gone."""

    def __init__(self, storage: SagaStorage, ids: Sequence[UUID]) -> None:
        self._storage = storage
        self._turns = itertools.cycle(ids)
        self.acknowledged = dict.fromkeys(ids, 0)
        self.in_doubt: UUID | None = None

    async def write(self) -> None:
        for saga_id in self._turns:
            step = f"step-{self.acknowledged[saga_id]}"
            try:
                await self._storage.log_step(saga_id, step, "act", SagaStepStatus.COMPLETED)
            except StorageUnavailableError:
                return
            except UnknownOutcomeError:
                self.in_doubt = saga_id
                return
            self.acknowledged[saga_id] += 1
            await asyncio.sleep(0.002)

    async def compare(self, moved: ShardedSagaStorage) -> None:
        """See that each history has what was acknowledged, in order, and nothing else."""
        for saga_id, count in self.acknowledged.items():
            steps = [entry.step_name for entry in await moved.get_step_history(saga_id)]
            assert count
            assert steps == [f"step-{number}" for number in range(len(steps))]
            assert len(steps) in ({count, count + 1} if saga_id == self.in_doubt else {count})


async def test_by_logical_replication(
    databases: Databases, template: Database, servers: tuple[RestartableServer, RestartableServer]
) -> None:
    """While its sagas go on, with a pause at the end: rows, histories, stubs, the ledger and the sequence are there."""
    old, new = (server.facts.url for server in servers)
    typist = Typist("**By logical replication**", {"the old server": old, "the new server": new})
    await asyncio.to_thread(typist.type_until, "wal_level")
    restart(servers[0])
    for url in (old, new):
        await asyncio.to_thread(schema.upgrade, driven(url), schema=SCHEMA, create_schema=True)
    await asyncio.to_thread(let_app_in, old)
    async with AsyncExitStack() as stack:
        there = stack.enter_context(databases.clone(template)).url("psycopg")
        engines = [create_async_engine(url) for url in (there, as_app(old), as_app(new), driven(old))]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        stays, before, after, owner = (
            SqlAlchemySagaStorage(engine, schema=None if engine is engines[0] else SCHEMA, retry_for=NOW)
            for engine in engines
        )
        storage, moved = ShardedSagaStorage([stays, before]), ShardedSagaStorage([stays, after])
        [_, [archived, *ids]] = await fill(storage, 4)
        await storage.save(Checkpoint(archived, status=SagaStatus.COMPLETED, steps=[PAID] * 50))
        archive, _ = await let_go(cast("RetentiveStorage", owner), archived)  # the application's role may not

        writer = Writer(storage, ids)
        writing = asyncio.create_task(writer.write())
        await asyncio.to_thread(typist.type_until, "bool_and(srsubstate")
        assert not writing.done()
        await asyncio.to_thread(typist.type_until, "pg_terminate_backend")
        await asyncio.wait_for(writing, PATIENCE_SECONDS)
        await assert_paused(storage, before, ids[0])

        await asyncio.to_thread(typist.type_until, "DROP SUBSCRIPTION")
        await asyncio.to_thread(schema.check, driven(new), schema=SCHEMA)
        await asyncio.to_thread(let_app_in, new)
        assert (await moved.find_sagas()).missing == ()
        await writer.compare(moved)
        await assert_goes_on(moved, ids)
        stub = await moved.find_stub(archived)
        assert stub is not None
        assert stub.archive == replace(archive, removed=1)
        with pytest.raises(ShardingError, match="both are shard 1 of 2"):
            await ShardedSagaStorage([owner, after]).find_sagas()
        await asyncio.to_thread(typist.type_until, "DROP SCHEMA")
        assert typist.is_done


async def assert_paused(storage: ShardedSagaStorage, shard: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    """Reads, writes and claims are refused by the shard that moves, and the other one goes on."""
    for call in (
        storage.get_saga(saga_id),
        storage.update_context(saga_id, {"n": 1}),
        shard.claim_sagas(owner="a", lease=NOW, limit=10, stale_after=NOW),
    ):
        with pytest.raises(StorageUnavailableError):
            await call
    claimed = await storage.claim_sagas(owner="a", lease=NOW, limit=10, stale_after=NOW)
    assert {storage.shard_of(saga.id) for saga in claimed} == {0}
    assert (await storage.find_sagas()).missing == (1,)


async def assert_goes_on(moved: ShardedSagaStorage, ids: Sequence[UUID]) -> None:
    """New entries have ids that none has had, and its sagas are claimed."""
    histories = [await moved.get_step_history(saga_id) for saga_id in ids]
    last = max(entry.id for history in histories for entry in history)
    await moved.log_step(ids[0], "later", "act", SagaStepStatus.COMPLETED)
    assert (await moved.get_step_history(ids[0]))[-1].id > last
    claimed = await moved.claim_sagas(owner="a", lease=NOW, limit=100, stale_after=NOW)
    assert set(ids) <= {saga.id for saga in claimed}


async def test_from_one_database_to_two(servers: tuple[RestartableServer, RestartableServer]) -> None:
    """As the page tells: each saga is in its shard with its history, and in no other, and all go on."""
    old, new = (server.facts.url for server in servers)
    if int(servers[0].facts.version.partition(".")[0]) < 18:
        pytest.skip("the page says that it takes PostgreSQL 18, whose crc32 a publication can filter by")
    with psycopg.connect(old, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET wal_level = 'logical'")
    restart(servers[0])
    with psycopg.connect(new, autocommit=True) as admin:
        admin.execute("CREATE DATABASE shard_1")
    shards = [new, new.rpartition("/")[0] + "/shard_1"]
    for url in (old, *shards):
        await asyncio.to_thread(schema.upgrade, driven(url))
    await asyncio.to_thread(let_app_in, old, "public")
    typist = Typist(
        "**Move all of them", {"the old server": old, **{f"shard {place}": url for place, url in enumerate(shards)}}
    )
    async with AsyncExitStack() as stack:
        engines = [create_async_engine(url) for url in (as_app(old), driven(old), *map(driven, shards))]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        before, owner, *after = (SqlAlchemySagaStorage(engine, retry_for=NOW) for engine in engines)
        ids = [uuid4() for _ in range(40)]
        for saga_id in ids:
            await before.save(Checkpoint(saga_id, name="order", context={"id": str(saga_id)}))
        archived = ids.pop()
        await before.save(Checkpoint(archived, status=SagaStatus.COMPLETED, steps=[PAID]))
        archive, record = await let_go(cast("RetentiveStorage", owner), archived)

        writer = Writer(before, ids)
        writing = asyncio.create_task(writer.write())
        await asyncio.to_thread(typist.type_until, "bool_and(srsubstate")
        assert not writing.done()
        await asyncio.to_thread(typist.type_until, "pg_terminate_backend")
        await asyncio.wait_for(writing, PATIENCE_SECONDS)
        while not typist.is_done:
            await asyncio.to_thread(typist.type_until, "")

        sharded = ShardedSagaStorage(after)
        found = [{saga.id for saga in (await shard.find_sagas(limit=100)).sagas} for shard in after]
        assert found == [{one for one in (*ids, archived) if sharded.shard_of(one) == place} for place in (0, 1)]
        assert all(found)
        await writer.compare(sharded)
        for saga_id in ids:
            assert await sharded.get_saga(saga_id) == await owner.get_saga(saga_id)
        await assert_goes_on(sharded, ids)
        stub = await sharded.find_stub(archived)
        assert stub is not None
        assert stub.archive == replace(archive, removed=1)
        assert await sharded.restore_saga(record, archive_id=archive.id) is Restored.RESTORED
