"""What applications do to their drivers, pools and loops; what they put into our tables by SQL; and who holds locks."""

import asyncio
import decimal
import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import uvloop
from psycopg.adapt import Dumper, Loader
from psycopg.rows import dict_row
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import QueuePool

from saga_store import (
    Checkpoint,
    LogStep,
    SagaStatus,
    SagaStepStatus,
    SagaUnreadableError,
    UnknownOutcomeError,
)
from saga_store.recovery import RecoveryWorker
from saga_store.run import SagaRun
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on, until_blocked
from tests.databases import Database
from tests.houses.life import MINUTE, NOW, live_through
from tests.scene import until

MakeEngine = Callable[..., AsyncEngine]
STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)


class BrokenError(Exception):
    """What a codec of the application's raises."""


def broken(*_: object) -> Any:  # noqa: ANN401 - never
    raise BrokenError


TYPES = ("uuid", "timestamptz", "numeric", "text", "varchar", "bytea", "int8", "int4", "bool", "interval")


class TestCodecs:
    @pytest.mark.parametrize("how", ["broken", "other types"])
    async def test_of_asyncpg(self, make_engine: MakeEngine, how: str) -> None:
        """Registered for the types that our tables have, with all their arrays."""
        engine = make_engine("asyncpg")

        @event.listens_for(engine.sync_engine, "connect")
        def register(connection: Any, _: object) -> None:  # noqa: ANN401 - SQLAlchemy's
            for name in (
                "uuid",
                "timestamptz",
                "numeric",
                "text",
                "varchar",
                "bytea",
                "int8",
                "int4",
                "bool",
                "interval",
            ):
                encoder, decoder = (broken, broken) if how == "broken" else (str, str)
                connection.run_async(
                    lambda driver, name=name, encoder=encoder, decoder=decoder: driver.set_type_codec(
                        name, schema="pg_catalog", encoder=encoder, decoder=decoder, format="text"
                    )
                )

        storage = SqlAlchemySagaStorage(engine)
        await live_through(storage)
        async with AsyncSession(engine) as session:
            await live_through(SqlAlchemySagaStorage(session))
            await session.commit()

    @pytest.mark.parametrize("scope", ["connection", "global"])
    async def test_of_psycopg(self, make_engine: MakeEngine, scope: str) -> None:
        """Dumpers and loaders, row and cursor factories."""

        class BrokenLoader(Loader):
            def load(self, _data: object) -> Any:  # noqa: ANN401 - never
                raise BrokenError

        class BrokenDumper(Dumper):
            def dump(self, _obj: object) -> Any:  # noqa: ANN401 - never
                raise BrokenError

        class Cursor(psycopg.AsyncCursor[Any]):
            async def fetchall(self) -> Any:  # noqa: ANN401 - never
                raise BrokenError

        def register(adapters: Any) -> None:  # noqa: ANN401 - of one or all
            for name in ("uuid", "timestamptz", "json", "numeric", "text", "varchar", "bytea", "int8", "int4"):
                adapters.register_loader(name, BrokenLoader)
            for kind in (UUID, str, int, float, list, bytes, datetime, decimal.Decimal):
                adapters.register_dumper(kind, BrokenDumper)

        if scope == "global":
            program = (
                "import asyncio, sys, psycopg\n"
                "from tests.houses.test_drivers import broken_everywhere\n"
                "asyncio.run(broken_everywhere(sys.argv[1]))\n"
            )
            url = make_engine("psycopg").url.render_as_string(hide_password=False)
            await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, url], check=True)
            return
        engine = make_engine("psycopg")

        # At every checkout: SQLAlchemy makes a connection ready with statements of its own.
        @event.listens_for(engine.sync_engine, "checkout")
        def ready(connection: Any, *_: object) -> None:  # noqa: ANN401 - SQLAlchemy's
            driver = connection.driver_connection
            driver.row_factory, driver.cursor_factory = dict_row, Cursor
            register(driver.adapters)

        await live_through(SqlAlchemySagaStorage(engine))


async def broken_everywhere(url: str) -> None:
    """Break psycopg's adapters for a whole process, after SQLAlchemy has connected, and live on."""
    engine = create_async_engine(url)
    async with engine.connect():
        pass

    class BrokenLoader(Loader):
        def load(self, _data: object) -> Any:  # noqa: ANN401 - never
            raise BrokenError

    for name in ("uuid", "timestamptz", "json", "numeric", "bytea", "int8", "bool"):
        psycopg.adapters.register_loader(name, BrokenLoader)
    await live_through(SqlAlchemySagaStorage(engine))
    await engine.dispose()


class TestTimeouts:
    async def test_a_driver_s_own_is_no_dead_server(self, make_engine: MakeEngine, admin: psycopg.Connection) -> None:
        """asyncpg's ``command_timeout``: unknown without a version, found out with one, and one connection goes."""
        engine = make_engine("asyncpg", connect_args={"command_timeout": 0.3})
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with engine.connect(), engine.connect(), engine.connect():
            pass
        before = set(engine.pool._pool._queue._queue) if isinstance(engine.pool, QueuePool) else set()  # type: ignore[attr-defined] # noqa: SLF001 - to see who is there
        with psycopg.connect(admin.info.dsn, password=admin.info.password) as holder:
            holder.execute("LOCK TABLE saga_executions IN EXCLUSIVE MODE")
            versioned = asyncio.create_task(storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1))
            await asyncio.sleep(0.4)
            with pytest.raises(UnknownOutcomeError):
                await SqlAlchemySagaStorage(engine, retry_for=NOW).update_context(saga_id, {"n": 1})
        await versioned
        assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING
        assert len(before) >= 1
        assert len(before & set(engine.pool._pool._queue._queue)) >= 1  # type: ignore[attr-defined] # noqa: SLF001 - likewise


class TestColumnsThatChange:
    async def test_while_the_application_runs(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """Later migrations do this to running releases; every kept plan is made anew, and nobody notices."""
        engine = make_engine(driver, pool_size=3)
        storage = SqlAlchemySagaStorage(engine)
        for _ in range(8):
            await live_through(storage)
        admin.execute("ALTER TABLE saga_executions ALTER COLUMN version TYPE bigint, ADD COLUMN seen_at timestamptz")
        admin.execute("ALTER TABLE saga_executions ALTER COLUMN lease_owner TYPE varchar(300)")
        admin.execute("ALTER TABLE saga_logs ALTER COLUMN step_name TYPE text, ADD COLUMN note text")
        for _ in range(3):
            await live_through(storage)


class TestLoops:
    def test_three_on_one_engine(self, database: Database, driver: str) -> None:
        """``asyncio.run`` again and again: what belongs to an ended loop is replaced before anything is sent."""
        engine = create_async_engine(database.url(driver))
        storage = SqlAlchemySagaStorage(engine)

        async def live() -> None:
            await storage.create_saga(uuid4(), "order", {})
            await live_through(storage)

        asyncio.run(live())
        asyncio.run(live())

        async def last() -> None:
            await live()
            await engine.dispose()

        asyncio.run(last())
        gc.collect()  # here, where it may be noticed

    def test_uvloop(self, database: Database, driver: str) -> None:
        async def live() -> None:
            async with engine_on(database.url(driver)) as engine:
                await live_through(SqlAlchemySagaStorage(engine))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
    async def test_eager_tasks(self, make_engine: MakeEngine, driver: str) -> None:
        """One in flight alone, one queued and cancelled, and one more: nobody waits for ever."""
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore] # since 3.12
        storage = SqlAlchemySagaStorage(make_engine(driver))
        try:
            await self._queue_and_cancel(storage)
            await live_through(storage)
        finally:
            asyncio.get_running_loop().set_task_factory(None)

    async def test_a_task_factory_that_knows_no_context(self, make_engine: MakeEngine, driver: str) -> None:
        asyncio.get_running_loop().set_task_factory(lambda loop, coroutine: asyncio.Task(coroutine, loop=loop))
        storage = SqlAlchemySagaStorage(make_engine(driver))
        try:
            await self._queue_and_cancel(storage)
            await live_through(storage)
        finally:
            asyncio.get_running_loop().set_task_factory(None)

    async def _queue_and_cancel(self, storage: SqlAlchemySagaStorage) -> None:
        for _ in range(5):
            alone = asyncio.create_task(storage.create_saga(uuid4(), "order", {}))
            queued = asyncio.create_task(storage.create_saga(uuid4(), "order", {}))
            await asyncio.sleep(0)
            queued.cancel()
            async with asyncio.timeout(20):
                await asyncio.gather(alone, queued, storage.create_saga(uuid4(), "order", {}), return_exceptions=True)
                await storage.create_saga(uuid4(), "order", {})


DAMAGES = {
    "a time": "created_at = '-infinity'",
    "a number": f"context = '{{\"n\": {'9' * 5000}}}'",
    "depth": f"context = '{'[' * 3000}{']' * 3000}'",
    "a list": "context = '[1]'",
    "a string": "context = '\"x\"'",
    "a far year": "created_at = '4713-01-01 BC'",
}


class TestUnreadableRows:
    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    async def test_one_stops_nobody(
        self,
        make_engine: MakeEngine,
        driver: str,
        admin: psycopg.Connection,
        damage: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Asked for it is named, lists and claims leave it out, a worker goes on, and a person can give it up."""
        storage = SqlAlchemySagaStorage(make_engine(driver))
        bad, *good = [uuid4() for _ in range(4)]
        for saga_id in (bad, *good):
            await storage.save(Checkpoint(saga_id, name="order", status=SagaStatus.RUNNING, steps=[STARTED]))
        admin.execute("UPDATE saga_executions SET updated_at = now() - interval '1 hour'")
        admin.execute(f"UPDATE saga_executions SET {damage} WHERE id = %s".encode(), [bad])  # noqa: S608 - as above
        caplog.set_level(logging.WARNING, logger="saga_store")

        with pytest.raises(SagaUnreadableError, match=str(bad)):
            await storage.get_saga(bad)
        with pytest.raises(SagaUnreadableError):
            await storage.load_saga_state(bad)
        assert {saga.id for saga in await storage.find_stale_sagas(stale_after=MINUTE)} <= set(good)
        assert str(bad) in caplog.text
        claimed = await storage.claim_sagas(owner="w", lease=NOW, limit=3, stale_after=MINUTE, backoff=NOW)
        assert {saga.id for saga in claimed} == set(good)
        admin.execute("UPDATE saga_executions SET updated_at = now() - interval '1 hour' WHERE id <> %s", [bad])

        async def handler(run: SagaRun) -> None:
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)
            await run.commit()

        worker = RecoveryWorker(storage, {"order": handler}, stale_after=MINUTE, backoff=NOW)
        await worker.poll()
        for saga_id in good:
            assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED
        await storage.give_up_saga(bad, by="ann", reason="its row is broken")
        assert admin.execute("SELECT status FROM saga_executions WHERE id = %s", [bad]).fetchone() == ("FAILED",)

    async def test_an_entry(self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection) -> None:
        storage = SqlAlchemySagaStorage(make_engine(driver))
        saga_id = uuid4()
        await storage.save(Checkpoint(saga_id, name="order", steps=[STARTED]))
        admin.execute("UPDATE saga_logs SET created_at = 'infinity'")
        with pytest.raises(SagaUnreadableError, match=r"entry .* of its history: a time is infinity"):
            await storage.get_step_history(saga_id)
        assert (await storage.get_saga(saga_id)).version == 1


class TestLocks:
    @pytest.mark.parametrize("options", [{}, {"pool_size": 3, "max_overflow": 0}, {"pool_size": 1, "max_overflow": 0}])
    async def test_a_forgotten_transaction_on_a_hundred_sagas(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection, options: dict[str, int]
    ) -> None:
        """It stalls those, and no read or write of any other; what it frees is written soon after."""
        engine = make_engine(driver, pool_timeout=5, **options)
        storage = SqlAlchemySagaStorage(engine)
        held, free = [uuid4() for _ in range(100)], [uuid4() for _ in range(10)]
        await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in held + free))
        with psycopg.connect(admin.info.dsn, password=admin.info.password) as forgotten:
            forgotten.execute("SELECT FROM saga_executions WHERE id = ANY (%s) FOR UPDATE", [held])
            created = uuid4()
            forgotten.execute("INSERT INTO saga_executions (id, name, context) VALUES (%s, 'order', '{}')", [created])
            stuck = [asyncio.create_task(storage.update_status(saga_id, SagaStatus.RUNNING)) for saga_id in held]
            stuck.append(asyncio.create_task(storage.create_saga(created, "order", {})))
            for number in range(20):
                await asyncio.gather(*(storage.update_context(saga_id, {"n": number}) for saga_id in free))
                await asyncio.gather(*(storage.get_saga(saga_id) for saga_id in [*free, held[number]]))
            assert not any(task.done() for task in stuck)
            forgotten.rollback()
        async with asyncio.timeout(30):
            await asyncio.gather(*stuck)

    async def test_one_of_several_locks_is_freed(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """A fifth saga doesn't wait for the four that a forgotten transaction holds."""
        storage = SqlAlchemySagaStorage(make_engine(driver))
        ids = [uuid4() for _ in range(5)]
        await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in ids))
        lock = "SELECT FROM saga_executions WHERE id = ANY (%s) FOR UPDATE"
        with psycopg.connect(admin.info.dsn, password=admin.info.password) as forgotten:
            forgotten.execute(lock, [ids[:4]])
            with psycopg.connect(admin.info.dsn, password=admin.info.password) as short:
                short.execute(lock, [ids[4:]])
                calls = [asyncio.create_task(storage.update_context(saga_id, {"n": 1})) for saga_id in ids]
                await asyncio.sleep(0.2)
            async with asyncio.timeout(20):
                await calls[4]
            assert not any(call.done() for call in calls[:4])
        await asyncio.gather(*calls)

    async def test_no_connection_is_held_meanwhile(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """Between two looks the pool has all its connections, and nobody waits in the server."""
        engine = make_engine(driver)
        for group_commit in (True, False):
            storage = SqlAlchemySagaStorage(engine, group_commit=group_commit)
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            with psycopg.connect(admin.info.dsn, password=admin.info.password) as forgotten:
                forgotten.execute("SELECT FROM saga_executions WHERE id = %s FOR UPDATE", [saga_id])
                stuck = asyncio.create_task(storage.update_context(saga_id, {"n": 1}))
                await asyncio.sleep(0.3)
                await until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined] # a QueuePool
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                assert admin.execute(waiting).fetchone() == (0,)
            await stuck


async def test_a_write_after_a_cancelled_one_can_come_first(
    database: Database, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
) -> None:
    """As docs/binds.md says: without a version the cancelled one may come later; with one, it can't."""
    engine = make_engine(driver)
    storage = SqlAlchemySagaStorage(engine, group_commit=False)
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {})
    with psycopg.connect(admin.info.dsn, password=admin.info.password) as holder:
        holder.execute("LOCK TABLE saga_executions IN EXCLUSIVE MODE")
        late = asyncio.create_task(storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1))
        await until_blocked(database)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
    version = (await storage.get_saga(saga_id)).version
    await storage.update_status(saga_id, SagaStatus.FAILED, expected_version=version)
    assert (await storage.get_saga(saga_id)).status is SagaStatus.FAILED
