"""SqlAlchemySagaStorage: what only PostgreSQL can show, mostly by failing it."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import combinations
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)

from saga_store import (
    Checkpoint,
    InvalidSagaDataError,
    LogStep,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SagaExecutionModel, SagaLogModel, SqlAlchemySagaStorage
from saga_store.sqlalchemy.binds import BindTarget
from saga_store.sqlalchemy.read_sql import CLAIM
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.tables import REVISION
from saga_store.sqlalchemy.write_parameters import by_kind, of_kinds, of_one
from saga_store.sqlalchemy.write_sql import explain, write_many, write_one
from saga_store.write import Lease, Write
from tests.connections import engine_on, lock_table, until_blocked
from tests.databases import Database
from tests.proxy import Cut, Proxy
from tests.scene import NEVER

MakeEngine = Callable[..., AsyncEngine]

STARTED = LogStep("reserve", "act", SagaStepStatus.STARTED)
# More than the five executions after which psycopg prepares a statement.
WARM_UP = 8


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(driver: str, make_engine: MakeEngine) -> AsyncEngine:
    return make_engine(driver)


class TestRoundTrips:
    """A write is one statement in autocommit: one message there, one answer back."""

    @pytest.mark.parametrize("bind", ["engine", "sessionmaker"])
    async def test_every_call_is_one_round_trip(self, database: Database, driver: str, bind: str) -> None:
        """Creating, updating, logging, checkpointing and reading cost one round trip each."""
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
            storage = SqlAlchemySagaStorage(engine if bind == "engine" else async_sessionmaker(engine))

            def calls(saga_id: UUID) -> list[Callable[[], Awaitable[object]]]:
                now, hour = timedelta(0), timedelta(hours=1)
                return [
                    lambda: storage.create_saga(saga_id, "order", {"n": 1}),
                    lambda: storage.update_context(saga_id, {"n": 2}),
                    lambda: storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=2),
                    lambda: storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED),
                    lambda: storage.save(Checkpoint(saga_id, context={"n": 3}, steps=[STARTED, STARTED])),
                    lambda: storage.load_saga_state(saga_id),
                    lambda: storage.get_saga(saga_id),
                    lambda: storage.get_step_history(saga_id),
                    lambda: storage.claim_sagas(owner="w", lease=hour, limit=99, stale_after=now),
                    lambda: storage.get_in_doubt_steps(saga_id),
                ]

            for _ in range(WARM_UP):
                for call in calls(uuid4()):
                    await call()
            counts = []
            for call in calls(uuid4()):
                before = proxy.round_trips
                await call()
                counts.append(proxy.round_trips - before)

        assert counts == [1] * 10

    async def test_a_checkpoint_is_one_transaction(self, engine: AsyncEngine, admin: psycopg.Connection) -> None:
        """Changing the row and logging two steps take one transaction id."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})

        await storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING, context={"n": 1}, steps=[STARTED, STARTED]))

        writers = admin.execute("SELECT xmin FROM saga_executions UNION SELECT xmin FROM saga_logs").fetchall()
        assert len(writers) == 1


_SAGA = UUID(int=1)
WRITES = {
    "creates": Write(_SAGA, name="order", context="{}"),
    "updates": Write(_SAGA, status=SagaStatus.RUNNING, context="{}"),
    "updates, fenced": Write(_SAGA, context="{}", expected_version=1, write_id=1),
    "updates and logs": Write(_SAGA, context="{}", steps=(STARTED, STARTED)),
    "updates and logs, fenced": Write(_SAGA, context="{}", steps=(STARTED,), expected_version=1, write_id=1),
    "logs": Write(_SAGA, steps=(STARTED,)),
    "renews": Write(_SAGA, lease=Lease(lasts=timedelta(seconds=1)), expected_version=1, write_id=1),
}
SAVES: dict[str, Statement] = {
    "explains": explain(waits=False),
    "explains, waits": explain(waits=True),
    "explains, again": explain(waits=False, again=True),
}
for _what, _write in WRITES.items():
    for _waits in (True, False):
        SAVES[f"one {_what}{', waits' * _waits}"] = write_one(frozenset(of_one(_write)), waits=_waits)
for _several in (*combinations(WRITES, 1), *combinations(WRITES, 2), tuple(WRITES)):
    _parameters = of_kinds(*by_kind([WRITES[what] for what in _several]))
    SAVES[f"many: {'; '.join(_several)}"] = write_many(frozenset(_parameters))


class TestPlan:
    @pytest.mark.parametrize("statement", SAVES.values(), ids=SAVES)
    def test_a_saga_is_found_by_index_even_if_the_plan_was_made_on_an_empty_table(
        self, database: Database, statement: Statement
    ) -> None:
        """The generic plan of each statement that writes probes the primary key, and scans no table."""
        arguments = ", ".join(["NULL"] * len(statement.names))
        with psycopg.connect(database.url()) as connection:
            connection.execute("SET plan_cache_mode = force_generic_plan")
            connection.execute(f"PREPARE save AS {statement.spelled(None).numbered}".encode())
            rows = connection.execute(f"EXPLAIN EXECUTE save ({arguments})".encode()).fetchall()
        plan = "\n".join(line for (line,) in rows)

        assert "pk_saga_executions" in plan
        assert "Seq Scan" not in plan

    async def test_the_plan_of_a_write_is_kept(self, make_engine: MakeEngine, driver: str) -> None:
        """Planning takes longer than executing, so after the first calls PostgreSQL must not plan any more."""
        engine = make_engine(driver, pool_size=1, max_overflow=0)
        storage = SqlAlchemySagaStorage(engine)
        sagas = [uuid4() for _ in range(30)]
        await asyncio.gather(*(storage.create_saga(saga_id, "order", {}) for saga_id in sagas))
        for n in range(30):
            step = LogStep(str(n), "act", SagaStepStatus.COMPLETED)
            checkpoints = [Checkpoint(saga_id, context={"n": n}, steps=[step]) for saga_id in sagas]
            await asyncio.gather(*map(storage.save, checkpoints))  # one alone, the others together
        async with engine.connect() as connection:
            plans = (
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement LIKE '%INTO saga_logs%'"
            )
            kept = [counts for counts in (await connection.execute(text(plans))).all() if sum(counts) >= 20]
        assert len(kept) == 2
        assert all(custom <= 5 for _, custom in kept)

    def test_a_claim_reads_the_living_sagas_only(self, admin: psycopg.Connection) -> None:
        """Among many finished sagas a claim goes by the partial index and the primary key, and scans no table."""
        admin.execute(
            "INSERT INTO saga_executions (id, name, status, context, updated_at) "
            "SELECT gen_random_uuid(), 'order', CASE WHEN n % 500 = 0 THEN 'RUNNING' ELSE 'COMPLETED' END, '{}', "
            "now() - interval '1 day' FROM generate_series(1, 50000) AS n"
        )
        admin.execute("ANALYZE saga_executions")
        values = {"owner": "w", "lease": 60.0, "stale_after": 60.0, "name": None}
        numbers = {"limit": 100, "max_attempts": 5, "backoff": 10.0, "max_backoff": 3600.0}
        query = f"EXPLAIN ANALYZE {CLAIM.spelled(None).named}".encode()
        plan = "\n".join(line for (line,) in admin.execute(query, values | numbers).fetchall())

        assert "ix_saga_executions_recovery" in plan
        assert "pk_saga_executions" in plan
        assert "Seq Scan" not in plan
        assert admin.execute("SELECT count(*) FROM saga_executions WHERE lease_owner = 'w'").fetchone() == (100,)

    def test_a_claim_planned_on_an_empty_table_scans_no_table_either(self, admin: psycopg.Connection) -> None:
        """The plan that a driver keeps from the first claim, on an empty table, serves later ones too."""
        admin.execute("SET plan_cache_mode = force_generic_plan")
        admin.execute(f"PREPARE claim AS {CLAIM.spelled(None).numbered}".encode())
        arguments = ", ".join(["NULL"] * len(CLAIM.names))
        rows = admin.execute(f"EXPLAIN EXECUTE claim ({arguments})".encode()).fetchall()
        plan = "\n".join(line for (line,) in rows)

        assert "ix_saga_executions_recovery" in plan
        assert "Seq Scan" not in plan


class TestBinds:
    @pytest.mark.parametrize("wrong", [None, "postgresql://", create_engine("postgresql+psycopg://localhost")])
    def test_a_bind_of_another_kind_is_refused(self, wrong: BindTarget) -> None:
        """The error names what was given and what to make instead."""
        with pytest.raises(TypeError, match=rf"AsyncEngine.*not {type(wrong).__name__}; .*create_async_engine"):
            SqlAlchemySagaStorage(wrong)

    async def test_a_session_bind_gives_the_session_back(self, engine: AsyncEngine) -> None:
        """`storage.session` is the session, and only a session bind has one."""
        async with AsyncSession(engine) as session:
            assert SqlAlchemySagaStorage(session).session is session
        assert not hasattr(SqlAlchemySagaStorage(engine), "session")

    async def test_a_session_commits_saga_and_business_rows_together(self, engine: AsyncEngine) -> None:
        """Both are there after the commit, and neither after a rollback."""
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE orders (id uuid PRIMARY KEY)"))
        kept, dropped = uuid4(), uuid4()
        async with AsyncSession(engine) as session:
            storage = SqlAlchemySagaStorage(session)
            for saga_id, end in ((kept, session.commit), (dropped, session.rollback)):
                await session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": saga_id})
                await storage.create_saga(saga_id, "order", {})
                await end()

        async with AsyncSession(engine) as session:
            assert (await session.scalars(text("SELECT id FROM orders"))).all() == [kept]
            assert (await session.scalars(select(SagaExecutionModel.id))).all() == [kept]

    async def test_a_maker_bound_to_a_connection_joins_its_transaction(self, engine: AsyncEngine) -> None:
        """The usual way to roll a test back works: nothing stays when the connection rolls back."""
        saga_id = uuid4()
        async with engine.connect() as connection:
            await connection.begin()
            maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
            storage = SqlAlchemySagaStorage(maker)
            await storage.create_saga(saga_id, "order", {})
            assert (await storage.get_saga(saga_id)).version == 1
            await connection.rollback()

        with pytest.raises(SagaNotFoundError):
            await SqlAlchemySagaStorage(engine).get_saga(saga_id)

    async def test_calls_on_one_session_take_turns(self, engine: AsyncEngine) -> None:
        """Tasks that share a session bind don't trip over its one connection."""
        saga_id = uuid4()
        async with AsyncSession(engine) as session:
            storage = SqlAlchemySagaStorage(session)
            await storage.create_saga(saga_id, "order", {})
            await asyncio.gather(*(storage.update_context(saga_id, {"n": n}) for n in range(10)))
            assert (await storage.get_saga(saga_id)).version == 11

    async def test_an_engine_with_serializers_of_its_own_changes_nothing(
        self, driver: str, make_engine: MakeEngine
    ) -> None:
        """Contexts don't pass through the engine's JSON functions, which may be lossy."""

        def lossy(_: object) -> str:
            return "{}"

        engine = make_engine(driver, json_serializer=lossy, json_deserializer=lossy)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {"price": 1e16, "big": 10**30})

        assert (await storage.get_saga(saga_id)).context == {"price": 1e16, "big": 10**30}


class TestAutocommit:
    async def test_what_takes_several_statements_is_refused(self, engine: AsyncEngine) -> None:
        """Two persons could both settle one step there: the lock of the first ends with its statement."""
        own = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await own.create_saga(saga_id, "order", {})
        await own.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        [doubt] = await own.get_in_doubt_steps(saga_id)
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            storage = SqlAlchemySagaStorage(connection)
            for call in (
                storage.settle_step(saga_id, doubt.id, SagaStepStatus.COMPLETED, by="ann", reason="seen"),
                storage.hold_saga(saga_id, by="ann", reason="seen"),
            ):
                with pytest.raises(InvalidSagaDataError, match="autocommit"):
                    await call
            assert (await storage.find_sagas()).sagas
            await storage.update_status(saga_id, SagaStatus.RUNNING)
        assert await own.get_in_doubt_steps(saga_id) == [doubt]
        assert (await own.get_saga(saga_id)).status is SagaStatus.RUNNING


class TestRefusalInsideATransaction:
    @pytest.mark.parametrize("kind", ["session", "connection"])
    async def test_the_transaction_stays_usable(self, engine: AsyncEngine, kind: str) -> None:
        """Every refusal leaves the caller's transaction as it was, and what follows commits."""
        saga_id = uuid4()
        joined: AsyncSession | AsyncConnection
        async with AsyncSession(engine) if kind == "session" else engine.connect() as joined:
            storage = SqlAlchemySagaStorage(joined)
            await storage.create_saga(saga_id, "order", {})
            with pytest.raises(SagaAlreadyExistsError):
                await storage.create_saga(saga_id, "order", {})
            with pytest.raises(SagaNotFoundError):
                await storage.update_status(uuid4(), SagaStatus.RUNNING)
            with pytest.raises(SagaConcurrencyError):
                await storage.save(Checkpoint(saga_id, context={}, steps=[STARTED], expected_version=7))
            await storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING, steps=[STARTED], expected_version=1))
            await joined.commit()

        after = SqlAlchemySagaStorage(engine)
        assert (await after.get_saga(saga_id)).version == 2
        assert len(await after.get_step_history(saga_id)) == 1


class TestModels:
    async def test_mapped_classes_read_what_the_storage_wrote(self, engine: AsyncEngine) -> None:
        """Ad-hoc queries go through SagaExecutionModel and SagaLogModel, with our enums as values."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.save(
            Checkpoint(saga_id, name="order", status=SagaStatus.RUNNING, context={"n": 1}, steps=[STARTED])
        )
        async with AsyncSession(engine) as session:
            query = (
                select(SagaExecutionModel, SagaLogModel)
                .join(SagaLogModel, SagaLogModel.saga_id == SagaExecutionModel.id)
                .where(SagaExecutionModel.status == SagaStatus.RUNNING.value)
            )
            saga, entry = (await session.execute(query)).one()

        assert (saga.id, saga.name, saga.context, saga.version) == (saga_id, "order", {"n": 1}, 1)
        assert (entry.step_name, entry.status, entry.details) == ("reserve", SagaStepStatus.STARTED, None)


class TestUnavailable:
    """Nothing was written, and the error says so."""

    async def test_a_server_that_is_down(self, driver: str) -> None:
        async with engine_on(f"postgresql+{driver}://nobody@127.0.0.1:1/none") as engine:
            storage = SqlAlchemySagaStorage(engine, retry_for=NEVER)
            with pytest.raises(StorageUnavailableError, match="nothing was written: couldn't get a connection") as info:
                await storage.create_saga(uuid4(), "order", {})
        assert isinstance(info.value.__cause__, psycopg.Error | OSError)

    async def test_a_database_that_is_not_there(self, database: Database, driver: str) -> None:
        url = database.url(driver).rpartition("/")[0] + "/missing"
        async with engine_on(url) as engine:
            with pytest.raises(StorageUnavailableError, match='database "missing" does not exist'):
                await SqlAlchemySagaStorage(engine, retry_for=NEVER).create_saga(uuid4(), "order", {})

    async def test_a_pool_that_is_exhausted(self, driver: str, make_engine: MakeEngine) -> None:
        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=0.01)
        saga_id = uuid4()
        async with engine.connect():
            with pytest.raises(StorageUnavailableError, match="QueuePool limit"):
                await SqlAlchemySagaStorage(engine).create_saga(saga_id, "order", {})
        with pytest.raises(SagaNotFoundError):
            await SqlAlchemySagaStorage(engine).get_saga(saga_id)

    async def test_a_statement_that_times_out_on_a_lock(self, engine: AsyncEngine, admin: psycopg.Connection) -> None:
        """The statement was cancelled by the server, so nothing of it is there."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        admin.execute("ALTER DATABASE " + admin.info.dbname + " SET lock_timeout = '10ms'")
        await engine.dispose()
        async with AsyncSession(engine) as holder:
            await SqlAlchemySagaStorage(holder).update_context(saga_id, {"n": 1})
            with pytest.raises(StorageUnavailableError, match=r"lock_timeout of 0\.01 s") as info:
                await storage.save(Checkpoint(saga_id, context={"n": 2}, steps=[STARTED]))
        assert info.value.sqlstate == "55P03"
        assert (await storage.get_saga(saga_id)).version == 1
        assert await storage.get_step_history(saga_id) == []

    async def test_a_read_only_standby(self, engine: AsyncEngine, admin: psycopg.Connection) -> None:
        admin.execute("ALTER DATABASE " + admin.info.dbname + " SET default_transaction_read_only = on")
        with pytest.raises(StorageUnavailableError, match="read-only transaction") as info:
            await SqlAlchemySagaStorage(engine, retry_for=NEVER).create_saga(uuid4(), "order", {})
        assert info.value.sqlstate == "25006"

    async def test_an_aborted_transaction(self, engine: AsyncEngine) -> None:
        """An error of the caller's own has aborted the transaction: ours says what PostgreSQL says."""
        async with AsyncSession(engine) as session:
            with pytest.raises(SQLAlchemyError):
                await session.execute(text("SELECT 1 / 0"))
            with pytest.raises(StorageUnavailableError, match="current transaction is aborted"):
                await SqlAlchemySagaStorage(session).create_saga(uuid4(), "order", {})

    async def test_a_role_without_rights(self, engine: AsyncEngine, admin: psycopg.Connection) -> None:
        stranger = f"saga_store_stranger_{uuid4().hex}"
        admin.execute(SQL("CREATE ROLE {}").format(Identifier(stranger)))
        try:
            async with engine.connect() as connection:
                await connection.execute(text(f"SET ROLE {stranger}"))
                with pytest.raises(StorageUnavailableError, match="permission denied for table saga_executions"):
                    await SqlAlchemySagaStorage(connection).create_saga(uuid4(), "order", {})
        finally:
            admin.execute(SQL("DROP ROLE {}").format(Identifier(stranger)))


class TestLostConnection:
    @pytest.mark.parametrize("bind", ["engine", "sessionmaker"])
    @pytest.mark.parametrize(("cut", "written"), [(Cut.BEFORE_SENDING, False), (Cut.BEFORE_ANSWER, True)])
    async def test_a_write_whose_answer_is_lost_has_an_unknown_outcome(  # noqa: PLR0913 - its parameters are its cases
        self, database: Database, engine: AsyncEngine, driver: str, bind: str, cut: Cut, *, written: bool
    ) -> None:
        """The caller learns that it can't know; the truth is one or the other, never half."""
        saga_id = uuid4()
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as cut_off:
            storage = SqlAlchemySagaStorage(cut_off if bind == "engine" else async_sessionmaker(cut_off))
            for _ in range(WARM_UP):
                await storage.save(Checkpoint(uuid4(), name="order", steps=[STARTED]))
            proxy.cut = cut
            with pytest.raises(UnknownOutcomeError) as info:
                await storage.save(Checkpoint(saga_id, name="order", steps=[STARTED]))
            assert info.value.saga_id == saga_id
            # The pool has noticed: the next call gets a connection that works.
            await storage.create_saga(uuid4(), "order", {})

        truth = SqlAlchemySagaStorage(engine)
        if written:
            assert len(await truth.get_step_history(saga_id)) == 1
        else:
            with pytest.raises(SagaNotFoundError):
                await truth.get_saga(saga_id)

    async def test_a_read_whose_answer_is_lost_has_written_nothing(self, database: Database, driver: str) -> None:
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
            storage = SqlAlchemySagaStorage(engine, retry_for=NEVER)
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(StorageUnavailableError, match="the connection was lost"):
                await storage.get_saga(saga_id)
            assert (await storage.get_saga(saga_id)).version == 1

    async def test_a_claim_whose_answer_is_lost_has_an_unknown_outcome(self, database: Database, driver: str) -> None:
        """Nobody can say which sagas were claimed; what was is free again when the lease has expired."""
        now = timedelta(0)
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
            storage = SqlAlchemySagaStorage(engine)
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(UnknownOutcomeError, match="claim again") as info:
                await storage.claim_sagas(owner="worker-1", lease=now, limit=1, stale_after=now, backoff=now)
            assert info.value.saga_id is None
            [saga] = await storage.claim_sagas(owner="worker-1", lease=now, limit=1, stale_after=now, backoff=now)
            assert (saga.id, saga.recovery_attempts) == (saga_id, 2)

    async def test_a_transaction_whose_connection_is_lost_is_gone(
        self, database: Database, engine: AsyncEngine, driver: str
    ) -> None:
        """In a transaction of the caller's nothing can have been committed, so the outcome is certain."""
        saga_id = uuid4()
        async with (
            Proxy.before(database.url(driver)) as (proxy, url),
            engine_on(url) as cut_off,
            AsyncSession(cut_off) as session,
        ):
            storage = SqlAlchemySagaStorage(session)
            await storage.create_saga(saga_id, "order", {})
            proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(StorageUnavailableError, match="the connection was lost"):
                await storage.update_status(saga_id, SagaStatus.RUNNING)
            await session.rollback()

        with pytest.raises(SagaNotFoundError):
            await SqlAlchemySagaStorage(engine).get_saga(saga_id)

    async def test_a_connection_in_autocommit_has_an_unknown_outcome_too(self, database: Database, driver: str) -> None:
        """A joined connection whose statements commit by themselves can't promise that nothing was written."""
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
            autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
            async with autocommit.connect() as connection:
                storage = SqlAlchemySagaStorage(connection)
                await storage.create_saga(uuid4(), "order", {})
                proxy.cut = Cut.BEFORE_ANSWER
                with pytest.raises(UnknownOutcomeError):
                    await storage.create_saga(uuid4(), "order", {})

    async def test_a_backend_that_is_terminated(
        self, database: Database, engine: AsyncEngine, admin: psycopg.Connection
    ) -> None:
        """A write that waits on a lock when its backend is terminated: an error, and the pool recovers."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with AsyncSession(engine) as holder:
            await lock_table(holder)
            write = asyncio.create_task(storage.update_context(saga_id, {"n": 2}))
            await until_blocked(database)
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock'"
            )
            with pytest.raises(UnknownOutcomeError):
                await write
        assert (await storage.get_saga(saga_id)).version == 1


class TestCancelledCaller:
    async def test_the_connection_goes_back_and_the_storage_works_on(
        self, database: Database, engine: AsyncEngine
    ) -> None:
        """A caller that is cancelled while its write waits leaves no connection checked out."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with AsyncSession(engine) as holder:
            await lock_table(holder)
            write = asyncio.create_task(storage.update_context(saga_id, {"n": 2}))
            await until_blocked(database)
            write.cancel()
            with pytest.raises(asyncio.CancelledError):
                await write
        await storage.update_context(saga_id, {"n": 3})
        # Whether the server got to the cancelled write first is anyone's guess.
        assert (await storage.get_saga(saga_id)).version in {2, 3}
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool by default


class TestSchema:
    async def test_tables_that_are_missing(self, driver: str, empty_database: Database) -> None:
        """The error names the revision that is needed and the command to run."""
        async with engine_on(empty_database.url(driver)) as engine:
            with pytest.raises(SchemaError, match=r"found revision none.*run `saga-store upgrade`") as info:
                await SqlAlchemySagaStorage(engine).create_saga(uuid4(), "order", {})
        assert (info.value.found, info.value.needed) == (None, REVISION)

    @pytest.mark.parametrize("bind", ["engine", "session"])
    async def test_tables_that_are_too_old(self, engine: AsyncEngine, admin: psycopg.Connection, bind: str) -> None:
        """The recorded revision is named, also from inside a transaction that the error has aborted."""
        admin.execute("ALTER TABLE saga_executions DROP COLUMN recovery_attempts")
        admin.execute("UPDATE saga_store_version SET version_num = 'saga_store_0000'")
        async with AsyncSession(engine) as session:
            storage = SqlAlchemySagaStorage(engine if bind == "engine" else session)
            with pytest.raises(SchemaError, match="found revision saga_store_0000, need") as info:
                await storage.create_saga(uuid4(), "order", {})
        assert info.value.found == "saga_store_0000"
