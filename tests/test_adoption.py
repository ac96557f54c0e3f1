"""Tables that python-cqrs made become saga-store's, and python-cqrs's again."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast
from uuid import uuid4

import pytest
from cqrs.saga.storage.enums import SagaStatus as OldStatus
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import Checkpoint, SagaStatus, SagaStepStatus, adoption, schema
from saga_store.adoption import AdoptionError
from saga_store.retention_model import Restored
from saga_store.schema import MigrationError
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.tables import REVISION
from saga_store.testing.retention import RetentiveStorage, let_go
from tests.cqrs_tables import (
    ENTRIES_OF_EACH,
    OLDER,
    SAGAS,
    OldProcess,
    connected,
    digest,
    execute,
    missing,
    old_storage,
    undone,
)
from tests.databases import Database
from tests.test_migrations import fingerprint

REWRITE, BESIDE = 10**9, 0
WAYS = pytest.mark.parametrize("rewrite_below", [REWRITE, BESIDE], ids=["rewriting", "beside"])
DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
PASSWORD = "x"  # noqa: S105 - of roles that live as long as a test
A_RUNNING_SAGA = "SELECT id, version FROM saga_executions WHERE status::text = 'RUNNING' ORDER BY id LIMIT 1"


@pytest.fixture
def url(cqrs_database: Database) -> str:
    return cqrs_database.url("psycopg")


@pytest.fixture
async def storage(cqrs_database: Database) -> AsyncIterator[SqlAlchemySagaStorage]:
    engine = create_async_engine(cqrs_database.url("asyncpg"))
    yield SqlAlchemySagaStorage(engine)
    await engine.dispose()


class TestAdopting:
    @WAYS
    def test_the_schema_is_that_of_an_upgrade(
        self, cqrs_database: Database, database: Database, rewrite_below: int
    ) -> None:
        """Types, defaults, constraints, indexes, sequence and comments are those of tables that the migrations made."""
        adoption.adopt(cqrs_database.url("psycopg"), rewrite_below=rewrite_below)

        assert fingerprint(cqrs_database) == fingerprint(database)
        assert schema.current(cqrs_database.url("psycopg")) == REVISION

    @WAYS
    def test_every_row_keeps_its_values(self, cqrs_database: Database, url: str, rewrite_below: int) -> None:
        """Compared by a digest over all columns: contexts to the letter, versions, timestamps, ids of log entries."""
        before = digest(cqrs_database)
        adoption.adopt(url, rewrite_below=rewrite_below)

        assert [rows for _, rows, _ in before] == [SAGAS, SAGAS * ENTRIES_OF_EACH]
        assert digest(cqrs_database) == before

    @WAYS
    @pytest.mark.parametrize("version", OLDER)
    def test_the_tables_of_every_version(
        self, cqrs_database: Database, database: Database, url: str, version: str, rewrite_below: int
    ) -> None:
        """Columns that an older version's tables lack are added, and hold what they hold for a new saga."""
        execute(cqrs_database, OLDER[version])
        adoption.adopt(url, rewrite_below=rewrite_below)

        assert fingerprint(cqrs_database) == fingerprint(database)

    def test_adopting_twice_does_nothing(self, url: str) -> None:
        assert adoption.adopt(url)
        assert adoption.plan(url).steps == ()
        assert adoption.adopt(url) == []

    @DRIVERS
    def test_over_either_driver(self, cqrs_database: Database, database: Database, driver: str) -> None:
        adoption.adopt(cqrs_database.url(driver), rewrite_below=BESIDE)

        assert fingerprint(cqrs_database) == fingerprint(database)

    async def test_inside_a_running_loop(self, cqrs_database: Database, database: Database) -> None:
        """An async connection is passed on by run_sync."""
        engine = create_async_engine(cqrs_database.url("asyncpg"))
        async with engine.connect() as connection:
            await connection.run_sync(lambda sync: adoption.adopt(sync, rewrite_below=BESIDE))
        await engine.dispose()

        assert fingerprint(cqrs_database) == fingerprint(database)

    @WAYS
    async def test_the_storage_works_on_adopted_sagas(
        self, cqrs_database: Database, url: str, storage: SqlAlchemySagaStorage, rewrite_below: int
    ) -> None:
        """An adopted saga can be loaded, written, claimed; and its history goes on after what python-cqrs wrote."""
        with connected(cqrs_database) as connection:
            row = connection.execute(A_RUNNING_SAGA).fetchone()
        assert row
        saga_id, version = row
        adoption.adopt(url, rewrite_below=rewrite_below)

        before = await storage.get_step_history(saga_id)
        await storage.update_context(saga_id, {"adopted": True}, expected_version=version)
        await storage.log_step(saga_id, "after", "act", SagaStepStatus.STARTED)
        claimed = await storage.claim_sagas(
            owner="worker",
            lease=timedelta(minutes=1),
            stale_after=timedelta(0),
            limit=2000,
            max_attempts=99,
            backoff=timedelta(0),
        )
        history = await storage.get_step_history(saga_id)

        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"adopted": True})
        assert history[:-1] == before
        assert history[-1].id > SAGAS * ENTRIES_OF_EACH
        assert saga_id in {saga.id for saga in claimed}

    def test_tables_that_were_renamed(self, cqrs_database: Database, database: Database, url: str) -> None:
        """Constraints and sequence are found by what they are, not by their names."""
        execute(cqrs_database, 'ALTER TABLE saga_logs RENAME CONSTRAINT saga_logs_pkey TO "Old pkey"')
        execute(cqrs_database, "ALTER TABLE saga_logs RENAME CONSTRAINT saga_logs_saga_id_fkey TO orders_fkey")
        execute(cqrs_database, 'ALTER SEQUENCE saga_logs_id_seq RENAME TO "Old ids"')
        adoption.adopt(url)

        assert fingerprint(cqrs_database) == fingerprint(database)

    def test_writers_of_another_search_path(self, cqrs_database: Database, url: str) -> None:
        """They name the schema; whatever their path is, they go on during the adoption, and while it is undone."""
        execute(
            cqrs_database,
            """
            CREATE SCHEMA shop; ALTER TABLE saga_executions SET SCHEMA shop; ALTER TABLE saga_logs SET SCHEMA shop;
            ALTER TYPE sagastatus SET SCHEMA shop; ALTER TYPE sagastepstatus SET SCHEMA shop
            """,
        )
        written: list[object] = []

        def write(progress: object) -> None:
            execute(cqrs_database, "UPDATE shop.saga_executions SET status = 'RUNNING', version = version + 1")
            written.append(progress)

        adoption.adopt(url, schema="shop", rewrite_below=BESIDE, report=write)
        during = len(written)
        adoption.undo(url, schema="shop", rewrite_below=BESIDE, report=write)
        assert len(written) > during > 0
        with connected(cqrs_database) as connection:
            query = "SELECT DISTINCT status::text FROM shop.saga_executions"
            assert connection.execute(query).fetchall() == [("RUNNING",)]

    @WAYS
    def test_another_schema(self, cqrs_database: Database, url: str, rewrite_below: int) -> None:
        """The schema is named; tables of the same name elsewhere aren't touched."""
        before = digest(cqrs_database)
        execute(
            cqrs_database,
            """
            CREATE SCHEMA "My sagas"; ALTER TABLE saga_executions SET SCHEMA "My sagas";
            ALTER TABLE saga_logs SET SCHEMA "My sagas"; ALTER TYPE sagastatus SET SCHEMA "My sagas";
            ALTER TYPE sagastepstatus SET SCHEMA "My sagas"; CREATE TABLE saga_logs (id int)
            """,
        )
        adoption.adopt(url, schema="My sagas", rewrite_below=rewrite_below)
        assert schema.current(url, schema="My sagas") == REVISION

        execute(
            cqrs_database,
            'DROP TABLE public.saga_logs; ALTER TABLE "My sagas".saga_executions SET SCHEMA public; '
            'ALTER TABLE "My sagas".saga_logs SET SCHEMA public',
        )
        assert digest(cqrs_database) == before


class TestPreflight:
    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ("ALTER TABLE saga_logs ADD COLUMN note text", "column saga_logs.note: unexpected, is text"),
            ("ALTER TABLE saga_executions DROP COLUMN name", "column saga_executions.name: missing, should be"),
            (
                "ALTER TABLE saga_executions ALTER context TYPE jsonb USING '{}'::jsonb",
                "column saga_executions.context: is jsonb NOT NULL, should be json NOT NULL",
            ),
            (
                "ALTER TABLE saga_executions ALTER version TYPE bigint",
                "column saga_executions.version: is bigint NOT NULL, should be integer NOT NULL",
            ),
            (
                "ALTER TABLE saga_logs ALTER saga_id DROP NOT NULL",
                "column saga_logs.saga_id: is uuid, should be uuid NOT NULL",
            ),
            ("CREATE INDEX mine ON saga_logs (saga_id)", "index saga_logs.mine: unexpected, is CREATE INDEX mine ON"),
            (
                "CREATE INDEX ix_saga_logs_saga_id ON saga_logs (saga_id)",
                "index saga_logs.ix_saga_logs_saga_id: unexpected, is CREATE INDEX",
            ),
            (
                "ALTER TABLE saga_logs ADD CONSTRAINT mine CHECK (step_name <> '')",
                "constraint saga_logs.mine: unexpected, is CHECK",
            ),
            (
                "ALTER TABLE saga_logs ADD CONSTRAINT again FOREIGN KEY (saga_id) REFERENCES saga_executions",
                "constraint saga_logs.again: unexpected, is FOREIGN KEY",
            ),
            (
                "ALTER TABLE saga_logs DROP CONSTRAINT saga_logs_saga_id_fkey",
                "constraint saga_logs.saga_logs_saga_id_fkey: missing, should be FOREIGN KEY .saga_id.",
            ),
            (
                "ALTER TYPE sagastatus ADD VALUE 'PAUSED'",
                "type sagastatus: is PENDING, .*, PAUSED, should be PENDING, .*, FAILED",
            ),
            (
                "CREATE TABLE reports (statuses sagastatus[])",
                "type sagastatus: is used by column statuses of table reports",
            ),
            (
                "CREATE CAST (sagastatus AS text) WITH INOUT AS ASSIGNMENT",
                "type sagastatus: has a cast to text",
            ),
            (
                "CREATE VIEW failed AS SELECT id FROM saga_executions WHERE status = 'FAILED'",
                "table saga_executions: column status is used by rule _RETURN on view failed",
            ),
            (
                """
                CREATE TRIGGER audit BEFORE UPDATE ON saga_logs FOR EACH ROW
                EXECUTE FUNCTION suppress_redundant_updates_trigger()
                """,
                "trigger saga_logs.audit: unexpected, is CREATE TRIGGER",
            ),
            ("ALTER TABLE saga_logs ENABLE ROW LEVEL SECURITY", "table saga_logs: has row security"),
            (
                "ALTER TABLE saga_logs SET (fillfactor = 50)",
                "table saga_logs: is ordinary, fillfactor=50, should be ord",
            ),
            ("CREATE TABLE child () INHERITS (saga_logs)", "table saga_logs: inherits, or is inherited from"),
            (
                "GRANT SELECT (status) ON saga_executions TO PUBLIC",
                "table saga_executions: column status has privileges of its own",
            ),
            ("DROP TABLE saga_logs", "table saga_logs: there is none in schema public"),
            ("ALTER TABLE saga_logs RENAME TO other_logs", "table saga_logs: there is none in schema public"),
        ],
    )
    def test_an_unknown_shape_is_refused_and_left_as_it_is(
        self, cqrs_database: Database, url: str, change: str, difference: str
    ) -> None:
        """What differs is named, by the dry run and by the attempt, and nothing is changed."""
        execute(cqrs_database, change)
        before = fingerprint(cqrs_database)

        refusals = adoption.plan(url).refusals
        assert re.match(difference, refusals[0])
        assert all(re.match("type saga.*status: is used by", another) for another in refusals[1:])
        with pytest.raises(AdoptionError) as refused:
            adoption.adopt(url)
        assert refused.value.differences == refusals
        assert refusals[0] in str(refused.value)
        assert fingerprint(cqrs_database) == before

    def test_tables_of_a_host_that_refer_to_sagas_are_fine(self, cqrs_database: Database, url: str) -> None:
        """A foreign key to a saga stays valid: the id doesn't change."""
        execute(cqrs_database, "CREATE TABLE orders (saga_id uuid REFERENCES saga_executions)")
        adoption.adopt(url, rewrite_below=BESIDE)

        with pytest.raises(Exception, match="orders_saga_id_fkey"):
            execute(cqrs_database, "INSERT INTO orders VALUES (gen_random_uuid())")

    def test_an_empty_database_has_nothing_to_adopt(self, empty_database: Database) -> None:
        refusals = adoption.plan(empty_database.url("psycopg")).refusals

        assert refusals[:2] == tuple(
            f"table {table}: there is none in schema public" for table in ("saga_logs", "saga_executions")
        )

    def test_a_schema_that_isn_t_there_is_named(self, url: str) -> None:
        with pytest.raises(MigrationError, match="there is no schema 'nowhere'"):
            adoption.plan(url, schema="nowhere")
        with pytest.raises(MigrationError, match="there is no schema 'nowhere'"):
            adoption.adopt(url, schema="nowhere")

    def test_tables_that_the_migrations_made_are_adopted_already(self, database: Database) -> None:
        plan = adoption.plan(database.url("psycopg"))

        assert plan.refusals == ()
        assert plan.steps == ()

    def test_a_recorded_revision_on_python_cqrs_s_tables_is_refused(self, url: str) -> None:
        """Somebody stamped what was never adopted."""
        schema.stamp(url, "head")
        with pytest.raises(AdoptionError, match="the tables aren't saga-store's: saga-store stamp base"):
            adoption.adopt(url)

    @WAYS
    def test_a_plan_changes_nothing(self, cqrs_database: Database, url: str, rewrite_below: int) -> None:
        """It counts the rows, and gives each step's SQL and whom it keeps waiting."""
        before = fingerprint(cqrs_database)
        plan = adoption.plan(url, rewrite_below=rewrite_below)

        assert plan.rows == {"saga_executions": SAGAS, "saga_logs": SAGAS * ENTRIES_OF_EACH}
        assert all(step.blocks for step in plan.steps)
        assert ("rewrite saga_logs and saga_executions" in {step.name for step in plan.steps}) == (
            rewrite_below == REWRITE
        )
        assert fingerprint(cqrs_database) == before


class TestPrivileges:
    @contextmanager
    def roles(self, database: Database) -> Iterator[tuple[str, str]]:
        """Two roles without any privilege: one to own the tables, one for the application."""
        owner, app = (f"{kind}_{database.name}" for kind in ("owner", "app"))
        execute(
            database, f"CREATE ROLE {owner} LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE {app} LOGIN PASSWORD '{PASSWORD}'"
        )
        try:
            yield owner, app
        finally:
            execute(database, f"DROP OWNED BY {owner}, {app} CASCADE; DROP ROLE {owner}, {app}")

    @WAYS
    async def test_owner_and_application_needn_t_be_superusers(
        self, cqrs_database: Database, rewrite_below: int
    ) -> None:
        """The owner of the tables adopts them; a role that may insert still may, though ids come from a sequence."""
        with self.roles(cqrs_database) as (owner, app):
            execute(
                cqrs_database,
                f"""
                ALTER TABLE saga_executions OWNER TO {owner}; ALTER TABLE saga_logs OWNER TO {owner};
                ALTER TYPE sagastatus OWNER TO {owner}; ALTER TYPE sagastepstatus OWNER TO {owner};
                GRANT CREATE, USAGE ON SCHEMA public TO {owner}; GRANT USAGE ON SCHEMA public TO {app};
                GRANT SELECT, INSERT, UPDATE ON saga_executions TO {app}; GRANT SELECT, INSERT ON saga_logs TO {app}
                """,
            )
            as_owner = cqrs_database.address.set(drivername="postgresql+psycopg", username=owner, password=PASSWORD)
            as_app = Database(cqrs_database.address.set(username=app, password=PASSWORD))
            adoption.adopt(as_owner, rewrite_below=rewrite_below)

            async with old_storage(as_app, "asyncpg") as storage:
                await OldProcess(storage).one_saga()

    def test_a_role_without_the_owners_rights_is_told_so(self, cqrs_database: Database) -> None:
        with self.roles(cqrs_database) as (_, app):
            execute(cqrs_database, f"GRANT ALL ON saga_executions, saga_logs TO {app}")
            as_app = cqrs_database.address.set(drivername="postgresql+psycopg", username=app, password=PASSWORD)
            with pytest.raises(AdoptionError) as refused:
                adoption.adopt(as_app)

        assert "schema public: CREATE is missing among this role's privileges" in refused.value.differences
        assert sum("whose rights" in difference for difference in refused.value.differences) == 4


class TestOldProcesses:
    @WAYS
    @DRIVERS
    async def test_one_that_was_there_before_goes_on(
        self, cqrs_database: Database, url: str, driver: str, rewrite_below: int
    ) -> None:
        """Every write succeeds. Over asyncpg an engine's first read may fail, once, for its prepared statement."""
        async with old_storage(cqrs_database, driver) as storage:
            process = OldProcess(storage)
            for _ in range(7):  # psycopg prepares what it has run five times
                await process.one_saga()
            adoption.adopt(url, rewrite_below=rewrite_below)
            for _ in range(7):
                await process.one_saga()

        assert process.stale_reads <= (1 if driver == "asyncpg" else 0)
        assert missing(cqrs_database, process) == []

    async def test_asyncpg_without_its_cache_never_fails(self, cqrs_database: Database, url: str) -> None:
        """`prepared_statement_cache_size=0` in the URL spares an old process even the one failed read."""
        cacheless = Database(cqrs_database.address.update_query_dict({"prepared_statement_cache_size": "0"}))
        async with old_storage(cacheless, "asyncpg") as storage:
            process = OldProcess(storage)
            await process.one_saga()
            adoption.adopt(url)
            await process.one_saga()

        assert process.stale_reads == 0

    @DRIVERS
    async def test_both_storages_work_on_the_same_sagas(
        self, cqrs_database: Database, url: str, storage: SqlAlchemySagaStorage, driver: str
    ) -> None:
        """Until the last old process is gone, each reads what the other wrote, and takes its turn in the version."""
        adoption.adopt(url)
        saga_id = uuid4()
        async with old_storage(cqrs_database, driver) as old:
            await old.create_saga(saga_id, "OrderSaga", {"by": "cqrs"})
            await storage.update_context(saga_id, {"by": "saga-store"}, expected_version=1)
            await old.update_status(saga_id, OldStatus.RUNNING)

            assert await old.load_saga_state(saga_id) == (OldStatus.RUNNING, {"by": "saga-store"}, 3)
            assert saga_id in await old.get_sagas_for_recovery(limit=2000)
        assert (await storage.get_saga(saga_id)).version == 3

    @pytest.mark.parametrize("version", ["4.4.1", "4.6.5"])
    async def test_what_an_older_version_inserts_gets_defaults(
        self, cqrs_database: Database, url: str, version: str
    ) -> None:
        """A process of 4.4.1 or 4.6 names neither version nor attempts, also while the adoption is under way."""
        execute(cqrs_database, OLDER[version])
        columns, values = ("", "") if version == "4.4.1" else (", version", ", 1")

        def insert(_progress: object = None) -> None:
            saga = f"gen_random_uuid(), 'Old', 'PENDING'::sagastatus, '{{}}'{values}"
            execute(cqrs_database, f"INSERT INTO saga_executions (id, name, status, context{columns}) VALUES ({saga})")  # noqa: S608 - constants

        adoption.adopt(url, rewrite_below=BESIDE, report=insert)
        insert()

        with connected(cqrs_database) as connection:
            query = "SELECT DISTINCT version, recovery_attempts, status FROM saga_executions WHERE name = 'Old'"
            assert connection.execute(query).fetchall() == [(1, 0, "PENDING")]


class TestUndoing:
    @WAYS
    async def test_the_tables_are_python_cqrs_s_again(
        self, cqrs_database: Database, url: str, storage: SqlAlchemySagaStorage, rewrite_below: int
    ) -> None:
        """Schema and rows are as before, with what was written in between; only version keeps a default."""
        before, rows = fingerprint(cqrs_database), digest(cqrs_database)
        adoption.adopt(url, rewrite_below=rewrite_below)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "OrderSaga", {"by": "saga-store"})
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.COMPLETED)
        adoption.undo(url, rewrite_below=rewrite_below)

        assert fingerprint(cqrs_database) == undone(before)
        assert digest(cqrs_database) == rows
        async with old_storage(cqrs_database, "asyncpg") as old:
            assert await old.load_saga_state(saga_id) == (OldStatus.PENDING, {"by": "saga-store"}, 1)
            process = OldProcess(old)
            await process.one_saga()
        assert missing(cqrs_database, process) == []

    def test_undoing_what_was_never_adopted_does_nothing(self, url: str) -> None:
        assert adoption.plan(url, "undo").steps == ()
        assert adoption.undo(url) == []

    def test_what_was_undone_can_be_adopted_again(self, cqrs_database: Database, database: Database, url: str) -> None:
        adoption.adopt(url)
        adoption.undo(url)
        adoption.adopt(url, rewrite_below=BESIDE)

        assert fingerprint(cqrs_database) == fingerprint(database)

    async def test_leased_sagas_keep_it_from_being_undone(self, url: str, storage: SqlAlchemySagaStorage) -> None:
        """Somebody works on them with saga-store."""
        adoption.adopt(url)
        claimed = await storage.claim_sagas(owner="worker", lease=timedelta(hours=1), stale_after=timedelta(0), limit=3)
        with pytest.raises(AdoptionError, match=f"{len(claimed)} sagas are leased: stop the processes"):
            adoption.undo(url)

    async def test_stubs_keep_it_from_being_undone(
        self, cqrs_database: Database, url: str, storage: SqlAlchemySagaStorage
    ) -> None:
        """python-cqrs doesn't know any; what was restored is undone with the rest."""
        adoption.adopt(url)
        saga_id = uuid4()
        await storage.save(Checkpoint(saga_id, name="order", status=SagaStatus.COMPLETED, context={"n": 1}))
        _, record = await let_go(cast("RetentiveStorage", storage), saga_id)
        with pytest.raises(AdoptionError, match="stubs of archived sagas, which python-cqrs would take for"):
            adoption.undo(url)
        with pytest.raises(MigrationError, match="holds stubs of archived sagas"):
            schema.downgrade(cqrs_database.url("psycopg"), "saga_store_0005")
        assert await storage.restore_saga(record) is Restored.RESTORED
        adoption.undo(url)
        async with old_storage(cqrs_database, "asyncpg") as old:
            assert (await old.load_saga_state(saga_id))[:2] == (OldStatus.COMPLETED, {"n": 1})

    def test_tables_that_the_migrations_made_have_no_way_back(self, database: Database) -> None:
        with pytest.raises(AdoptionError, match="in tables that it never made, there is no way back"):
            adoption.undo(database.url("psycopg"))


class TestFinishing:
    def test_nothing_of_python_cqrs_s_is_left(self, cqrs_database: Database, url: str) -> None:
        """The types and their casts are gone, and with them the way back; a second time does nothing."""
        adoption.adopt(url)
        assert adoption.finish(url)
        assert adoption.finish(url) == []
        with connected(cqrs_database) as connection:
            left = connection.execute("SELECT typname FROM pg_type WHERE typname LIKE 'saga%status'").fetchall()
        assert left == []
        with pytest.raises(AdoptionError, match="there is no way back"):
            adoption.undo(url)

    def test_before_the_adoption_it_is_refused(self, url: str) -> None:
        with pytest.raises(AdoptionError, match="the tables haven't been adopted"):
            adoption.finish(url)

    def test_a_type_that_another_table_uses_is_kept(self, cqrs_database: Database, url: str) -> None:
        adoption.adopt(url)
        execute(cqrs_database, "CREATE TABLE reports (status sagastatus)")
        with pytest.raises(AdoptionError, match="type sagastatus: is used by column status of table reports"):
            adoption.finish(url)
