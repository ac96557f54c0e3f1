"""Failures that pass: hidden where nothing can have been written, and otherwise told.

=============================================  ========================================================
what happens                                   what the caller gets
=============================================  ========================================================
pooled connections died while nobody used them  nothing: they are replaced before anything is sent
the server is down, and comes back in time     nothing: connecting is tried again
the server is down for longer                  StorageUnavailableError, when the time is up
too many connections                           likewise, as long as there are too many
the connection is lost while reading           nothing: the read is repeated
a deadlock, a serialization failure            nothing: PostgreSQL has rolled back, and the call is repeated
a standby, until it is promoted                nothing: each attempt connects anew
a standby that stays one                       StorageUnavailableError that says so, when the time is up
the pool is exhausted                          StorageUnavailableError after pool_timeout; that was the waiting
a setting is wrong                             StorageUnavailableError at once, where the driver tells
any of this in the caller's transaction        StorageUnavailableError at once: the transaction is gone
a write without a version, and its answer lost  UnknownOutcomeError: see test_repository
=============================================  ========================================================
"""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from saga_store import InvalidSagaDataError, SagaStatus, StorageUnavailableError
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing.postgres.cluster import embedded
from tests.connections import engine_on, lock_table, until_blocked
from tests.databases import ALEMBIC_INI, Database
from tests.proxy import Cut, Proxy
from tests.scene import BRIEFLY, NEVER, PATIENT, Scene, until

MakeEngine = Callable[..., AsyncEngine]
POOLED = 5
NOTICED = pytest.mark.parametrize("turns", [0, 50], ids=["unnoticed", "noticed by the event loop"])


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def fill_pool(engine: AsyncEngine) -> set[int]:
    """Have as many connections in the pool as it keeps; returns the backends' process ids."""
    connections = [await engine.connect() for _ in range(POOLED)]
    pids = {(await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() for connection in connections}
    for connection in connections:
        await connection.close()
    return pids


def terminate(admin: psycopg.Connection, pids: set[int]) -> None:
    """End these backends, and wait until they are gone; the event loop doesn't get a turn meanwhile."""
    admin.execute("SELECT pg_terminate_backend(pid, 60000) FROM unnest(%s::int[]) AS pid", (list(pids),))


class TestStalePool:
    """Connections that died while they waited in the pool cost nobody an error, even with no time to retry."""

    @pytest.mark.parametrize("bind", ["engine", "sessionmaker"])
    @NOTICED
    async def test_backends_that_were_terminated(
        self, driver: str, make_engine: MakeEngine, admin: psycopg.Connection, bind: str, turns: int
    ) -> None:
        """Writes without a version, for which a lost connection would be an unknown outcome."""
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(
            engine if bind == "engine" else async_sessionmaker(engine), group_commit=False, retry_for=NEVER
        )
        pids = await fill_pool(engine)
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        terminate(admin, pids)
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        assert len(await storage.find_stale_sagas(stale_after=NEVER)) == 2 * POOLED

    @NOTICED
    async def test_those_that_only_the_application_has_used(
        self, driver: str, make_engine: MakeEngine, admin: psycopg.Connection, turns: int
    ) -> None:
        engine = make_engine(driver)
        terminate(admin, await fill_pool(engine))
        for _ in range(turns):
            await asyncio.sleep(0)
        storage = SqlAlchemySagaStorage(engine, group_commit=False, retry_for=NEVER)
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        assert len(await storage.find_stale_sagas(stale_after=NEVER)) == POOLED

    async def test_one_that_was_terminated_costs_the_others_nothing(
        self, driver: str, make_engine: MakeEngine, admin: psycopg.Connection
    ) -> None:
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine, group_commit=False, retry_for=NEVER)
        pids = await fill_pool(engine)
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        terminate(admin, {pids.pop()})
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        assert pids <= await fill_pool(engine)

    async def test_a_connection_that_works_is_kept(self, driver: str, make_engine: MakeEngine) -> None:
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine, group_commit=False)
        pids = await fill_pool(engine)
        for _ in range(3):
            await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(POOLED)))
        assert await fill_pool(engine) == pids


class TestServerThatIsDown:
    @pytest.mark.parametrize(("driver", "group_commit"), [("asyncpg", True), ("psycopg", False)])
    async def test_calls_made_while_it_restarts_succeed(
        self, tmp_path: Path, driver: str, *, group_commit: bool
    ) -> None:
        """The pool is full of connections to a server that is gone; the proxy stays where it is."""
        with ExitStack() as first:
            server = first.enter_context(embedded(data=tmp_path))
            await asyncio.to_thread(migrate, server.url)
            async with (
                Proxy.before(server.url) as (proxy, url),
                engine_on(url.set(drivername=f"postgresql+{driver}")) as engine,
            ):
                storage = SqlAlchemySagaStorage(engine, group_commit=group_commit, retry_for=PATIENT)
                ids = [uuid4() for _ in range(POOLED)]
                await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in ids))
                await fill_pool(engine)
                first.close()
                came = proxy.connections
                calls = [
                    *(storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1) for saga_id in ids),
                    *(storage.get_step_history(saga_id) for saga_id in ids),
                    storage.claim_sagas(owner="me", lease=NEVER, limit=0, stale_after=NEVER),
                ]
                tasks = [asyncio.ensure_future(call) for call in calls]
                await until(lambda: proxy.connections > came + 1)
                with embedded(data=tmp_path) as server:
                    proxy.target = make_url(server.url).port or 0
                    await asyncio.gather(*tasks)
                    assert {(await storage.get_saga(saga_id)).version for saga_id in ids} == {2}

    async def test_one_that_stays_down(self, driver: str) -> None:
        """When the time is up: nothing was written."""
        async with engine_on(f"postgresql+{driver}://nobody@127.0.0.1:1/none") as engine:
            storage = SqlAlchemySagaStorage(engine, retry_for=BRIEFLY)
            with pytest.raises(StorageUnavailableError, match="couldn't get a connection"):
                await storage.create_saga(uuid4(), "order", {})
            with pytest.raises(StorageUnavailableError, match="couldn't get a connection"):
                await storage.get_saga(uuid4())

    async def test_a_read_whose_answer_is_lost_is_repeated(self, database: Database, driver: str) -> None:
        async with Scene.on(database, driver, retry_for=PATIENT) as scene:
            for cut in (Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER):
                await scene.storage.get_saga(scene.saga_id)
                scene.proxy.cut = cut
                assert (await scene.storage.get_saga(scene.saga_id)).version == 1
                assert scene.proxy.cut is None


class TestStandby:
    async def test_a_failover(self, tmp_path: Path) -> None:
        """A real standby: told apart by its error, and once it has been promoted the same call succeeds."""
        with embedded(data=tmp_path) as server:
            await asyncio.to_thread(migrate, server.url)
        (tmp_path / "cluster" / "standby.signal").touch()
        with (
            embedded(data=tmp_path) as server,
            psycopg.connect(server.url, autocommit=True) as admin,
        ):
            assert admin.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            url = make_url(server.url).set(drivername="postgresql+asyncpg")
            async with engine_on(url) as engine:
                with pytest.raises(StorageUnavailableError, match=r"standby.*target_session_attrs=read-write") as info:
                    await SqlAlchemySagaStorage(engine, retry_for=BRIEFLY).create_saga(uuid4(), "order", {})
                assert info.value.sqlstate == "25006"

                saga_id = uuid4()
                storage = SqlAlchemySagaStorage(engine, retry_for=PATIENT)
                write = asyncio.ensure_future(storage.create_saga(saga_id, "order", {}))
                await asyncio.to_thread(admin.execute, "SELECT pg_promote()")
                await write
                assert (await storage.get_saga(saga_id)).version == 1

    async def test_each_attempt_connects_anew(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """A connection keeps the settings that it began with, and leads to the server that it began with."""
        engine = make_engine(driver)
        set_read_only = SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format
        name = Identifier(admin.info.dbname)
        admin.execute(set_read_only(name, Literal("on")))
        with pytest.raises(StorageUnavailableError):
            await SqlAlchemySagaStorage(engine, retry_for=NEVER).create_saga(uuid4(), "order", {})
        storage = SqlAlchemySagaStorage(engine, retry_for=PATIENT)
        write = asyncio.ensure_future(storage.create_saga(uuid4(), "order", {}))
        await asyncio.sleep(0)
        admin.execute("SET default_transaction_read_only = off")
        admin.execute(set_read_only(name, Literal("off")))
        await write


class TestTooManyConnections:
    async def test_a_call_waits_for_one(self, database: Database, driver: str, admin: psycopg.Connection) -> None:
        role = Identifier(f"limited_{database.name}")
        admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' CONNECTION LIMIT 1").format(role))
        try:
            admin.execute(SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(role))
            url = make_url(database.url(driver)).set(username=f"limited_{database.name}", password="secret")  # noqa: S106 - a role of this test's
            async with engine_on(url) as holder, engine_on(url) as engine:
                connection = await holder.connect()
                with pytest.raises(StorageUnavailableError, match="too many connections"):
                    await SqlAlchemySagaStorage(engine, retry_for=NEVER).find_stale_sagas(stale_after=NEVER)
                storage = SqlAlchemySagaStorage(engine, retry_for=PATIENT)
                read = asyncio.ensure_future(storage.find_stale_sagas(stale_after=NEVER))
                await asyncio.sleep(0)
                await connection.close()
                await holder.dispose()
                assert await read == []
        finally:
            admin.execute(SQL("DROP OWNED BY {}").format(role))
            admin.execute(SQL("DROP ROLE {}").format(role))


class TestRolledBack:
    async def test_a_serialization_failure_is_repeated(
        self, database: Database, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """Somebody changed the row since the statement began, which REPEATABLE READ doesn't allow."""
        admin.execute(
            SQL("ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'").format(
                Identifier(admin.info.dbname)
            )
        )
        engine = make_engine(driver)
        saga_id = uuid4()
        await SqlAlchemySagaStorage(engine).create_saga(saga_id, "order", {})
        for retry_for in (NEVER, PATIENT):
            storage = SqlAlchemySagaStorage(engine, group_commit=False, retry_for=retry_for)
            async with AsyncSession(engine) as holder:
                await lock_table(holder)
                await SqlAlchemySagaStorage(holder).update_context(saga_id, {"n": 1})
                write = asyncio.ensure_future(storage.update_context(saga_id, {"n": 2}))
                await until_blocked(database)
                await holder.commit()
                if retry_for == NEVER:
                    with pytest.raises(StorageUnavailableError) as info:
                        await write
                    assert info.value.sqlstate == "40001"
                else:
                    await write
        assert (await SqlAlchemySagaStorage(engine).get_saga(saga_id)).version == 4

    async def test_in_a_transaction_of_the_callers_it_is_told(
        self, database: Database, make_engine: MakeEngine, driver: str
    ) -> None:
        engine = make_engine(driver, isolation_level="REPEATABLE READ")
        saga_id = uuid4()
        await SqlAlchemySagaStorage(engine).create_saga(saga_id, "order", {})
        async with AsyncSession(engine) as holder, AsyncSession(engine) as session:
            await SqlAlchemySagaStorage(holder).update_context(saga_id, {"n": 1})
            storage = SqlAlchemySagaStorage(session, retry_for=PATIENT)
            write = asyncio.ensure_future(storage.update_context(saga_id, {"n": 2}))
            await until_blocked(database)
            await holder.commit()
            with pytest.raises(StorageUnavailableError) as info:
                await write
            assert info.value.sqlstate == "40001"
            await session.rollback()


class TestNotRetried:
    """What no waiting mends is told at once: these would last for a minute otherwise."""

    async def test_an_exhausted_pool(self, driver: str, make_engine: MakeEngine) -> None:
        """The pool has waited already, and the error says what to do."""
        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=0.01)
        async with engine.connect():
            with pytest.raises(StorageUnavailableError, match="larger pool_size or a longer pool_timeout"):
                async with asyncio.timeout(30):
                    await SqlAlchemySagaStorage(engine, retry_for=PATIENT).get_saga(uuid4())

    async def test_a_wrong_password(self, database: Database) -> None:
        """asyncpg says that it is that; psycopg doesn't tell it from a server that is down."""
        async with Proxy.before(database.url("asyncpg")) as (proxy, url), engine_on(url.set(password="x")) as engine:  # noqa: S106 - wrong on purpose
            with pytest.raises(StorageUnavailableError, match="password") as info:
                await SqlAlchemySagaStorage(engine, retry_for=PATIENT).get_saga(uuid4())
            assert info.value.sqlstate == "28P01"
            assert proxy.connections == 1

    @pytest.mark.parametrize("wrong", [timedelta(seconds=-1), 5])
    async def test_a_wrong_setting(self, make_engine: MakeEngine, driver: str, wrong: object) -> None:
        with pytest.raises(InvalidSagaDataError, match="retry_for"):
            SqlAlchemySagaStorage(make_engine(driver), retry_for=wrong)  # type: ignore[arg-type] # wrong on purpose


def migrate(url: str) -> None:
    config = Config(str(ALEMBIC_INI))
    config.attributes["url"] = make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    command.upgrade(config, "head")
