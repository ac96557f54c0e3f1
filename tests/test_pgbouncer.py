"""The contract through a real PgBouncer in transaction mode, and what happens to an engine that isn't made for it.

The default is the contract over the binds and drivers that differ most; SAGA_STORE_TEST_PGBOUNCER=complete, or
`make pgbouncer`, runs it over all of them.
"""

import ast
import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import FunctionType
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from saga_store import (
    Checkpoint,
    ICheckpointStorage,
    LogStep,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    StorageUnavailableError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing import CheckpointUnit, TransactionContract, Transactions
from saga_store.testing.postgres import PostgresServer
from tests import test_contract
from tests.connections import engine_on, lock_table, until_blocked
from tests.databases import Database, Databases
from tests.pages import blocks_of
from tests.pgbouncer import ENGINE_OPTIONS, SETTINGS, pgbouncer
from tests.test_contract import DRIVERS, JOINING_BINDS, OWNING_BINDS, transaction_of, unit_of

DOCUMENT = "docs/limits.md"
COMPLETE = os.environ.get("SAGA_STORE_TEST_PGBOUNCER") == "complete"


@pytest.fixture(scope="module")
def direct(databases: Databases, template: Database) -> Iterator[Database]:
    """The database of all tests of this module, without PgBouncer; no contract needs an empty one."""
    with databases.clone(template) as database:
        yield database


@pytest.fixture(scope="module")
def database(server: PostgresServer, direct: Database) -> Iterator[Database]:
    with pgbouncer(server.url, pool_size=5) as bouncer:
        yield Database(bouncer.before(direct.address))


@pytest.fixture(scope="module")
def narrow(server: PostgresServer, direct: Database) -> Iterator[Database]:
    """The same database through two connections, each of which everybody uses in turn."""
    with pgbouncer(server.url, pool_size=2) as bouncer:
        yield Database(bouncer.before(direct.address))


def open_both_connections(narrow: Database) -> None:
    """Make PgBouncer open its second connection too, which it does only when the first is in use."""
    with psycopg.connect(narrow.url()) as one, psycopg.connect(narrow.url()) as other:
        for connection in (one, other):
            connection.execute("SELECT")


@asynccontextmanager
async def bound(bind: str, engine: AsyncEngine) -> AsyncIterator[SqlAlchemySagaStorage]:
    if bind in OWNING_BINDS:
        yield SqlAlchemySagaStorage(OWNING_BINDS[bind](engine))
    else:
        async with JOINING_BINDS[bind](engine) as joined:
            yield SqlAlchemySagaStorage(joined)


class TestContract(test_contract.TestPostgreSQL):
    @pytest.fixture(params=DRIVERS if COMPLETE else ["asyncpg"])
    def engine(self, request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
        return make_engine(request.param, **ENGINE_OPTIONS[request.param])

    @pytest.fixture(params=OWNING_BINDS if COMPLETE else ["engine"])
    def unit(self, request: pytest.FixtureRequest, engine: AsyncEngine) -> CheckpointUnit:
        return unit_of(request.param, engine)


class TransactionsThroughPgBouncer:
    @pytest.fixture(params=DRIVERS if COMPLETE else ["psycopg"])
    def engine(self, request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
        return make_engine(request.param, **ENGINE_OPTIONS[request.param])

    @pytest.fixture(params=JOINING_BINDS if COMPLETE else ["session"])
    def transaction(self, request: pytest.FixtureRequest, engine: AsyncEngine) -> Transactions[ICheckpointStorage]:
        return transaction_of(request.param, engine)


class TestTransactionContract(TransactionsThroughPgBouncer, test_contract.PostgreSQLFixtures, TransactionContract):
    """What only a caller's transaction has to do with; the whole contract takes its place if that is asked for."""

    __test__ = not COMPLETE


class TestContractInTransactions(TransactionsThroughPgBouncer, test_contract.TestPostgreSQLTransaction):
    __test__ = COMPLETE


@pytest.mark.parametrize("driver", DRIVERS)
class TestStress:
    async def test_many_clients_on_two_connections(self, driver: str, narrow: Database) -> None:
        """Each of many callers, over every kind of bind, reads back what it wrote, and nobody else's."""
        done = Counter[str]()

        async def work(bind: str, storage: SqlAlchemySagaStorage, times: int) -> None:
            for time in range(times):
                saga_id, context = uuid4(), {"bind": bind, "time": time}
                await storage.create_saga(saga_id, bind, context)
                async with storage.run(saga_id) as run:
                    await run.log_step(saga_id, bind, "act", SagaStepStatus.STARTED)
                    await run.commit()
                await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1)
                saga = await storage.get_saga(saga_id)
                assert (saga.name, saga.context, saga.version) == (bind, context, 2)
                assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == [bind]
                assert [entry.step_name for entry in await storage.get_in_doubt_steps(saga_id)] == [bind]
                done[bind] += 1

        async def join(bind: str, engine: AsyncEngine) -> None:
            async with JOINING_BINDS[bind](engine) as joined:
                await work(bind, SqlAlchemySagaStorage(joined), 3)
                await joined.commit()

        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(engine_on(narrow.url(driver), **ENGINE_OPTIONS[driver]))
                for _ in range(3)
            ]
            async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
                for engine in engines:
                    gathering = SqlAlchemySagaStorage(engine)
                    alone = SqlAlchemySagaStorage(async_sessionmaker(engine), group_commit=False)
                    for _ in range(5):
                        tasks.create_task(work("engine", gathering, 5))
                        tasks.create_task(work("sessionmaker", alone, 5))
                        tasks.create_task(join("session", engine))
                        tasks.create_task(join("connection", engine))

        assert done == {"engine": 75, "sessionmaker": 75, "session": 45, "connection": 45}

    async def test_cancelled_callers_give_the_connections_back(
        self, driver: str, direct: Database, narrow: Database
    ) -> None:
        """Callers that are cancelled while their statement waits leave both connections in working order."""
        async with engine_on(narrow.url(driver), **ENGINE_OPTIONS[driver]) as engine:
            storage = SqlAlchemySagaStorage(engine, group_commit=False)
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            async with AsyncSession(engine) as session:
                await lock_table(session)
                for _ in range(3):
                    writer = asyncio.create_task(storage.update_status(saga_id, SagaStatus.FAILED))
                    await until_blocked(direct)
                    writer.cancel()
                    with suppress(asyncio.CancelledError):
                        await writer
                await session.commit()
            async with asyncio.timeout(60):
                await asyncio.gather(*(storage.update_status(saga_id, SagaStatus.RUNNING) for _ in range(10)))

            # One write each, and what was cancelled in flight may have been stored.
            assert 1 + 10 <= (await storage.get_saga(saga_id)).version <= 1 + 10 + 3

    async def test_no_setting_is_left_behind(self, driver: str, narrow: Database) -> None:
        """The lock timeout of a write ends with it: the next client to get the connection has its own."""
        async with engine_on(narrow.url(driver), **ENGINE_OPTIONS[driver]) as engine:
            storage = SqlAlchemySagaStorage(engine)
            await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(20)))

            async with engine.connect() as one, engine.connect() as two:
                for connection in (one, two):
                    assert (await connection.execute(text("SHOW lock_timeout"))).scalar_one() == "0"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("bind", [*OWNING_BINDS, *JOINING_BINDS])
class TestEngineThatKeepsStatements:
    async def test_it_is_refused_before_it_writes(self, bind: str, driver: str, narrow: Database) -> None:
        """The first call, whichever connection it gets, is refused with what to set, and has written nothing."""
        open_both_connections(narrow)
        saga_id = uuid4()
        async with engine_on(narrow.url(driver)) as engine:
            for _ in range(4):
                async with bound(bind, engine) as storage:
                    with pytest.raises(StorageUnavailableError, match="PgBouncer in transaction mode") as raised:
                        await storage.create_saga(saga_id, "order", {})
                for setting, value in ENGINE_OPTIONS[driver]["connect_args"].items():
                    assert f"'{setting}': {value}" in str(raised.value)

        async with engine_on(narrow.url(driver), **ENGINE_OPTIONS[driver]) as engine:
            with pytest.raises(SagaNotFoundError):
                await SqlAlchemySagaStorage(engine).get_saga(saga_id)


class TestDocument:
    """What docs/limits.md shows is what is tested here."""

    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_its_engine_works(self, driver: str, narrow: Database) -> None:
        """The engine that the document makes for this driver writes and reads through PgBouncer."""
        url = f"postgresql+{driver}://user:password@localhost:6432/shop"
        [block] = [block for block in blocks_of(DOCUMENT) if url in block.text]
        made: dict[str, Any] = {}
        exec(block.text.replace(url, narrow.url(driver)), made)  # noqa: S102 - our own document's
        storage = SqlAlchemySagaStorage(made["engine"])
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(20)))
        await made["engine"].dispose()

    def test_its_settings_are_those_of_the_tests(self) -> None:
        """Beyond addresses, users and sizes, the tests' PgBouncer has what the document asks for and round robin."""
        [block] = [block for block in blocks_of(DOCUMENT) if block.language == "ini"]
        local = ("listen_", "auth_", "unix_socket_dir", "default_pool_size", "max_client_conn", "server_round_robin")
        tested = SETTINGS.partition("[pgbouncer]")[2].splitlines()
        assert block.text.splitlines()[1:] == [line for line in tested if line and not line.startswith((*local, ";"))]

    async def test_its_stream_works(self, narrow: Database, capsys: pytest.CaptureFixture[str]) -> None:
        """The loop over a long history runs as it stands there, through PgBouncer as well."""
        [block] = [block for block in blocks_of(DOCUMENT) if "iter_step_history(" in block.text]
        async with engine_on(narrow.url("psycopg"), **ENGINE_OPTIONS["psycopg"]) as engine:
            storage, saga_id = SqlAlchemySagaStorage(engine), uuid4()
            step = LogStep("pay", "act", SagaStepStatus.STARTED)
            await storage.save(Checkpoint(saga_id, name="order", steps=[step] * 1001))
            code = compile(block.text, "limits.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            await FunctionType(code, {"storage": storage, "saga_id": saga_id})()
        assert capsys.readouterr().out.count(" pay STARTED\n") == 1001


class TestStartup:
    async def test_a_refused_parameter_is_named(self, narrow: Database) -> None:
        """A startup parameter that PgBouncer doesn't know is its own error, and says that nothing was written."""
        arguments = ENGINE_OPTIONS["asyncpg"]["connect_args"] | {"server_settings": {"jit": "off"}}
        async with engine_on(narrow.url("asyncpg"), connect_args=arguments) as engine:
            with pytest.raises(StorageUnavailableError, match="unsupported startup parameter: jit"):
                await SqlAlchemySagaStorage(engine).create_saga(uuid4(), "order", {})
