"""The PostgreSQL that is killed and restarted: what was committed stays, and so does the address."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from saga_store.testing.postgres import PostgresUnavailableError, RestartableServer, restartable
from tests.crash.bed import in_memory, temporary_folder

ENDS: dict[str, Callable[[RestartableServer], None]] = {
    "killed": lambda server: server.kill(),
    "fast": lambda server: server.stop(signal.SIGINT),
    "immediate": lambda server: server.stop(signal.SIGQUIT),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RestartableServer]:
    with temporary_folder(in_memory()) as folder, restartable(data=folder) as server:
        yield server


def until_it_answers(url: str) -> tuple[int, ...] | None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with psycopg.connect(url) as connection:
                return connection.execute("SELECT 1").fetchone()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise


class TestRestart:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
    def test_what_was_committed_is_there_again_at_the_same_url(
        self, server: RestartableServer, end: Callable[[RestartableServer], None]
    ) -> None:
        with psycopg.connect(server.facts.url, autocommit=True) as before:
            before.execute("DROP TABLE IF EXISTS kept")
            before.execute("CREATE TABLE kept AS SELECT 1 AS number")
            end(server)
            server.start()
            server.wait_until_ready()

            with pytest.raises(psycopg.OperationalError):
                before.execute("SELECT 1")
        with psycopg.connect(server.facts.url) as after:
            assert after.execute("SELECT number FROM kept").fetchall() == [(1,)]

    def test_no_process_outlives_a_kill(self, server: RestartableServer) -> None:
        """Not even to be reaped by whoever inherited it."""
        with psycopg.connect(server.facts.url) as connection:
            backend = Path(f"/proc/{connection.info.backend_pid}/stat")
            server.kill()

            assert not backend.exists() or backend.read_text().rpartition(")")[2].split()[0] == "Z"
        server.start()
        server.wait_until_ready()

    def test_one_killed_backend_takes_the_others_down_and_the_server_recovers(self, server: RestartableServer) -> None:
        with psycopg.connect(server.facts.url) as one, psycopg.connect(server.facts.url) as other:
            server.kill_one(0)

            for connection in (one, other):
                with pytest.raises(psycopg.OperationalError):
                    connection.execute("SELECT pg_sleep(60)")
        assert until_it_answers(server.facts.url) == (1,)

    def test_a_commit_is_synced(self, server: RestartableServer) -> None:
        """Otherwise an acknowledged write could be lost rightly."""
        with psycopg.connect(server.facts.url) as connection:
            settings = connection.execute("SELECT setting FROM pg_settings WHERE name ~ '^(fsync|full_page_writes)$'")

            assert settings.fetchall() == [("on",), ("on",)]

    def test_a_server_that_does_not_start_again_says_why(self) -> None:
        with temporary_folder(in_memory()) as folder, restartable(data=folder) as server:
            server.kill()
            (folder / "cluster" / "global" / "pg_control").unlink()
            server.start()

            with pytest.raises(PostgresUnavailableError, match="pg_control"):
                server.wait_until_ready()
