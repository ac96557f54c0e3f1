"""Migrations beside each other, beside sessions that hold what they need, and killed.

Who can be where, and what follows:

- Two migrate an empty database: one has the migration lock, the other polls for it without a transaction, and then
  reads the version anew. Nobody reads the version, or creates its table, without the lock.
- One builds an index concurrently, and so waits for all older snapshots: whoever polls has none between two polls.
- Somebody holds a table: a statement waits two seconds for it, so that those behind it in the queue go on; then it
  is tried again, until the patience is over. A revision in one transaction is undone, and one that commits in steps
  begins with the step that needs the strongest lock.
- Somebody holds a table and waits for another that the migration has: one of both is the victim of the deadlock; if
  it is the migration, that is tried again like any other refused lock.
- The process is killed: its session ends with the statement that it is in, and only then gives up the lock. What
  the next one finds is a revision that is done, or not, or committed in part, with perhaps an INVALID index.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, event, text

from saga_store import schema
from saga_store.cli import main
from saga_store.schema import session
from saga_store.schema.fingerprint import expected_fingerprints
from tests.databases import Database, Databases
from tests.extent import WHOLE
from tests.programs import dump
from tests.rows import digests, seed

REVISIONS = [revision.revision for revision in schema.history()]
FIRST, HEAD = REVISIONS[0], REVISIONS[-1]
DRIVERS = ["psycopg", "asyncpg"]
KILLS = int(os.environ.get("SAGA_STORE_TEST_KILLS", "4" if WHOLE else "2"))
PATIENCE_SECONDS = 60
LONG = timedelta(seconds=PATIENCE_SECONDS)
SHORT = timedelta(seconds=0.5)


@pytest.fixture
def below(databases: Databases) -> Iterator[Database]:
    """A database at the first revision, with rows."""
    with databases.empty() as database:
        schema.upgrade(database.url("psycopg"), FIRST)
        seed(database)
        yield database


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let statements of this process give up soon, so that several attempts take no time."""
    monkeypatch.setattr(session, "LOCK_TIMEOUT", "100ms")


@contextmanager
def running(work: Callable[[], Any]) -> Iterator["Future[Any]"]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


@contextmanager
def holding(database: Database, statement: str) -> Iterator[psycopg.Connection]:
    """Execute a statement in a session that keeps its transaction open until the end, or until it is committed."""
    with psycopg.connect(database.url(), application_name="nightly-report") as holder:
        holder.execute(statement.encode())
        yield holder


def until(database: Database, query: str) -> None:
    """Wait until the query gives a row."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with psycopg.connect(database.url(), autocommit=True) as admin:
        while admin.execute(query.encode()).fetchone() is None:
            assert time.monotonic() < deadline, f"never came true: {query}"
            threading.Event().wait(0.01)


def until_blocked(database: Database, holder: psycopg.Connection, *, not_any_more: bool = False) -> None:
    blocked = f"EXISTS (SELECT FROM pg_stat_activity WHERE {holder.info.backend_pid} = ANY (pg_blocking_pids(pid)))"
    until(database, f"SELECT 1 WHERE {blocked} <> {not_any_more}")


def is_clean(database: Database) -> bool:
    """Whether the tables are what the recorded revision makes, neither more nor less."""
    return schema.check(database.url("psycopg")).differences == ()


class TestRace:
    @pytest.mark.parametrize("start", ["base", FIRST])
    def test_six_processes_at_once(self, empty_database: Database, start: str) -> None:
        """All of them exit with 0, and the schema is as if one had been alone."""
        url = empty_database.url()
        if start != "base":
            schema.upgrade(url, start)
            seed(empty_database)
        racers = [FORKS.Process(target=race, args=(url,)) for _ in range(6)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()

        assert [racer.exitcode for racer in racers] == [0] * 6
        assert schema.check(url).state is schema.State.CURRENT

    def test_one_waits_while_another_builds_an_index(self, below: Database) -> None:
        """A waiter for the migration lock isn't waited for by CREATE INDEX CONCURRENTLY in turn."""
        with psycopg.connect(below.url()) as reader:
            reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            reader.execute("SELECT 1 FROM saga_store_version")
            other = migrate(below.url("psycopg"), HEAD)
            with running(lambda: schema.upgrade(below.url("psycopg"), lock_wait=LONG)) as this:
                until(below, "SELECT 1 FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for%'")
                until(below, "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_try_advisory_lock%'")
                reader.rollback()
                assert this.result(PATIENCE_SECONDS) in ([], REVISIONS[1:])
            other.join()

        assert other.exitcode == 0
        assert schema.check(below.url("psycopg")).state is schema.State.CURRENT

    def test_whoever_waits_in_vain_learns_whom_for(self, below: Database) -> None:
        """The message names the session that has the lock, and nothing was done."""
        key = session.KEY.format(schema="'public'")
        with psycopg.connect(below.url(), application_name="other-pipeline", autocommit=True) as other:
            other.execute(f"SELECT pg_advisory_lock({key})".encode())
            with pytest.raises(schema.MigrationLockError) as info:
                schema.upgrade(below.url("psycopg"), lock_wait=SHORT)
            pid = other.info.backend_pid

        assert (
            f"pid {pid}, user {below.address.username}, application 'other-pipeline', holds the migration lock"
            in str(info.value)
        )
        assert schema.current(below.url("psycopg")) == FIRST

    def test_other_schemas_are_migrated_side_by_side(self, empty_database: Database) -> None:
        """The lock is one of the schema, not of the database."""
        key = session.KEY.format(schema="'public'")
        with psycopg.connect(empty_database.url(), autocommit=True) as other:
            other.execute(f"SELECT pg_advisory_lock({key})".encode())
            schema.upgrade(empty_database.url("psycopg"), schema="sagas", create_schema=True, lock_wait=SHORT)
        assert schema.current(empty_database.url("psycopg"), schema="sagas") == HEAD

    def test_the_lock_is_given_back(self, below: Database) -> None:
        """A connection of the caller's lives on, with its own settings and without the lock."""
        engine = create_engine(below.url("psycopg"))
        with engine.connect() as connection:
            connection.execute(text("SET lock_timeout = '7s'"))
            connection.commit()
            schema.upgrade(connection, schema="public")
            held = connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"))
            settings = [
                connection.scalar(text(f"SHOW {name}")) for name in ("lock_timeout", "statement_timeout", "search_path")
            ]
        engine.dispose()
        assert (held, settings) == (0, ["7s", "0", '"$user", public'])


@pytest.mark.usefixtures("short_timeouts")
class TestHeldTables:
    @pytest.mark.parametrize("driver", DRIVERS)
    @pytest.mark.parametrize("table", ["saga_executions", "saga_logs"])
    def test_a_table_that_is_held_for_a_while(self, database: Database, driver: str, table: str) -> None:
        """The migration is refused the table several times, and succeeds once it is free."""
        refused, held = 0, "saga_store_0004"
        schema.downgrade(database.url("psycopg"), held)  # to drop an index nobody is made to wait
        statement = f"LOCK TABLE {table} IN ACCESS SHARE MODE"
        with (
            holding(database, statement) as holder,
            running(lambda: schema.downgrade(database.url(driver), "base", lock_wait=LONG)) as migrating,
        ):
            while refused < 3:
                until_blocked(database, holder)
                until_blocked(database, holder, not_any_more=True)
                refused += 1
            holder.commit()
            undone = migrating.result(PATIENCE_SECONDS)

        assert undone == REVISIONS[REVISIONS.index(held) :: -1]
        assert schema.current(database.url("psycopg")) is None

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_a_table_that_is_held_for_ever(self, below: Database, driver: str) -> None:
        """It gives up in the time it was given, names the holder, and leaves nothing half done."""
        rows, tables = digests(below), dump(below)
        with holding(below, "LOCK TABLE saga_executions, saga_logs IN ACCESS SHARE MODE") as holder:
            with pytest.raises(schema.MigrationLockError) as info:
                schema.upgrade(below.url(driver), lock_wait=SHORT)
            pid = holder.info.backend_pid

        message = str(info.value)
        who = f"pid {pid}, user {below.address.username}, application 'nightly-report'"
        assert f"{who}, holds AccessShareLock on saga_executions, AccessShareLock on saga_logs: idle in" in message
        assert "idle in transaction" in message
        assert "LOCK TABLE saga_executions, saga_logs IN ACCESS SHARE MODE" in message
        assert (digests(below), dump(below)) == (rows, tables)
        assert schema.upgrade(below.url(driver)) == REVISIONS[1:]

    def test_the_way_back_from_a_table_that_is_held_for_ever(self, database: Database) -> None:
        """Revisions that could be undone are, and the one that couldn't is as if nobody had tried."""
        schema.downgrade(database.url("psycopg"), "saga_store_0004")  # what is undone first needs the table, too
        with (
            holding(database, "LOCK TABLE saga_logs IN ACCESS SHARE MODE"),
            pytest.raises(schema.MigrationLockError, match=FIRST),
        ):
            schema.downgrade(database.url("psycopg"), "base", lock_wait=SHORT)

        assert is_clean(database)
        assert schema.current(database.url("psycopg")) is not None

    def test_a_deadlock_is_tried_again(self, below: Database) -> None:
        """The migration is its victim, since the other session isn't made to look for one."""
        with holding(below, "SET deadlock_timeout = '10min'") as other:
            other.execute("LOCK TABLE saga_executions IN ACCESS SHARE MODE")
            engine = create_engine(below.url("psycopg"))

            @event.listens_for(engine, "connect")
            def _wait_for_the_deadlock(connection: psycopg.Connection, _record: object) -> None:
                connection.execute("SET deadlock_timeout = '1s'")
                connection.commit()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(session, "LOCK_TIMEOUT", f"{PATIENCE_SECONDS}s")
                with running(lambda: schema.downgrade(engine, "base", lock_wait=LONG)) as migrating:
                    until_blocked(below, other)  # it has dropped saga_logs, and waits for saga_executions
                    other.execute("LOCK TABLE saga_logs IN ACCESS SHARE MODE")  # until the migration is undone
                    other.commit()
                    assert migrating.result(PATIENCE_SECONDS) == [FIRST]
            engine.dispose()


class TestKilled:
    @pytest.mark.parametrize("way", ["up", "down"])
    @pytest.mark.parametrize("revision", REVISIONS)
    def test_killed_at_random_moments_and_run_again(
        self, databases: Databases, empty_database: Database, revision: str, way: str
    ) -> None:
        """Wherever the process was, the next one brings the database to where it should be, with all its rows."""
        before = REVISIONS[REVISIONS.index(revision) - 1] if revision != FIRST else "base"
        start, end = (before, revision) if way == "up" else (revision, before)
        schema.upgrade(empty_database.url("psycopg"), start) if start != "base" else None
        if start != "base":
            seed(empty_database, 12_000)
        with databases.clone(empty_database) as copy:
            began = time.monotonic()
            migrate(copy.url("psycopg"), end).join()
            took = time.monotonic() - began
            expected = digests(copy) if end != "base" else None
        killed = 0
        while killed < KILLS:
            with databases.clone(empty_database) as copy:
                url = copy.url("psycopg")
                process = migrate(url, end)
                process.join(random.uniform(0, took))  # noqa: S311 - any moment will do
                process.kill()
                process.join()
                if process.exitcode == -signal.SIGKILL:
                    killed += 1
                else:
                    took /= 2  # it had ended: the one that was measured was slower
                go(url, end)

                assert schema.current(url) == (None if end == "base" else end)
                assert is_clean(copy)
                assert expected is None or digests(copy) == expected


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["saga_store.cli", "saga_store.migrations.online", "psycopg", __name__])


def migrate(url: str, revision: str) -> Any:  # noqa: ANN401 - the context's own class of processes
    process = FORKS.Process(target=go, args=(url, revision))
    process.start()
    return process


def race(url: str) -> None:
    sys.exit(main(["upgrade", "--url", url, "--lock-wait", str(PATIENCE_SECONDS)]))


def go(url: str, revision: str) -> None:
    """Migrate up or down to the revision, whichever way that is."""
    found = schema.current(url)
    ids = ["base", *expected_fingerprints()]
    if ids.index(found or "base") < ids.index(revision):
        schema.upgrade(url, revision, lock_wait=LONG)
    elif found and found != revision:
        schema.downgrade(url, revision, lock_wait=LONG)
