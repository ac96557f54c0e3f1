"""saga_store.schema: the Python API, what ``check`` tells, and where migrations may run."""

import json
import secrets
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import schema
from saga_store.schema.settings import Settings
from tests.databases import Database
from tests.fingerprints import FILE, read_all

HEAD = schema.history()[-1].revision
DRIVERS = ["psycopg", "asyncpg"]


def execute(database: Database, statement: str) -> None:
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture
def owner(empty_database: Database) -> Iterator[Database]:
    """An empty database as seen by a role that may make tables in a schema of its own, and nothing else."""
    name, password = f"owner_{secrets.token_hex(4)}", secrets.token_hex(8)
    with psycopg.connect(empty_database.url(), autocommit=True) as admin:
        admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(name), Literal(password)))
        admin.execute(SQL("CREATE SCHEMA sagas AUTHORIZATION {}").format(Identifier(name)))
        admin.execute(SQL("CREATE SCHEMA theirs"))
        admin.execute(SQL("GRANT USAGE ON SCHEMA theirs TO {}").format(Identifier(name)))
        yield Database(empty_database.address.set(username=name, password=password))
        admin.execute(SQL("DROP OWNED BY {}").format(Identifier(name)))
        admin.execute(SQL("DROP ROLE {}").format(Identifier(name)))


class TestFingerprints:
    def test_what_is_shipped_is_what_the_revisions_make(self, empty_database: Database) -> None:
        """On whichever server this runs; if a revision was added or a line differs, run `make fingerprints`."""
        assert json.loads(FILE.read_text()) == read_all(empty_database.url("psycopg")), "run `make fingerprints`"


class TestCheck:
    @pytest.mark.parametrize("driver", DRIVERS)
    def test_what_was_upgraded_is_current(self, database: Database, driver: str) -> None:
        assert schema.check(database.url(driver)) == schema.Check(schema.State.CURRENT, HEAD, HEAD)

    def test_an_empty_database_is_behind(self, empty_database: Database) -> None:
        found = schema.check(empty_database.url())
        assert found == schema.Check(schema.State.BEHIND, None, HEAD)
        assert not found.is_ready

    def test_an_earlier_revision_is_behind(self, empty_database: Database) -> None:
        """It is compared with what that revision makes."""
        schema.upgrade(empty_database.url(), "saga_store_0001")
        assert schema.check(empty_database.url()) == schema.Check(schema.State.BEHIND, "saga_store_0001", HEAD)

    def test_what_an_interrupted_upgrade_has_left_is_for_the_next_one(self, empty_database: Database) -> None:
        schema.upgrade(empty_database.url(), "saga_store_0006")
        stub = (
            "archived_at IS NULL OR (status IN ('COMPLETED', 'FAILED') AND lease_owner IS NULL "
            "AND updated_at <= archived_at AND CAST(context AS text) = '{}')"
        )
        execute(
            empty_database,
            f"ALTER TABLE saga_executions ADD CONSTRAINT ck_saga_executions_stub CHECK ({stub}) NOT VALID",
        )

        check = schema.check(empty_database.url())
        assert check.state is schema.State.BEHIND
        [difference] = check.differences
        assert difference.endswith("; an upgrade is under way, or was interrupted: saga-store upgrade goes on with it")
        schema.upgrade(empty_database.url())
        assert schema.check(empty_database.url()).state is schema.State.CURRENT

    def test_an_unknown_revision_is_ahead(self, database: Database) -> None:
        execute(database, "UPDATE saga_store_version SET version_num = 'saga_store_9999'")
        found = schema.check(database.url())
        assert found == schema.Check(schema.State.AHEAD, "saga_store_9999", HEAD)
        assert found.is_ready

    def test_two_recorded_revisions_are_an_error(self, database: Database) -> None:
        execute(database, "INSERT INTO saga_store_version VALUES ('host_0042')")
        with pytest.raises(schema.MigrationError, match=f"holds 2 revisions, not one: host_0042, {HEAD}"):
            schema.check(database.url())

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            (
                "DROP INDEX ix_saga_logs_created_at",
                (
                    "index saga_logs.ix_saga_logs_created_at: missing, should be "
                    "CREATE INDEX ix_saga_logs_created_at ON saga_logs USING btree (created_at)"
                ),
            ),
            (
                "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'ix_saga_logs_created_at'::regclass",
                (
                    "index saga_logs.ix_saga_logs_created_at: is "
                    "CREATE INDEX ix_saga_logs_created_at ON saga_logs USING btree (created_at) INVALID, should be "
                    "CREATE INDEX ix_saga_logs_created_at ON saga_logs USING btree (created_at)"
                ),
            ),
            (
                "ALTER TABLE saga_executions ALTER version TYPE bigint",
                "column saga_executions.version: is bigint NOT NULL DEFAULT 1, should be integer NOT NULL DEFAULT 1",
            ),
            (
                "ALTER TABLE saga_executions ALTER name DROP NOT NULL",
                "column saga_executions.name: is character varying(255), should be character varying(255) NOT NULL",
            ),
            (
                "ALTER TABLE saga_executions ALTER version DROP DEFAULT",
                "column saga_executions.version: is integer NOT NULL, should be integer NOT NULL DEFAULT 1",
            ),
            ("ALTER TABLE saga_logs ADD COLUMN note text", "column saga_logs.note: unexpected, is text"),
            (
                (
                    "ALTER TABLE saga_logs DROP CONSTRAINT ck_saga_logs_action; "
                    "ALTER TABLE saga_logs ADD CONSTRAINT ck_saga_logs_action CHECK (action <> '') NOT VALID"
                ),
                (
                    "constraint saga_logs.ck_saga_logs_action: is CHECK (action::text <> ''::text) NOT VALID, "
                    "should be "
                    "CHECK (action::text = ANY "
                    "(ARRAY['act'::character varying, 'compensate'::character varying]::text[]))"
                ),
            ),
            (
                "ALTER TABLE saga_executions RESET (fillfactor)",
                (
                    "table saga_executions: is ordinary, autovacuum_vacuum_scale_factor=0.02, "
                    "should be ordinary, autovacuum_vacuum_scale_factor=0.02, fillfactor=80"
                ),
            ),
            (
                "CREATE TRIGGER audit BEFORE UPDATE ON saga_logs EXECUTE FUNCTION suppress_redundant_updates_trigger()",
                (
                    "trigger saga_logs.audit: unexpected, is CREATE TRIGGER audit BEFORE UPDATE ON saga_logs FOR EACH "
                    "STATEMENT EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                ),
            ),
        ],
    )
    def test_drift_is_told_by_a_line_for_each_difference(self, database: Database, change: str, line: str) -> None:
        execute(database, change)
        found = schema.check(database.url(), strict=True)
        assert (found.state, found.found, found.needed) == (schema.State.DRIFTED, HEAD, HEAD)
        (told,) = found.differences + found.notes
        assert told.startswith(f"{line}; ")

    def test_neither_comments_nor_the_order_of_columns_nor_other_tables_matter(self, database: Database) -> None:
        execute(
            database,
            "COMMENT ON COLUMN saga_logs.details IS NULL; CREATE TABLE orders (id int); "
            "ALTER TABLE saga_logs RENAME details TO old; ALTER TABLE saga_logs ADD details text; "
            "ALTER TABLE saga_logs DROP old",
        )
        assert schema.check(database.url()).state is schema.State.CURRENT

    def test_it_may_be_asked_in_a_session_that_may_only_read(self, database: Database) -> None:
        engine = create_engine(database.url("psycopg"), poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text("SET default_transaction_read_only = on"))
            connection.commit()
            assert schema.check(connection).state is schema.State.CURRENT


class TestTargetSchema:
    @pytest.mark.parametrize("driver", DRIVERS)
    def test_everything_goes_where_it_was_asked_to_go(self, empty_database: Database, driver: str) -> None:
        """Up, check and down again in a schema that was made for it; public stays empty."""
        url, name = empty_database.url(driver), 'sagas of "Ann"'
        schema.upgrade(url, schema=name, create_schema=True)
        assert schema.check(url, schema=name).state is schema.State.CURRENT
        assert schema.check(url).state is schema.State.BEHIND
        schema.downgrade(url, "base", schema=name)
        assert schema.current(url, schema=name) is None

    def test_a_schema_that_is_not_there_is_made_only_if_that_was_asked_for(self, empty_database: Database) -> None:
        with pytest.raises(schema.MigrationError, match="no schema 'sagas': correct the name, or have it created with"):
            schema.upgrade(empty_database.url(), schema="sagas")
        schema.upgrade(empty_database.url(), schema="sagas", create_schema=True)
        schema.upgrade(empty_database.url(), schema="sagas", create_schema=True)
        assert schema.current(empty_database.url(), schema="sagas") == HEAD

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_as_a_role_that_owns_the_tables_and_no_more(self, owner: Database, driver: str) -> None:
        """No superuser is needed, nor a right to anything outside the schema."""
        schema.upgrade(owner.url(driver), schema="sagas")
        assert schema.check(owner.url(driver), schema="sagas").state is schema.State.CURRENT
        schema.downgrade(owner.url(driver), "base", schema="sagas")

    def test_a_role_that_may_not_is_told_what_postgresql_says(self, owner: Database) -> None:
        with pytest.raises(schema.MigrationError, match="SQLSTATE 42501: permission denied for schema theirs"):
            schema.upgrade(owner.url("psycopg"), schema="theirs")


class TestBinds:
    def test_an_engine(self, empty_database: Database) -> None:
        engine = create_engine(empty_database.url("psycopg"))
        assert schema.upgrade(engine) == [revision.revision for revision in schema.history()]
        assert schema.upgrade(engine) == []
        engine.dispose()

    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_an_async_connection_passes_itself_on(self, empty_database: Database, driver: str) -> None:
        engine = create_async_engine(empty_database.url(driver))
        async with engine.connect() as connection:
            await connection.run_sync(schema.upgrade)
            assert await connection.run_sync(schema.current) == HEAD
        await engine.dispose()

    def test_an_async_engine_is_refused_with_the_way_to_do_it(self, empty_database: Database) -> None:
        engine = create_async_engine(empty_database.url("asyncpg"))
        with pytest.raises(schema.MigrationError, match=r"an AsyncEngine can't be used by itself.*run_sync"):
            schema.upgrade(engine)  # type: ignore[arg-type] # which is the point

    def test_a_connection_in_autocommit_is_refused(self, empty_database: Database) -> None:
        """A revision that fails in the middle couldn't be undone."""
        engine = create_engine(empty_database.url("psycopg"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with pytest.raises(schema.MigrationError, match="is in autocommit"):
            schema.upgrade(engine)


class TestStamp:
    def test_it_records_and_runs_nothing(self, empty_database: Database) -> None:
        schema.stamp(empty_database.url(), HEAD)
        found = schema.check(empty_database.url())
        assert (found.state, found.found) == (schema.State.DRIFTED, HEAD)
        assert any(
            line.startswith("table saga_logs: missing, should be ordinary, autovacuum") for line in found.differences
        )


class TestSteps:
    def test_relative_steps_count_from_where_the_command_began(self, empty_database: Database) -> None:
        """One up and one down, whatever the number of revisions."""
        ids = [revision.revision for revision in schema.history()]
        assert schema.upgrade(empty_database.url(), "+2") == ids[:2]
        assert schema.downgrade(empty_database.url(), "-1") == [ids[1]]
        assert schema.current(empty_database.url()) == ids[0]


class TestSettings:
    def test_what_alembic_is_told_overrides_the_attribute(self) -> None:
        given = {"settings": Settings("sagas", lock_wait=timedelta(seconds=1))}
        found = Settings.read({"lock_wait": "2.5", "create_schema": "true"}, given)
        assert found == Settings("sagas", create_schema=True, lock_wait=timedelta(seconds=2.5))

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("lockwait", "1", "no setting -x lockwait: choose among schema, create_schema, lock_wait"),
            ("lock_wait", "soon", "-x lock_wait=soon can't be used: give a number of seconds, such as 60"),
            ("lock_wait", "-1", "-x lock_wait=-1 can't be used: give a number of seconds, such as 60"),
            ("lock_wait", "nan", "-x lock_wait=nan can't be used: give a number of seconds, such as 60"),
            ("lock_wait", "1e300", "-x lock_wait=1e300 can't be used: give a number of seconds, such as 60"),
            ("create_schema", "yes", "-x create_schema=yes can't be used: give true or false"),
            ("schema", "", "-x schema= can't be used: give the name of a schema, such as sagas"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, name: str, value: str, says: str) -> None:
        with pytest.raises(schema.MigrationError) as info:
            Settings.read({name: value}, {})
        assert says in str(info.value)
