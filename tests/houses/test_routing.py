"""Routing: each caller's write goes where that caller's session would have sent it, whoever flushes.

Who may be where: of callers A, A and B, of two tenants, one flushes alone, the others queue. Whoever flushes lends the
others nothing: not an engine, not a schema, not a context.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import Connection, Engine, event, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool
from sqlalchemy.sql import Delete, Insert, Update

from saga_store import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SchemaError,
    StorageUnavailableError,
    schema,
)
from saga_store.sqlalchemy import SagaExecutionModel, SqlAlchemySagaStorage, binds, pooled
from saga_store.sqlalchemy.binds import Transaction
from saga_store.sqlalchemy.statement import Statement
from tests.connections import engine_on, until_blocked
from tests.databases import Database, Databases
from tests.houses.life import live_through

MakeEngine = Callable[..., AsyncEngine]

tenant: ContextVar[int] = ContextVar("tenant")


@pytest.fixture
def houses(databases: Databases, template: Database) -> Iterator[list[Database]]:
    with ExitStack() as stack:
        yield [stack.enter_context(databases.clone(template)) for _ in range(2)]


@pytest.fixture
async def engines(houses: list[Database], driver: str) -> AsyncIterator[list[AsyncEngine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(engine_on(house.url(driver))) for house in houses]


def schemas_in(database: Database, number: int) -> list[str]:
    """Make schemas with our tables in one database."""
    names = [f'tenant %{index} "x" :y it\'s' for index in range(number)]
    with psycopg.connect(database.url(), autocommit=True) as admin:
        for name in names:
            admin.execute(SQL("CREATE SCHEMA {}").format(Identifier(name)))
            for table in ("saga_executions", "saga_logs", "saga_archives", "saga_store_version"):
                admin.execute(
                    SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                        Identifier(name, table), Identifier("public", table)
                    )
                )
    return names


def sagas_of(database: Database, schema: str = "public") -> set[UUID]:
    with psycopg.connect(database.url()) as connection:
        rows = connection.execute(SQL("SELECT id FROM {}").format(Identifier(schema, "saga_executions"))).fetchall()
    return {saga_id for (saga_id,) in rows}


async def as_tenants(storage: SqlAlchemySagaStorage, tenants: int, callers: int) -> list[set[UUID]]:
    """Have callers of all tenants write and read at once; return whose sagas are whose."""
    written: list[set[UUID]] = [set() for _ in range(tenants)]

    async def call(number: int) -> None:
        tenant.set(number)
        saga_id = uuid4()
        await storage.create_saga(saga_id, f"tenant {number}", {})
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=1)
        assert (await storage.get_saga(saga_id)).name == f"tenant {number}"
        with pytest.raises(SagaConcurrencyError):
            await storage.update_context(saga_id, {}, expected_version=1)
        written[number].add(saga_id)

    await asyncio.gather(*(asyncio.create_task(call(number % tenants)) for number in range(callers)))
    if flushers := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(flushers)  # they give their connections back
    return written


class TestGetBind:
    async def test_a_tenant_s_database_by_a_context_variable(
        self, houses: list[Database], engines: list[AsyncEngine]
    ) -> None:
        class Routed(Session):
            def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Engine:  # noqa: ANN401, ARG002 - SQLAlchemy's
                return engines[tenant.get()].sync_engine

        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        written = await as_tenants(storage, 2, 60)
        assert [sagas_of(house) for house in houses] == written

    async def test_a_tenant_that_a_session_takes_when_it_is_made(
        self, houses: list[Database], engines: list[AsyncEngine]
    ) -> None:
        class Routed(Session):
            def __init__(self, **options: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
                super().__init__(**options | {"bind": engines[tenant.get()].sync_engine})

        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        written = await as_tenants(storage, 2, 20)
        assert [sagas_of(house) for house in houses] == written

    @pytest.mark.parametrize("writes", [(Update, Delete), (Insert, Update, Delete)], ids=["recipe", "all"])
    async def test_reads_to_a_follower_and_writes_to_the_leader(
        self, houses: list[Database], engines: list[AsyncEngine], writes: tuple[type, ...]
    ) -> None:
        """SQLAlchemy's own recipe, to the letter: it takes no argument ``bind``."""
        leader, follower = (engine.sync_engine for engine in engines)

        class Routed(Session):
            def get_bind(self, mapper: Any = None, clause: Any = None) -> Engine:  # type: ignore[override] # noqa: ANN401, ARG002 - as in the recipe
                return leader if self._flushing or isinstance(clause, writes) else follower

        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        assert [sagas_of(house) for house in houses] == [{saga_id}, set()]
        with pytest.raises(SagaNotFoundError):
            await storage.get_saga(saga_id)

    async def test_by_the_mapper_s_class(self, houses: list[Database], engines: list[AsyncEngine]) -> None:
        class Routed(Session):
            def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Engine:  # noqa: ANN401, ARG002 - SQLAlchemy's
                return engines[issubclass(mapper.class_, SagaExecutionModel)].sync_engine

        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        await live_through(storage)
        assert sagas_of(houses[0]) == set() != sagas_of(houses[1])
        by_binds = async_sessionmaker(engines[0], binds={SagaExecutionModel: engines[1]})
        await live_through(SqlAlchemySagaStorage(by_binds))
        assert sagas_of(houses[0]) == set()

    async def test_what_leads_nowhere_says_so(self, engines: list[AsyncEngine]) -> None:
        with pytest.raises(StorageUnavailableError, match="leads nowhere"):
            await SqlAlchemySagaStorage(async_sessionmaker()).create_saga(uuid4(), "order", {})

        class Wrong(Session):
            def get_bind(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - wrong on purpose
                return engines[0]

        with pytest.raises(TypeError, match="sync_engine"):
            await SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Wrong)).create_saga(uuid4(), "order", {})


class TestSchemas:
    @pytest.mark.parametrize("bind", ["engine", "sessionmaker", "session", "connection"])
    @pytest.mark.parametrize("how", ["named", "translated", "named and translated"])
    async def test_a_schema(
        self, database: Database, make_engine: MakeEngine, driver: str, bind: str, how: str
    ) -> None:
        """Named, or by SQLAlchemy's translation of engine or connection; the mapped class sees the same rows."""
        [name] = schemas_in(database, 1)
        translation = {None: name} if how == "translated" else {"app": name}
        plain = make_engine(driver)
        engine = plain if how == "named" else plain.execution_options(schema_translate_map=translation)
        options: dict[str, Any] = {"named": {"schema": name}, "named and translated": {"schema": "app"}}.get(how, {})
        async with AsyncExitStack() as stack:
            targets: dict[str, Callable[[], Any]] = {
                "engine": lambda: engine,
                "sessionmaker": lambda: async_sessionmaker(engine),
                "session": lambda: AsyncSession(engine),
                "connection": engine.connect,
            }
            target = targets[bind]()
            if bind in {"session", "connection"}:
                target = await stack.enter_async_context(target)
            await live_through(SqlAlchemySagaStorage(target, **options))
            if bind in {"session", "connection"}:
                await target.commit()
        assert sagas_of(database) == set()
        assert sagas_of(database, name)
        if how == "translated":
            async with AsyncSession(engine) as session:
                assert {saga.id for saga in await session.scalars(select(SagaExecutionModel))} == sagas_of(
                    database, name
                )

    async def test_tenants_by_translation(self, database: Database, make_engine: MakeEngine, driver: str) -> None:
        """100 tenants, 1,000 callers at once, one engine: no write goes to another's schema."""
        names = schemas_in(database, 100)
        engine = make_engine(driver).sync_engine

        class Routed(Session):
            def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Engine:  # noqa: ANN401, ARG002 - SQLAlchemy's
                return engine.execution_options(schema_translate_map={None: names[tenant.get()]})

        storage = SqlAlchemySagaStorage(async_sessionmaker(sync_session_class=Routed))
        written = await as_tenants(storage, 100, 1000)
        assert [sagas_of(database, name) for name in names] == written

    async def test_a_schema_that_isn_t_there(self, make_engine: MakeEngine, driver: str) -> None:
        """The error names it, and what to run."""
        storage = SqlAlchemySagaStorage(make_engine(driver), schema="no%where")
        with pytest.raises(SchemaError, match=r"in schema 'no%where'.*saga-store upgrade --schema no%where") as info:
            await storage.create_saga(uuid4(), "order", {})
        assert info.value.schema == "no%where"

    @pytest.mark.parametrize("wrong", ["", "x" * 64, "ü" * 32, 7, "a\0b"])
    async def test_what_can_be_no_schema(self, make_engine: MakeEngine, driver: str, wrong: Any) -> None:  # noqa: ANN401 - wrong on purpose
        with pytest.raises(InvalidSagaDataError, match="schema"):
            SqlAlchemySagaStorage(make_engine(driver), schema=wrong)

    async def test_the_schema_of_an_upgrade(self, empty_database: Database, driver: str) -> None:
        """What `upgrade --schema` makes is what a storage with that name finds, whatever the search path."""
        schema.upgrade(empty_database.url("psycopg"), schema="Ünsere Sagas", create_schema=True)
        async with engine_on(empty_database.url(driver)) as engine:
            await live_through(SqlAlchemySagaStorage(engine, schema="Ünsere Sagas"))


class TestPoolEvents:
    """A pool's event that makes connections ready by what a ContextVar holds."""

    def ready(self, engine: AsyncEngine, names: list[str]) -> None:
        @event.listens_for(engine.sync_engine, "checkout")
        def set_path(connection: Any, *_: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
            path = '"' + names[tenant.get()].replace('"', '""') + '"'
            cursor = connection.cursor()
            cursor.execute(f"SELECT set_config('search_path', '{path}', FALSE)")
            cursor.close()
            connection.commit()

    async def test_with_a_key_each_gets_its_own(self, database: Database, make_engine: MakeEngine, driver: str) -> None:
        """100 tenants, 1,000 callers at once."""
        names = [f"tenant_{number}" for number in range(100)]
        with psycopg.connect(database.url(), autocommit=True) as admin:
            for odd, plain in zip(schemas_in(database, 100), names, strict=True):
                admin.execute(SQL("ALTER SCHEMA {} RENAME TO {}").format(Identifier(odd), Identifier(plain)))
        engine = make_engine(driver)
        self.ready(engine, names)
        storage = SqlAlchemySagaStorage(engine, group_by=tenant.get)
        written = await as_tenants(storage, 100, 1000)
        assert [sagas_of(database, name) for name in names] == written

    async def test_without_one_it_fails_loudly(self, database: Database, make_engine: MakeEngine, driver: str) -> None:
        """For a lonely caller as for a crowd, so that it is noticed the first time; nothing is written anywhere."""
        names = schemas_in(database, 2)
        engine = make_engine(driver)
        self.ready(engine, names)
        storage = SqlAlchemySagaStorage(engine)
        tenant.set(0)
        with pytest.raises(StorageUnavailableError, match="group_by"):
            await storage.create_saga(uuid4(), "order", {})
        calls = [storage.create_saga(uuid4(), "order", {}) for _ in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {StorageUnavailableError}
        assert sagas_of(database) == sagas_of(database, names[0]) == sagas_of(database, names[1]) == set()

    async def test_a_key_that_can_be_none(self, make_engine: MakeEngine, driver: str) -> None:
        engine = make_engine(driver)
        with pytest.raises(TypeError, match="group_by"):
            SqlAlchemySagaStorage(engine, group_by="tenant")  # type: ignore[arg-type] # wrong on purpose
        with pytest.raises(TypeError, match="group_by"):
            await SqlAlchemySagaStorage(engine, group_by=list).create_saga(uuid4(), "order", {})  # type: ignore[arg-type] # likewise


def sets_tenant(connection: Any, *_: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
    """A listener that leaves SQLAlchemy's transaction open, as nothing tells it not to."""
    if connection is not None:
        cursor = connection.cursor()
        cursor.execute("SELECT set_config('app.tenant', 'acme', FALSE)")
        cursor.close()


TENANT = Statement("SELECT convert_to(coalesce(current_setting('app.tenant', TRUE), ''), 'UTF8')")


class TestListenersThatRunSQL:
    """What is acknowledged is stored, and what the listener has set is in force, whatever it left open."""

    @pytest.fixture(params=["connect", "checkout", "checkin"])
    def moment(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(params=[AsyncAdaptedQueuePool, NullPool])
    def engine(self, request: pytest.FixtureRequest, database: Database, driver: str, moment: str) -> AsyncEngine:
        # By NullPool, since these tests count nothing that would be left open.
        engine = create_async_engine(database.url(driver), poolclass=request.param)
        event.listen(engine.sync_engine, moment, sets_tenant)
        return engine

    async def test_single_calls_and_crowds(self, database: Database, engine: AsyncEngine, moment: str) -> None:
        storage = SqlAlchemySagaStorage(engine)
        ids = [uuid4() for _ in range(43)]
        for saga_id in ids[:3]:
            await storage.create_saga(saga_id, "order", {})
        await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in ids[3:]))
        assert sagas_of(database) == set(ids)
        if moment != "checkin" or not isinstance(engine.pool, NullPool):
            assert await storage._execute(TENANT, {}) == [(b"acme",)]  # noqa: SLF001 - what the server sees
        await engine.dispose()

    async def test_transactions_and_runs(self, database: Database, engine: AsyncEngine, moment: str) -> None:
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with storage.run(saga_id, owner="me", lease=timedelta(minutes=1)) as run:
            await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
            await run.commit()
        [step] = await storage.get_in_doubt_steps(saga_id)
        await storage.settle_step(saga_id, step.id, SagaStepStatus.COMPLETED, by="ann", reason="seen")
        await storage.hold_saga(saga_id, by="ann", reason="later")
        assert sagas_of(database) == {saga_id}
        assert await storage.get_in_doubt_steps(saga_id) == []
        assert (await storage.get_figures()).unfinished

        async def ask(transaction: Transaction, _: object) -> Any:  # noqa: ANN401 - rows
            return await transaction.execute(TENANT, {})

        if moment != "checkin" or not isinstance(engine.pool, NullPool):
            assert await storage._executor(writes=True).transact(ask) == [(b"acme",)]  # noqa: SLF001 - as above
            async with storage._executor(writes=False).open(snapshot=True) as run_statement:  # noqa: SLF001 - as above
                assert await run_statement(TENANT, {}) == [(b"acme",)]
        await engine.dispose()

    async def test_one_that_begins_a_transaction_by_itself(
        self, database: Database, make_engine: MakeEngine, driver: str
    ) -> None:
        engine = make_engine(driver)
        event.listen(
            engine.sync_engine, "connect", lambda connection, _: connection.run_async(lambda raw: raw.execute("BEGIN"))
        )
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        assert sagas_of(database) == {saga_id}

    async def test_without_a_listener_nothing_more_is_sent(
        self, make_engine: MakeEngine, driver: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine(driver)
        answers: list[bool] = []
        ask = pooled.is_in_transaction

        def listen(raw: Any) -> bool:  # noqa: ANN401 - of either driver
            answers.append(ask(raw))
            return answers[-1]

        for place in (pooled, binds):
            monkeypatch.setattr(place, "is_in_transaction", listen)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        await storage.hold_saga(saga_id, by="ann", reason="later")
        await storage.get_figures()
        assert set(answers) == {False}


class TestListenersThatFail:
    """What a listener raises while a connection is given back is nobody's error: the statement has been answered."""

    @pytest.fixture(params=[ValueError, RuntimeError])
    def engine(self, request: pytest.FixtureRequest, make_engine: MakeEngine, driver: str) -> AsyncEngine:
        def fail(*_: object) -> None:
            raise request.param("of a listener")

        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=2)
        event.listen(engine.sync_engine, "checkin", fail)
        return engine

    async def test_single_calls_and_crowds(self, engine: AsyncEngine) -> None:
        storage = SqlAlchemySagaStorage(engine)
        ids = [uuid4() for _ in range(20)]
        await storage.create_saga(ids[0], "order", {})
        await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in ids[1:]))
        steps = (storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED) for saga_id in ids)
        await asyncio.gather(*steps)
        assert [len(await storage.get_step_history(saga_id)) for saga_id in ids] == [1] * 20

    async def test_transactions(self, engine: AsyncEngine) -> None:
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        for _ in range(3):
            await storage.hold_saga(saga_id, by="ann", reason="later")
        assert len(await storage.get_step_history(saga_id)) == 3
        assert (await storage.get_figures()).unfinished

    async def test_a_connection_is_given_back_once(self, database: Database, engine: AsyncEngine) -> None:
        """Also if it was lost in a transaction of the caller's, who leaves that when somebody else has its place."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        with psycopg.connect(database.url()) as other:
            other.execute("LOCK TABLE saga_logs")
            async with engine.connect() as connection:
                joined = SqlAlchemySagaStorage(connection)
                holding = asyncio.create_task(joined.hold_saga(saga_id, by="ann", reason="later"))
                await until_blocked(database)
                holding.cancel()
                await asyncio.wait([holding])
                next_one = asyncio.create_task(storage.hold_saga(saga_id, by="bob", reason="later"))
                await until_blocked(database)
            assert isinstance(engine.pool, QueuePool)
            assert engine.pool.checkedout() == 1
        await next_one

    @pytest.mark.parametrize("moment", ["checkin", "invalidate"])
    async def test_what_is_refused_or_cut_short_is_told_as_that(
        self, database: Database, make_engine: MakeEngine, driver: str, moment: str
    ) -> None:
        def fail(*_: object) -> None:
            raise ValueError("of a listener")

        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=2)
        event.listen(engine.sync_engine, moment, fail)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        with pytest.raises(SagaAlreadyExistsError):
            await storage.create_saga(saga_id, "order", {})
        with psycopg.connect(database.url()) as other:
            other.execute("LOCK TABLE saga_executions")
            for call in (
                storage.update_status(saga_id, SagaStatus.RUNNING),
                storage.hold_saga(saga_id, by="ann", reason="later"),
            ):
                task = asyncio.create_task(call)
                await until_blocked(database)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        await storage.update_status(saga_id, SagaStatus.FAILED)
        event.remove(engine.sync_engine, moment, fail)


class TestOnAConnection:
    """A sessionmaker that is bound to a connection joins its transaction, as the connection itself would."""

    @pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"])
    @pytest.mark.parametrize("begun", [True, False])
    async def test_it_commits_nothing_and_leaves_nothing(
        self,
        database: Database,
        make_engine: MakeEngine,
        driver: str,
        mode: Any,  # noqa: ANN401 - one of four
        *,
        begun: bool,
    ) -> None:
        async with make_engine(driver).connect() as connection:
            if begun:
                await connection.begin()
            maker = async_sessionmaker(bind=connection, join_transaction_mode=mode)
            storage = SqlAlchemySagaStorage(maker)
            saga_id = uuid4()
            before = (await connection.execute(text("SHOW lock_timeout"))).scalar_one()
            await connection.execute(text("CREATE TABLE mine ()"))
            await storage.create_saga(saga_id, "order", {})
            with pytest.raises(SagaAlreadyExistsError):
                await storage.create_saga(saga_id, "order", {})
            await asyncio.gather(*(storage.log_step(saga_id, "s", "act", SagaStepStatus.STARTED) for _ in range(30)))
            assert (await connection.execute(text("SHOW lock_timeout"))).scalar_one() == before
            assert sagas_of(database) == set()
            assert len(await storage.get_step_history(saga_id)) == 30
            await connection.commit()
            assert (await connection.execute(text("SELECT count(*) FROM mine"))).scalar_one() == 0
            assert sagas_of(database) == {saga_id}
            await live_through(storage)
            await connection.rollback()
            assert sagas_of(database) == {saga_id}

    async def test_what_needs_commits_of_its_own_is_refused(self, make_engine: MakeEngine, driver: str) -> None:
        """As on the connection itself: it would poll, or archive, in the middle of somebody's transaction."""
        async with make_engine(driver).connect() as connection, AsyncSession(connection) as into:
            storage = SqlAlchemySagaStorage(async_sessionmaker(bind=connection))
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            run = storage.run(saga_id)
            await run.update_status(saga_id, SagaStatus.RUNNING)
            for call in (
                lambda: storage.wait_for_saga(saga_id, timedelta(seconds=10)),
                lambda: storage.begin_archive(uuid4(), uri=None, by="me"),
                lambda: run.commit(into=into),
            ):
                with pytest.raises(InvalidSagaDataError, match=r"bind|into"):
                    await call()
            for open_ in (
                lambda: storage.run(saga_id, owner="me", lease=timedelta(hours=1), renew=True),
                lambda: storage.archiving(by="me"),
                storage.snapshot,
            ):
                with pytest.raises(InvalidSagaDataError, match=r"bind|renew"):
                    open_()

    async def test_two_storages_on_one_session_take_turns(self, make_engine: MakeEngine, driver: str) -> None:
        async with AsyncSession(make_engine(driver)) as session:
            storages = [SqlAlchemySagaStorage(session), SqlAlchemySagaStorage(session)]
            await asyncio.gather(*(storages[number % 2].create_saga(uuid4(), "order", {}) for number in range(20)))
            await session.commit()
            assert len(await storages[0].find_stale_sagas(stale_after=timedelta())) == 20

    async def test_a_pool_that_gives_everybody_the_same_connection(self, make_engine: MakeEngine, driver: str) -> None:
        """It is refused by name: to commit on it could be to commit what is somebody else's."""
        engine = make_engine(driver, poolclass=StaticPool)
        with pytest.raises(TypeError, match="StaticPool"):
            SqlAlchemySagaStorage(engine)
        with pytest.raises(TypeError, match="StaticPool"):
            await SqlAlchemySagaStorage(async_sessionmaker(engine)).create_saga(uuid4(), "order", {})


class TestRowLevelSecurity:
    async def test_as_docs_binds_says(self, database: Database, driver: str) -> None:
        """A session sees its rows by ``after_begin``, an engine by a pool event and a key."""
        role = f"rls_{database.name}"
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(Identifier(role)))
            try:
                admin.execute(SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(Identifier(role)))
                admin.execute(SQL("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {}").format(Identifier(role)))
                admin.execute("ALTER TABLE saga_executions ENABLE ROW LEVEL SECURITY")
                admin.execute(
                    "CREATE POLICY tenants ON saga_executions USING (name = current_setting('app.tenant', TRUE))"
                )
                url = make_url(database.url(driver)).set(username=role, password="x")  # noqa: S106 - of this test's
                async with engine_on(url) as engine:
                    await self._sessions(engine)
                    await self._engine(engine)
            finally:
                admin.execute(SQL("DROP OWNED BY {}").format(Identifier(role)))
                admin.execute(SQL("DROP ROLE {}").format(Identifier(role)))

    async def _sessions(self, engine: AsyncEngine) -> None:
        class Tenant(Session):
            pass

        @event.listens_for(Tenant, "after_begin")
        def set_tenant(_session: Session, _transaction: object, connection: Connection) -> None:
            connection.execute(
                text("SELECT set_config('app.tenant', :tenant, TRUE)"), {"tenant": f"tenant {tenant.get()}"}
            )

        tenant.set(1)
        async with AsyncSession(engine, sync_session_class=Tenant) as session:
            storage = SqlAlchemySagaStorage(session)
            saga_id = uuid4()
            await storage.create_saga(saga_id, "tenant 1", {})
            assert (await storage.get_saga(saga_id)).name == "tenant 1"
            await session.commit()

    async def _engine(self, engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "checkout")
        def set_tenant(connection: Any, *_: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
            cursor = connection.cursor()
            cursor.execute(f"SELECT set_config('app.tenant', 'tenant {tenant.get()}', FALSE)")
            cursor.close()
            connection.commit()

        storage = SqlAlchemySagaStorage(engine, group_by=tenant.get)
        written = await as_tenants(storage, 3, 30)
        tenant.set(2)
        page = await storage.find_sagas()
        assert {saga.id for saga in page.sagas} == written[2]
