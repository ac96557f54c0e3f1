"""Ctrl-C, sessions that are killed, and transactions that belong to no session, while a real command waits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest

from saga_store import schema
from saga_store.cli.exits import Exit
from saga_store.schema.session import KEY
from saga_store.testing.postgres import embedded
from tests.databases import Database

DRIVERS = ["psycopg", "asyncpg"]
FIRST = "saga_store_0001"
PATIENCE_SECONDS = 12.0

_KEY = KEY.format(schema="'public'")
HOLDS = {
    "the migration lock": f"SELECT pg_advisory_lock({_KEY})",
    "a table": "LOCK TABLE saga_executions IN ACCESS EXCLUSIVE MODE",
    # An index that is built meanwhile waits for whoever has one.
    "a snapshot": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1",
}
WAITING = {
    "the migration lock": "backend_start < clock_timestamp() - interval '1 s'",
    "a table": "wait_event_type = 'Lock'",
    "a snapshot": "wait_event = 'virtualxid' AND query LIKE 'CREATE %INDEX%'",
}


@contextmanager
def held(database: Database, what: str) -> Iterator[psycopg.Connection]:
    """Hold what the command will wait for."""
    with psycopg.connect(database.url()) as holder, psycopg.connect(database.url(), autocommit=True) as watcher:
        holder.execute(HOLDS[what].encode())
        yield watcher


def until_waiting(watcher: psycopg.Connection, what: str, command: "subprocess.Popen[str]") -> int:
    """Return the process id of its session, once it waits."""
    query = (
        f"SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {WAITING[what]} "  # noqa: S608 - ours
        "AND application_name = 'deploy'"
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if row := watcher.execute(query.encode()).fetchone():
            return int(row[0])
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)  # nothing tells when another process's session begins to wait
    raise AssertionError(f"it never waited for {what}")


@contextmanager
def upgrading(database: Database, driver: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "saga_store", "upgrade", "--lock-wait", "60"]
    environment = {**os.environ, "DATABASE_URL": f"{database.url(driver)}?application_name=deploy"}
    with subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("what", HOLDS)
class TestWaiting:
    def test_an_interrupt_is_told_as_one(self, empty_database: Database, driver: str, what: str) -> None:
        """And the next upgrade finds nothing in its way."""
        schema.upgrade(empty_database.url("psycopg"), FIRST)
        with held(empty_database, what) as watcher, upgrading(empty_database, driver) as process:
            until_waiting(watcher, what, process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_SECONDS)
            assert (process.returncode, err.splitlines()[-1]) == (Exit.INTERRUPTED, "saga-store: interrupted")
            assert "Traceback" not in err
        schema.upgrade(empty_database.url(driver))
        assert schema.check(empty_database.url(driver)).state is schema.State.CURRENT

    def test_a_lost_session_is_told_as_that(self, empty_database: Database, driver: str, what: str) -> None:
        """By what the server said, and not by what came of it in SQLAlchemy."""
        schema.upgrade(empty_database.url("psycopg"), FIRST)
        with held(empty_database, what) as watcher, upgrading(empty_database, driver) as process:
            watcher.execute("SELECT pg_terminate_backend(%s)", [until_waiting(watcher, what, process)])
            _, err = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == Exit.FAILED
            assert "terminat" in err or "closed" in err, err
            assert not any(word in err for word in ("Traceback", "begin()", "invalid transaction")), err
        schema.upgrade(empty_database.url(driver))
        assert schema.check(empty_database.url(driver)).state is schema.State.CURRENT


@pytest.fixture(scope="module")
def preparing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that allows what most don't: prepared transactions."""
    data = tmp_path_factory.mktemp("server") / "data"
    with embedded(data=data) as server, psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET max_prepared_transactions = 2")
        admin.execute("ALTER SYSTEM SET wal_level = logical")
    with embedded(data=data) as server:
        schema.upgrade(server.url, FIRST)
        yield server.url


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_belongs_to_no_session_is_named_with_what_ends_it(preparing: str, driver: str) -> None:
    """A prepared transaction holds the table; a replication slot keeps snapshots."""
    with psycopg.connect(preparing, autocommit=True) as connection:
        # First, for it waits for every transaction, prepared ones too.
        connection.execute("SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")
        connection.autocommit = False
        connection.execute("LOCK TABLE saga_executions")
        connection.execute("PREPARE TRANSACTION 'two of ''em'")
        connection.commit()
        connection.autocommit = True
        try:
            url = preparing.replace("postgresql://", f"postgresql+{driver}://")
            with pytest.raises(schema.MigrationLockError) as info:
                schema.upgrade(url, lock_wait=timedelta(seconds=0.1))
            for remedy in ("ROLLBACK PREPARED 'two of ''em'", "pg_drop_replication_slot('feed')"):
                assert remedy in str(info.value)
        finally:
            connection.execute("ROLLBACK PREPARED 'two of ''em'")
            connection.execute("SELECT pg_drop_replication_slot('feed')")
