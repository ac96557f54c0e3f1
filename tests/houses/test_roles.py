"""Roles as deployments have them: default privileges, PUBLIC, names that were taken, and who may do little."""

import json
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.grants import grants
from saga_store.sqlalchemy.tables import REVISION
from tests.databases import Database
from tests.programs import psql
from tests.test_grants import FORBIDDEN, GRANTED, as_role, privileges, role_on, run

DRIVERS = ["psycopg", "asyncpg"]


@pytest.fixture
def role(empty_database: Database) -> Iterator[str]:
    with role_on(empty_database, f"saga_test_{uuid4().hex[:8]}") as role:
        yield role


def allowed(database: Database, role: str, statement: str) -> bool:
    """Whether the role gets through with it; nothing of it stays."""
    with psycopg.connect(as_role(database, role).url()) as connection:
        try:
            connection.execute(statement.encode())
        except errors.InsufficientPrivilege:
            return False
        finally:
            connection.rollback()
    return True


class TestGrants:
    @pytest.fixture(
        params=[
            "; ".join(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO {{role}}" for kind in ("TABLES", "SEQUENCES")),
            "CREATE SEQUENCE saga_logs_id_seq",
            "CREATE TABLE saga_logs_id_seq (id int)",
        ],
        ids=["default privileges", "a sequence of that name", "a table of that name"],
    )
    def house(self, empty_database: Database, role: str, request: pytest.FixtureRequest) -> Database:
        """A database that was like this before the tables came."""
        run(empty_database, request.param.format(role=role))
        schema.upgrade(empty_database.url())
        return empty_database

    def test_exactly_what_is_promised(self, house: Database, role: str) -> None:
        """In whichever house: all that the storage needs, and nothing of what is forbidden."""
        run(house, grants(role, schema=None))
        assert {(name.replace("seq1", "seq"), what) for name, what in privileges(house, role)} == GRANTED
        insert = (
            "INSERT INTO saga_executions (id, name, status, context) VALUES (gen_random_uuid(), 'o', 'PENDING', '{}');"
            "INSERT INTO saga_logs (saga_id, step_name, action, status) "
            "SELECT id, 's', 'act', 'STARTED' FROM saga_executions"
        )
        assert allowed(house, role, insert)
        for statement in FORBIDDEN:
            name = "pg_get_serial_sequence('saga_logs', 'id')"
            assert not allowed(house, role, statement.replace("'saga_logs_id_seq'", name)), statement

    def test_the_schema_is_the_sessions_own_or_the_one_that_is_named(self, empty_database: Database, role: str) -> None:
        """Of two that have tables, with a search path through both: the first, or the named one; never both."""
        second = 'the "second" 100% :x'
        for name in ("first", second):
            schema.upgrade(empty_database.url(), schema=name, create_schema=True)
        run(empty_database, f'SET search_path = first, "the ""second"" 100% :x", public; {grants(role, schema=None)}')
        assert self.schemas(empty_database, role) == {"first"}
        run(empty_database, f"SET search_path = first; {grants(role, schema=second)}")
        assert self.schemas(empty_database, role) == {"first", second}

    @staticmethod
    def schemas(database: Database, role: str) -> set[str]:
        query = """
            SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class CROSS JOIN aclexplode(relacl) a
            WHERE a.grantee = %s::regrole
        """
        with psycopg.connect(database.url()) as connection:
            return {name.strip('"').replace('""', '"') for (name,) in connection.execute(query, [role])}

    def test_tables_that_are_elsewhere_are_not_found_by_luck(self, database: Database) -> None:
        """A schema without them is refused, though the search path leads on to some."""
        run(database, "CREATE SCHEMA shop")
        for name in (None, "shop"):
            script = f"SET search_path = shop, public; {grants('whoever', schema=name)}"
            with pytest.raises(errors.UndefinedTable, match="there is no table saga_logs in schema shop"):
                run(database, script)
        with pytest.raises(errors.InvalidSchemaName, match="there is no schema nowhere"):
            run(database, grants("whoever", schema="nowhere"))

    @pytest.mark.parametrize("name", ["100%", ":x", ":'x'", "\\", "é ü", "$1", "a;b"])
    def test_any_name_through_psql(self, empty_database: Database, name: str) -> None:
        schema.upgrade(empty_database.url(), schema=name, create_schema=True)
        with role_on(empty_database, f"{name}{uuid4().hex[:8]}") as role:
            done = psql(empty_database, grants(role, schema=name))
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert privileges(empty_database, role) == GRANTED
            assert schema.check_grants(empty_database.url(), role, schema=name) == []


class TestReadOnly:
    def test_it_reads_and_does_nothing_else(self, database: Database) -> None:
        """For views: what had been granted for writing is taken back."""
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            run(database, grants(role))
            run(database, grants(role, read_only=True))
            for table in ("saga_executions", "saga_logs", "saga_archives", "saga_store_version"):
                assert allowed(database, role, f"TABLE {table}")
            for statement in [
                *FORBIDDEN,
                "INSERT INTO saga_logs DEFAULT VALUES",
                "UPDATE saga_executions SET name = 'x'",
                "SELECT nextval('saga_logs_id_seq')",
            ]:
                assert not allowed(database, role, statement), statement
            assert schema.check_grants(database.url(), role, read_only=True) == []
            assert "it may not INSERT on saga_logs" in schema.check_grants(database.url(), role)


@pytest.mark.parametrize("driver", DRIVERS)
class TestCheck:
    def test_what_has_changed_since(self, database: Database, driver: str, capsys: pytest.CaptureFixture[str]) -> None:
        """0 while it holds, 5 and a line for each thing once it doesn't; the application's role may ask itself."""
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            run(database, grants(role))
            url = database.url(driver)
            line = ["grants", "--check", "--role", role, "--url"]
            for asking in (url, as_role(database, role).url(driver)):
                assert main([*line, asking]) == Exit.DONE
                assert capsys.readouterr().out == f"{role} may do what it has to, and no more\n"
            run(database, f"GRANT DELETE ON saga_logs TO {role}; REVOKE USAGE ON SEQUENCE saga_logs_id_seq FROM {role}")
            assert main([*line, url, "--json"]) == Exit.DRIFTED
            assert json.loads(capsys.readouterr().out) == {
                "role": role,
                "faults": [
                    "it may DELETE on saga_logs",
                    "it may not USAGE on saga_logs_id_seq",
                ],
            }
            assert main([*line, url]) == Exit.DRIFTED
            assert capsys.readouterr().out.splitlines()[-1].startswith("Run the script of `saga-store grants` again")

    def test_nobody_and_nothing(self, empty_database: Database, driver: str) -> None:
        """A role or tables that aren't there are faults, in a line each."""
        faults = schema.check_grants(empty_database.url(driver), "nobody_here")
        assert faults[0] == "there is no role of this name"
        assert "there is no table saga_logs here" in faults
        with pytest.raises(schema.MigrationError, match="there is no schema 'nowhere', or you may not use it"):
            schema.check_grants(empty_database.url(driver), "nobody_here", schema="nowhere")


@pytest.mark.parametrize("driver", DRIVERS)
class TestWhoMayDoLittle:
    def test_create_schema_asks_for_what_is_missing_only(
        self, empty_database: Database, driver: str, role: str
    ) -> None:
        """A role that may not create schemas migrates into the one that it was given."""
        run(empty_database, f"CREATE SCHEMA shop AUTHORIZATION {role}")
        url = as_role(empty_database, role).url(driver)
        assert schema.upgrade(url, schema="shop", create_schema=True)
        assert schema.check(url, schema="shop").state is schema.State.CURRENT

    def test_create_schema_on_paper(self, empty_database: Database, driver: str, role: str) -> None:
        run(empty_database, f"CREATE SCHEMA {driver} AUTHORIZATION {role}")
        done = psql(as_role(empty_database, role), schema.sql(schema=driver, create_schema=True))
        assert done.returncode == 0, done.stderr

    def test_the_applications_role_gets_an_answer(self, database: Database, driver: str) -> None:
        """It reads the version, and isn't told that the database is behind."""
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            run(database, grants(role))
            url = as_role(database, role).url(driver)
            assert schema.current(url) == REVISION
            assert schema.check(url).state is schema.State.CURRENT

    def test_a_role_that_may_not_read_the_version_is_told(
        self, database: Database, driver: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Neither "behind" nor a traceback: which privilege is missing, and what gives it."""
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            url = as_role(database, role).url(driver)
            for verb in ("current", "check"):
                assert main([verb, "--url", url]) == Exit.FAILED
                said = capsys.readouterr().err
                assert f"saga-store: {role} may not read saga_store_version in schema public: " in said
                assert f"saga-store grants --role {role}" in said
            run(database, f"REVOKE USAGE ON SCHEMA public FROM PUBLIC, {role}")
            for line in (["current"], ["check"], ["check", "--schema", "public"]):
                assert main([*line, "--url", url]) == Exit.FAILED
                assert "may not use" in capsys.readouterr().err
