"""The helper for full tables, by its first user, saga_store_0002, and on paper."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from saga_store.migrations import online
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.pool import NullPool

from saga_store import schema
from saga_store.schema.session import KEY
from tests.databases import Database
from tests.pages import blocks_of
from tests.programs import dump, psql
from tests.rows import digests, seed

IDS = ["base", *(revision.revision for revision in schema.history())]
ROOT = Path(__file__).parent.parent

# Written by hand, for no storage leaves half a lease.
HALVE = """
    UPDATE saga_executions SET lease_expires_at = CASE WHEN version % 2 = 0 THEN now() END,
        lease_owner = CASE WHEN version % 2 = 1 THEN 'worker' END
"""


@pytest.fixture
def below(empty_database: Database) -> Database:
    """A database at the revision before 0002, with rows."""
    schema.upgrade(empty_database.url("psycopg"), "saga_store_0001")
    seed(empty_database)
    return empty_database


def execute(database: Database, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database.url(), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def migrating(database: Database, change: Callable[[], None]) -> None:
    """Make a change as a revision does."""
    engine = create_engine(database.url("psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        migration = MigrationContext.configure(connection, opts={"transaction_per_migration": True})
        with migration.begin_transaction(_per_migration=True), Operations.context(migration):
            change()


class TestLeases:
    @pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
    def test_half_leases_are_cleared(self, below: Database, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In batches, and neither the version nor the time of the last change is touched."""
        monkeypatch.setattr(online, "BATCH_ROWS", 7)
        execute(below, HALVE)
        kept = execute(below, "SELECT id, version, updated_at, status, context::text FROM saga_executions ORDER BY id")
        seen: list[schema.Progress] = []
        schema.upgrade(below.url(driver), "saga_store_0002", report=seen.append)

        leases = execute(below, "SELECT DISTINCT lease_owner, lease_expires_at FROM saga_executions")
        assert leases == [(None, None)]
        assert kept == execute(
            below, "SELECT id, version, updated_at, status, context::text FROM saga_executions ORDER BY id"
        )
        assert [progress.done for progress in seen[:3]] == [7, 14, 21]
        assert (seen[0].total, seen[-1].finished) == (200, True)

    def test_whole_leases_stay(self, below: Database) -> None:
        rows = digests(below)
        schema.upgrade(below.url("psycopg"), "saga_store_0002")
        assert digests(below) == rows

    def test_half_a_lease_is_refused_from_then_on(self, database: Database) -> None:
        seed(database)
        with pytest.raises(psycopg.errors.CheckViolation, match="ck_saga_executions_lease"):
            execute(database, HALVE)


class TestFailedSagas:
    def test_the_question_of_the_documentation_uses_the_index(self, database: Database) -> None:
        """Whatever the size of the table: only failed sagas are in it."""
        seed(database, 20_000)
        (query,) = (block.text for block in blocks_of("docs/how-to/psql.md") if block.section == "What failed lately")
        plan = execute(database, f"EXPLAIN {query}")
        assert any("ix_saga_executions_failed" in str(line) for (line,) in plan), plan

    def test_updates_of_contexts_stay_hot(self, database: Database) -> None:
        """No revision has indexed a column that they change."""
        seed(database, 100)
        execute(database, "VACUUM saga_executions")
        with psycopg.connect(database.url(), autocommit=True) as connection:
            for _ in range(5):
                connection.execute(
                    "UPDATE saga_executions SET context = '{}', version = version + 1, updated_at = now() "
                    "WHERE name = 'order-1'"
                )
        updated = b"SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'saga_executions'"
        deadline = time.monotonic() + 60
        with psycopg.connect(database.url(), autocommit=True) as connection:
            # A session that has ended tells its counts a little later.
            while (found := connection.execute(updated).fetchone()) and found[0] < 5:
                assert time.monotonic() < deadline
        assert found == (5, 5)


class TestIndexes:
    def test_an_invalid_leftover_is_repaired(self, below: Database) -> None:
        """One that a killed build has left, whatever it was to be."""
        execute(
            below,
            "INSERT INTO saga_executions (id, name, context) SELECT gen_random_uuid(), 'same', '{}' FROM "
            "generate_series(1, 2)",
        )
        with pytest.raises(psycopg.errors.UniqueViolation):
            execute(below, "CREATE UNIQUE INDEX CONCURRENTLY ix_saga_executions_failed ON saga_executions (name)")
        invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
        assert execute(below, invalid) == [("ix_saga_executions_failed",)]

        schema.upgrade(below.url("psycopg"))
        assert execute(below, invalid) == []
        assert schema.check(below.url("psycopg")).state is schema.State.CURRENT

    def test_a_build_that_fails_leaves_no_invalid_index(self, below: Database) -> None:
        with pytest.raises(IntegrityError):
            migrating(below, lambda: online.create_index("ix_same", "saga_executions", "(status)", unique=True))
        assert execute(below, "SELECT to_regclass('ix_same')") == [(None,)]

    def test_a_valid_one_of_an_earlier_attempt_is_kept(self, below: Database) -> None:
        """So that a revision that goes on after a kill doesn't build it twice."""
        execute(below, "CREATE INDEX ix_kept ON saga_executions (name)")
        before = execute(below, "SELECT 'ix_kept'::regclass::oid")
        migrating(below, lambda: online.create_index("ix_kept", "saga_executions", "(name)"))
        assert execute(below, "SELECT 'ix_kept'::regclass::oid") == before


class TestChecks:
    def test_one_that_a_row_breaks_is_taken_back(self, below: Database) -> None:
        """Otherwise every update of that row would be refused."""
        with pytest.raises(IntegrityError):
            migrating(below, lambda: online.add_check("ck_all", "saga_executions", "name = 'order-1'"))
        assert execute(below, "SELECT 1 FROM pg_constraint WHERE conname = 'ck_all'") == []

    def test_one_that_was_left_unvalidated_is_validated(self, below: Database) -> None:
        execute(below, "ALTER TABLE saga_executions ADD CONSTRAINT ck_some CHECK (version > 0) NOT VALID")
        migrating(below, lambda: online.add_check("ck_some", "saga_executions", "version > 0"))
        assert execute(below, "SELECT convalidated FROM pg_constraint WHERE conname = 'ck_some'") == [(True,)]

    def test_one_that_cannot_be_replaced_stays_in_force(self, database: Database) -> None:
        """Dropping the old one and adding the new one are one transaction: no writer comes in between."""
        seed(database)
        with pytest.raises(ProgrammingError, match="no_column"):
            migrating(
                database, lambda: online.add_check("ck_saga_executions_lease", "saga_executions", "no_column > 0")
            )
        with pytest.raises(psycopg.errors.CheckViolation, match="ck_saga_executions_lease"):
            execute(database, HALVE)


class TestOnPaper:
    @pytest.mark.parametrize(("start", "end"), [*pairwise(IDS), *((up, down) for down, up in pairwise(IDS))])
    def test_each_step_replayed_by_psql_does_what_it_does_online(
        self, empty_database: Database, start: str, end: str
    ) -> None:
        """The script leaves the same schema, also in the session that it ran in."""
        url = empty_database.url("psycopg")
        schema.upgrade(url, end if start == "base" else start)
        if end != "base" and start != "base":
            (schema.upgrade if IDS.index(end) > IDS.index(start) else schema.downgrade)(url, end)
        wanted = dump(empty_database) if end != "base" else ""
        schema.downgrade(url, "base")
        if start != "base":
            schema.upgrade(url, start)
            seed(empty_database)
        tail = "SHOW lock_timeout; SHOW statement_timeout; SELECT count(*) FROM pg_locks WHERE locktype = 'advisory';"
        done = psql(empty_database, schema.sql(start, end) + "\\pset tuples_only\n" + tail)

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split()[-3:] == ["0", "0", "0"]
        if end == "base":
            assert execute(empty_database, "SELECT to_regclass('saga_executions'), to_regclass('saga_logs')") == [
                (None, None)
            ]
        else:
            assert schema.current(url) == end
            assert dump(empty_database) == wanted

    def test_half_leases_are_cleared(self, below: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(online, "BATCH_ROWS", 7)
        execute(below, HALVE)
        done = psql(below, schema.sql("saga_store_0001", "saga_store_0002"))
        assert (done.returncode, done.stderr) == (0, "")
        assert execute(below, "SELECT DISTINCT lease_owner, lease_expires_at FROM saga_executions") == [(None, None)]

    def test_in_a_schema_that_it_creates(self, empty_database: Database) -> None:
        script = schema.sql(schema='the "Sagas"', create_schema=True)
        done = psql(empty_database, script)
        assert (done.returncode, done.stderr) == (0, "")
        assert schema.check(empty_database.url("psycopg"), schema='the "Sagas"').state is schema.State.CURRENT

    def test_a_script_for_another_revision_is_refused_at_once(self, below: Database) -> None:
        before = dump(below)
        for script in (schema.sql(), schema.sql("saga_store_0002", "saga_store_0001")):
            done = psql(below, script)
            assert done.returncode != 0
            assert "saga_store_0001" in done.stderr
        assert dump(below) == before

    def test_a_migration_under_way_is_not_joined(self, below: Database) -> None:
        key = KEY.format(schema="'public'")
        with psycopg.connect(below.url(), autocommit=True) as other:
            other.execute(f"SELECT pg_advisory_lock({key})".encode())
            done = psql(below, schema.sql("saga_store_0001", "head"))
        assert done.returncode != 0
        assert "another migration of schema public is under way" in done.stderr

    def test_a_missing_schema_is_named_as_the_reason(self, empty_database: Database) -> None:
        done = psql(empty_database, schema.sql(schema="nowhere"))
        assert done.returncode != 0
        assert "there is no such schema: create it first" in done.stderr

    def test_a_revision_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(schema.MigrationError, match="no revision 'saga_store_9999': choose among base, saga_store"):
            schema.sql("saga_store_9999")


class TestSquawk:
    @pytest.mark.parametrize(("start", "end"), [*pairwise(IDS), *((up, down) for down, up in pairwise(IDS))])
    def test_no_statement_blocks_without_need(self, tmp_path: Path, start: str, end: str) -> None:
        """The linter of migrations finds nothing but what is excluded below, each for a reason."""
        excluded = {
            "prefer-text-field": "lengths are part of the contract",
            "prefer-bigint-over-int": "versions and attempts count one saga's own changes",
            "prefer-identity": "the sequence of saga_logs is what the first revision made",
            "prefer-robust-stmts": "a guard comes first, and a revision is one transaction or can be repeated",
            "ban-drop-constraint": "a half-made one goes in the statement that adds it, and the way back takes it away",
            "require-timeout-settings": "they stand at the top of the script",
        }
        if IDS.index(end) < IDS.index(start):
            excluded["ban-drop-table"] = "going back to nothing is asked for by that name"
            excluded["ban-drop-column"] = "the way back takes away what the way up added"
        script = tmp_path / "script.sql"
        script.write_text(schema.sql(start, end))
        line = [Path(sys.executable).parent / "squawk", "--reporter", "json", "--exclude", ",".join(excluded), script]
        done = subprocess.run(
            [str(word) for word in line], capture_output=True, text=True, check=False, env=dict(os.environ)
        )
        assert json.loads(done.stdout or "[]") == []
        assert done.returncode == 0, done.stderr
