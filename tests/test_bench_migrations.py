"""``make bench-migrations``, at a size that says nothing about stalls: it does what it claims to do."""

import asyncio
import json
from pathlib import Path

import psycopg
import pytest

from benchmarks.migrations import Finding, Stall, Writers, fill, open_statements, our_tables
from saga_store import schema
from tests.databases import Database
from tests.test_bench import python_module

SAGAS = 200


def stall(longest: float, failed: dict[str, int] | None = None) -> Stall:
    return Stall(seconds=1.0, calls=100, longest=longest, p99=0.01, failed=failed or {})


class TestTarget:
    @pytest.mark.parametrize(
        ("during", "met"),
        [(stall(1.4), True), (stall(1.6), False), (stall(0.1, {"StorageUnavailableError": 1}), False)],
    )
    def test_at_most_a_second_beyond_and_no_error(self, during: Stall, met: bool) -> None:  # noqa: FBT001 - the case
        """What is compared is the longest call with a migration and the longest without."""
        assert Finding("saga_store_0002", during, stall(0.5)).met is met


class TestWriters:
    def test_they_write_until_they_are_told_and_count_every_call(self, empty_database: Database) -> None:
        """Each call is timed, on sagas that were there before and on new ones, and an error ends no writer."""
        url = empty_database.url()
        our_tables().make(url)
        old = fill(url, our_tables(), SAGAS)

        async def work() -> Stall:
            async with open_statements(url) as storage:
                writers = Writers(storage, our_tables().words, old, tasks=3)
                return await writers.work(asyncio.create_task(asyncio.sleep(0.2)))

        found = asyncio.run(work())
        with psycopg.connect(url) as connection:
            written = connection.execute("SELECT count(*) FROM saga_logs WHERE step_name NOT LIKE 'Step%'").fetchone()
            touched = connection.execute("SELECT count(*) FROM saga_executions WHERE version > 6").fetchone()
        assert not found.failed
        assert written is not None
        assert touched is not None
        assert found.calls > written[0] > 0
        assert touched[0] > 0


def test_bench(tmp_path: Path) -> None:
    """It migrates full tables revision by revision while others write, prints the stalls, and writes them down."""
    options = [f"--sagas={SAGAS}", "--seconds=0.2", "--writers=3", "--only=revisions"]
    done = python_module("benchmarks.migrations", *options, f"--folder={tmp_path}", f"--json={tmp_path}/found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "found.json").read_text())

    assert report["plan"]["logs"] == 3 * SAGAS
    assert {report["server"]["settings"][name] for name in ("fsync", "synchronous_commit")} == {"on"}
    assert [found["migration"] for found in report["migrations"]] == [found.revision for found in schema.history()[1:]]
    for found in report["migrations"]:
        assert found["migration"] in done.stdout
        assert found["during"]["calls"] > 0
        assert found["without"]["calls"] > 0
        assert not found["during"]["failed"]
    assert not list(tmp_path.glob("server-*"))
