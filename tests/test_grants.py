"""Least privilege: the role that the printed GRANTs make keeps the contract, and can do no more."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import LiteralString, cast
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.errors import SchemaError
from saga_store.grants import grants
from saga_store.model import SagaStepStatus
from saga_store.schema import check_grants
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.tables import REVISION
from saga_store.testing import (
    AbsenceContract,
    CheckpointAbsenceContract,
    CheckpointContract,
    CheckpointUnit,
    ConcurrencyContract,
    CreationContract,
    ExecutionContract,
    HistoryContract,
    LeaseContract,
    LeaseRaceContract,
    RecoveryStorageContract,
    RunContract,
    StalenessContract,
    StateContract,
    VersionContract,
    VersionRaceContract,
)
from saga_store.testing.retention import RetentiveStorage, expired, finished, verified
from tests.connections import engine_on
from tests.databases import Database, Databases
from tests.test_contract import PostgreSQLFixtures

PASSWORD = "none-of-a-secret"  # noqa: S105 - the role ends with the test
# No space: psycopg takes none in a URL, where SQLAlchemy writes them as they are.
AWKWARD = """O'Brien;"x"\\$check$%I"""

FORBIDDEN: list[LiteralString] = [
    "UPDATE saga_logs SET details = 'never happened'",
    "UPDATE saga_logs SET saga_id = saga_id",
    "DELETE FROM saga_logs",
    "TRUNCATE saga_logs",
    "DELETE FROM saga_executions",
    "TRUNCATE saga_executions CASCADE",
    "SELECT * FROM saga_logs FOR UPDATE",
    "SELECT setval('saga_logs_id_seq', 1)",
    "UPDATE saga_store_version SET version_num = 'other'",
    "DELETE FROM saga_store_version",
    "INSERT INTO saga_archives (id, state, archived_by) VALUES (gen_random_uuid(), 'REMOVED', 'me')",
    "UPDATE saga_archives SET state = 'VERIFIED'",
    "DELETE FROM saga_archives",
    "UPDATE saga_shard SET shard = 1",
    "DELETE FROM saga_shard",
    "ALTER TABLE saga_logs ADD COLUMN note text",
    "ALTER TABLE saga_logs DISABLE TRIGGER ALL",
    "DROP TABLE saga_logs",
    "CREATE INDEX ON saga_executions (updated_at)",
    "CREATE TRIGGER t BEFORE INSERT ON saga_logs FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "CREATE TABLE mine (id int)",
]

GRANTED = {
    ("saga_executions", "SELECT"),
    ("saga_executions", "INSERT"),
    ("saga_executions", "UPDATE"),
    ("saga_logs", "SELECT"),
    ("saga_logs", "INSERT"),
    ("saga_logs_id_seq", "USAGE"),
    ("saga_archives", "SELECT"),
    ("saga_shard", "SELECT"),
    ("saga_shard", "INSERT"),
    ("saga_store_version", "SELECT"),
}

PRIVILEGES = """
    SELECT c.relname, a.privilege_type
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = %s
    UNION ALL
    SELECT c.relname || '.' || t.attname, a.privilege_type
    FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid CROSS JOIN aclexplode(t.attacl) a
        JOIN pg_roles r ON r.oid = a.grantee
    WHERE r.rolname = %s
"""


@contextmanager
def role_on(database: Database, name: str, options: LiteralString = "") -> Iterator[str]:
    """A role that may connect; it and its privileges in the database are gone afterwards.

    Nobody is connected meanwhile, so that the database can be copied.
    """
    role = Identifier(name)
    with psycopg.connect(database.url(), autocommit=True) as admin:
        admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {} " + options).format(role, Literal(PASSWORD)))
        admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # which PostgreSQL 14 still gives to everybody
    try:
        yield name
    finally:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(SQL("DROP OWNED BY {}").format(role))
            admin.execute(SQL("DROP ROLE {}").format(role))


def run(database: Database, script: str) -> None:
    """Run a script of several statements, as psql does."""
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute(script.encode())


def as_role(database: Database, role: str) -> Database:
    return replace(database, address=database.address.set(username=role, password=PASSWORD))


def privileges(database: Database, role: str) -> set[tuple[str, str]]:
    """What the role itself was granted on tables, columns and sequences: their names, and what."""
    with psycopg.connect(database.url()) as connection:
        return set(connection.execute(PRIVILEGES, [role, role]).fetchall())


@pytest.fixture(scope="module")
def granted(databases: Databases, template: Database) -> Iterator[Database]:
    """Yield a database as a role sees it that has the printed privileges there, and no others."""
    with databases.clone(template) as database, role_on(database, f"{AWKWARD}{uuid4().hex[:8]}") as role:
        run(database, grants(role))
        yield as_role(database, role)


class AsApplication:
    """The tests connect as the application's role. None of the contract's needs a database of its own."""

    @pytest.fixture
    def database(self, granted: Database) -> Database:
        return granted


class TestContract(
    AsApplication,
    PostgreSQLFixtures,
    CreationContract,
    StateContract,
    AbsenceContract,
    HistoryContract,
    ConcurrencyContract,
    ExecutionContract,
    VersionContract,
    CheckpointContract,
    CheckpointAbsenceContract,
    VersionRaceContract,
    StalenessContract,
    RecoveryStorageContract,
    RunContract,
    LeaseContract,
    LeaseRaceContract,
):
    """The contract on engine binds of both drivers, but for input: what is refused before any SQL, and contexts."""

    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        storage = SqlAlchemySagaStorage(engine)
        return lambda: nullcontext(storage)


class TestLimits(AsApplication):
    @pytest.mark.parametrize("statement", FORBIDDEN)
    def test_postgresql_refuses_everything_else(self, database: Database, statement: LiteralString) -> None:
        """History can be neither changed nor deleted, sagas not deleted, and nothing altered."""
        with psycopg.connect(database.url()) as connection, pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement)


class TestScript:
    @pytest.fixture
    def role(self, database: Database) -> Iterator[str]:
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            yield role

    async def test_a_migration_that_is_missing_is_still_named(self, database: Database, role: str) -> None:
        """The role may read the version table, so that SchemaError can say what was found there."""
        run(database, grants(role))
        run(database, "DROP TABLE saga_logs")
        async with engine_on(as_role(database, role).url("asyncpg")) as engine:
            with pytest.raises(SchemaError) as caught:
                await SqlAlchemySagaStorage(engine).get_step_history(uuid4())
        assert caught.value.found == REVISION

    def test_it_can_be_run_again(self, database: Database, role: str) -> None:
        """Running it twice leaves what running it once did."""
        run(database, grants(role))
        once = privileges(database, role)
        run(database, grants(role))
        assert privileges(database, role) == once == GRANTED

    def test_what_the_role_could_do_before_ends(self, database: Database, role: str) -> None:
        """Privileges of a table and of single columns are taken back before the new ones are given."""
        run(database, f"GRANT ALL ON saga_executions, saga_logs, saga_logs_id_seq TO {role}")
        run(database, f"GRANT UPDATE (details) ON saga_logs TO {role}")
        run(database, grants(role))
        assert privileges(database, role) == GRANTED

    def test_another_schema(self, database: Database, role: str) -> None:
        """The names in the script are qualified, whatever the search path is, and quoted."""
        run(database, 'CREATE SCHEMA "my ""sagas"""')
        for table in ("saga_executions", "saga_logs", "saga_archives", "saga_shard", "saga_store_version"):
            run(database, f'ALTER TABLE {table} SET SCHEMA "my ""sagas"""')
        run(database, grants(role, schema='my "sagas"'))
        assert privileges(database, role) == GRANTED

    def test_an_unknown_role_is_named(self, database: Database) -> None:
        with pytest.raises(errors.UndefinedObject, match='role "nobody_here" does not exist'):
            run(database, grants("nobody_here"))

    @pytest.mark.parametrize(
        ("power", "fault"),
        [
            ("ALTER TABLE saga_logs OWNER TO {role}", "it owns the tables"),
            ("ALTER TABLE saga_executions OWNER TO {role}", "it owns the tables"),
            ("GRANT {owner} TO {role}", "it belongs to {owner}, a superuser"),
            ("GRANT pg_write_all_data TO {role}", "it may DELETE on saga_executions as pg_write_all_data"),
            ("GRANT pg_write_server_files TO {role}", "it belongs to pg_write_server_files"),
            (
                "GRANT DELETE ON saga_logs TO PUBLIC",
                "it may DELETE on saga_logs, as everybody may: REVOKE DELETE ON TABLE saga_logs FROM PUBLIC",
            ),
            ("GRANT UPDATE (details) ON saga_logs TO PUBLIC", "it may UPDATE on saga_logs, some columns"),
            ("GRANT TRUNCATE ON saga_executions TO PUBLIC", "it may TRUNCATE on saga_executions"),
            ("GRANT TRIGGER ON saga_executions TO PUBLIC", "it may TRIGGER on saga_executions"),
            (
                "GRANT REFERENCES (id) ON saga_executions TO PUBLIC",
                "it may REFERENCES on saga_executions, some columns",
            ),
            ("GRANT UPDATE ON saga_store_version TO PUBLIC", "it may UPDATE on saga_store_version"),
            (
                "GRANT UPDATE ON SEQUENCE saga_logs_id_seq TO PUBLIC",
                "it may UPDATE on saga_logs_id_seq, as everybody may: REVOKE UPDATE ON SEQUENCE saga_logs_id_seq FROM",
            ),
            ("ALTER ROLE {role} SUPERUSER", "it is a superuser"),
        ],
    )
    def test_a_role_that_could_do_more_is_refused(self, database: Database, role: str, power: str, fault: str) -> None:
        """Grants that limit nothing would be a false comfort: the script fails, and grants nothing."""
        names = {"role": role, "owner": database.address.username}
        run(database, power.format(**names))
        before = privileges(database, role)
        said = "(?s)could do other things than it should, so nothing was granted:.*" + re.escape(fault.format(**names))
        with pytest.raises(errors.RaiseException, match=said):
            run(database, grants(role))
        assert privileges(database, role) == before
        assert any(line.startswith(fault.format(**names)) for line in check_grants(database.url(), role))
        for table in ("saga_logs", "saga_executions"):
            run(database, f"ALTER TABLE {table} OWNER TO CURRENT_USER")
        run(database, f"ALTER ROLE {role} NOSUPERUSER")

    def test_what_it_could_do_as_another_role(self, database: Database, role: str) -> None:
        """One that it belongs to and doesn't inherit from, for it can SET ROLE to that."""
        with role_on(database, f"{role}_group") as group:
            run(database, f"GRANT DELETE ON saga_logs TO {group}; ALTER ROLE {role} NOINHERIT; GRANT {group} TO {role}")
            with pytest.raises(errors.RaiseException, match=f"it may DELETE on saga_logs as {group}"):
                run(database, grants(role))

    def test_who_may_not_grant_is_told(self, database: Database, role: str) -> None:
        """PostgreSQL itself would only warn somebody who has privileges but no right to pass them on."""
        run(database, grants(role))
        with role_on(database, f"{role}_other") as other:
            run(database, grants(other))
            with pytest.raises(errors.InsufficientPrivilege, match=f"{other} may not grant on"):
                run(as_role(database, other), grants(role))


class TestArchiver:
    """The role that archives: it deletes nothing by itself, and has deleted only what may be."""

    @pytest.fixture
    def archiver(self, database: Database) -> Iterator[Database]:
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            run(database, grants(role, archiver=True))
            yield as_role(database, role)

    @pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
    async def test_it_lets_go_what_is_unchanged(self, database: Database, archiver: Database, driver: str) -> None:
        """By its functions: exactly what the statements of the owner let go; and forgets the stubs."""
        async with engine_on(database.url(driver)) as own, engine_on(archiver.url(driver)) as theirs:
            storage = cast("RetentiveStorage", SqlAlchemySagaStorage(own))
            archiving = cast("RetentiveStorage", SqlAlchemySagaStorage(theirs))
            name = "order"
            saga_id, late, held, leased = [await finished(storage, name) for _ in range(4)]
            lease = "UPDATE saga_executions SET lease_owner = 'w', lease_expires_at = {} WHERE id = '{}'"
            run(database, lease.format("statement_timestamp()", saga_id))
            marks = [saga.mark for saga in await expired(archiving, name)]
            await storage.log_step(late, "late", "act", SagaStepStatus.COMPLETED)
            await storage.hold_saga(held, by="alice", reason="the auditors")
            run(database, lease.format("'infinity'", leased))
            archive = await verified(archiving)
            async with archiving.archiving(by="archiver-1") as turn:
                await turn.check()
                made = await archiving.make_stubs(archive.id, marks)
            assert (list(made.made), list(made.already)) == ([saga_id], [])
            again = await archiving.make_stubs(archive.id, marks)
            assert (list(again.made), list(again.already)) == ([], [saga_id])
            assert (await storage.get_archive(archive.id)).removed == 1
            assert len(await storage.get_step_history(late)) == 3
            await archiving.finish_archive(archive.id)
            assert await archiving.forget_stubs(older_than=timedelta(0)) == 1
            assert await storage.find_stub(saga_id) is None

    @pytest.mark.parametrize(
        "statement",
        [
            *[statement for statement in FORBIDDEN if "saga_archives" not in statement],
            "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES (gen_random_uuid(), '', 'act', '')",
            "UPDATE saga_executions SET context = '{}', archived_at = now()",
            "INSERT INTO saga_executions (id, name, context) VALUES (gen_random_uuid(), 'order', '{}')",
            "DELETE FROM saga_archives",
        ],
    )
    def test_postgresql_refuses_everything_else(self, archiver: Database, statement: LiteralString) -> None:
        """No entry and no saga is deleted, changed or made by hand."""
        with psycopg.connect(archiver.url()) as connection, pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement)

    def test_the_functions_delete_nothing_that_lives(self, database: Database, archiver: Database) -> None:
        """Whatever is put into the ledger: not what is unfinished, and no stub that isn't one."""
        run(
            database,
            """
            INSERT INTO saga_executions (id, name, context, status) VALUES (gen_random_uuid(), 'o', '{}', 'RUNNING');
            INSERT INTO saga_logs (saga_id, step_name, action, status)
            SELECT id, 'a', 'act', 'FAILED' FROM saga_executions
            """,
        )
        with psycopg.connect(archiver.url(), autocommit=True) as connection:
            connection.execute(
                "INSERT INTO saga_archives (id, state, archived_by, archived_at) "
                "VALUES ('00000000-0000-0000-0000-000000000001', 'VERIFIED', 'me', 'infinity')"
            )
            made = connection.execute(
                "SELECT saga_store_make_stubs('00000000-0000-0000-0000-000000000001', array_agg(e.id), array_agg(1), "
                "array_agg(1), array_agg(l.id)) FROM saga_executions e JOIN saga_logs l ON l.saga_id = e.id"
            ).fetchall()
            gone = connection.execute(
                "SELECT saga_store_forget_stubs(array_agg(id), -1e9) FROM saga_executions"
            ).fetchall()
            left = connection.execute("SELECT count(*) FROM saga_logs").fetchone()
        assert (made, gone, left) == ([], [], (1,))

    def test_check_tells_what_is_amiss(self, database: Database, archiver: Database) -> None:
        """Of the archiver, and of a role that shouldn't be one; who is given other grants isn't it any more."""
        role = str(archiver.address.username)
        assert check_grants(database.url(), role, archiver=True) == []
        assert any("may INSERT on saga_archives" in fault for fault in check_grants(database.url(), role))
        assert "it may execute saga_store_make_stubs" in check_grants(database.url(), role)
        run(database, grants(role))
        assert check_grants(database.url(), role) == []
        faults = check_grants(database.url(), role, archiver=True)
        assert "it may not execute saga_store_make_stubs" in faults
        assert "it may UPDATE on saga_executions" in faults
        with pytest.raises(ValueError, match="only reads can't be the archiver's"):
            grants(role, read_only=True, archiver=True)


class TestNames:
    @pytest.mark.parametrize("reserved", ["public", "PUBLIC", "none"])
    def test_everybody_is_no_role(self, reserved: str) -> None:
        """Even in quotes PostgreSQL would take them for everybody and for nobody."""
        with pytest.raises(ValueError, match=f"single role, not '{reserved}': give the application a role of its own"):
            grants(reserved)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("", "must not be empty"),
            ("a\0b", "must not contain NUL"),
            ("\ud800", "must be text that UTF-8 can hold"),
            ("r" * 64, "must be at most 63 bytes long, as PostgreSQL's names are, not 64"),
            ("\u20ac" * 22, "must be at most 63 bytes long, as PostgreSQL's names are, not 66"),
        ],
    )
    def test_what_can_be_no_name_is_refused(self, name: str, reason: str) -> None:
        """The message names the argument, the value and the reason."""
        calls: dict[str, Callable[[], str]] = {
            "role": lambda: grants(name),
            "schema": lambda: grants("app", schema=name),
        }
        for argument, call in calls.items():
            with pytest.raises(ValueError, match=f"^{argument} {reason}"):
                call()
