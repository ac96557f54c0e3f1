"""``make bench``, at a size that says nothing about speed: every row does the work that it claims to do."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from benchmarks import shards, telemetry, views
from benchmarks.beds import OF_SAGAS, Bed
from benchmarks.peers import create_cqrs_tables
from benchmarks.rows import ROWS, Row
from benchmarks.server import BenchmarkError
from benchmarks.workload import STEPS, Clock, run_crowd
from saga_store import schema

if TYPE_CHECKING:
    from tests.databases import Database

ROOT = Path(__file__).parent.parent
SAGAS = 7
CALLS = {"call": 12, "checkpoint": 6, "advance of the engine": 4, "step": 3}


def installed(row: Row) -> bool:
    return row.needs is None or importlib.util.find_spec(row.needs) is not None


def bench(*options: str) -> "subprocess.CompletedProcess[str]":
    return python_module("benchmarks", *options)


def python_module(name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", name, *options]
    # A server for the tests and its programs are none of the benchmark's business.
    environment = {name: value for name, value in os.environ.items() if name != "SAGA_STORE_TEST_PG"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def run_sagas(row: Row, url: str, *, at_a_time: int) -> Clock:
    clock = Clock()

    async def run() -> None:
        async with row.open(url, 3) as run_saga:
            assert await run_crowd(run_saga, clock, at_a_time=at_a_time, tickets=iter(range(SAGAS))) == SAGAS

    asyncio.run(run())
    return clock


@pytest.fixture
def url(row: Row, request: pytest.FixtureRequest) -> str:
    """A database with the tables that the row needs."""
    database: Database = request.getfixturevalue("database" if row.schema == "saga_store" else "empty_database")
    if row.schema == "cqrs":
        create_cqrs_tables(database.url())
    return database.url()


@pytest.mark.parametrize("at_a_time", [1, 5])
@pytest.mark.parametrize("row", [row for row in ROWS if row.schema != "dbos"], ids=lambda row: row.key)
def test_row_runs_whole_sagas(row: Row, url: str, at_a_time: int) -> None:
    """Every saga is completed, with its context and its history, and every call was timed."""
    clock = run_sagas(row, url, at_a_time=at_a_time)
    assert len(clock.calls) == SAGAS * CALLS[row.call]
    with psycopg.connect(url) as connection:
        sagas: list[tuple[Any, ...]] = connection.execute(
            "SELECT id, name, status::text, context FROM saga_executions"
        ).fetchall()
        history = connection.execute(
            "SELECT saga_id, step_name, action, upper(status::text) FROM saga_logs ORDER BY id"
        ).fetchall()
    assert len(sagas) == SAGAS
    for saga_id, name, status, context in sagas:
        assert (name, status) == ("OrderSaga", "COMPLETED")
        assert set(context["receipts"]) == set(STEPS)
        assert [entry[1:] for entry in history if entry[0] == saga_id] == [
            (step, "act", status) for step in STEPS for status in ("STARTED", "COMPLETED")
        ]


@pytest.mark.parametrize("row", [row for row in ROWS if row.schema == "dbos"], ids=lambda row: row.key)
def test_dbos_runs_whole_workflows(row: Row, url: str) -> None:
    """Every workflow has succeeded and recorded its three steps, if DBOS is installed."""
    if not installed(row):
        pytest.skip("DBOS isn't installed")
    clock = run_sagas(row, url, at_a_time=5)
    assert len(clock.calls) == SAGAS * CALLS[row.call]
    with psycopg.connect(url) as connection:
        workflows = connection.execute("SELECT workflow_uuid, status FROM dbos.workflow_status").fetchall()
        steps = connection.execute("SELECT workflow_uuid FROM dbos.operation_outputs").fetchall()
    assert [status for _, status in workflows] == ["SUCCESS"] * SAGAS
    assert Counter(workflow for (workflow,) in steps) == {workflow: len(STEPS) for workflow, _ in workflows}


@pytest.mark.parametrize("row", [row for row in ROWS if row.key == "methods"], ids=lambda row: row.key)
def test_missing_sagas_are_noticed(row: Row, url: str) -> None:
    """A row that does less than it says ends the benchmark."""
    run_sagas(row, url, at_a_time=1)
    bed = Bed("bench_methods", url, OF_SAGAS)
    bed.settle(SAGAS)
    with pytest.raises(BenchmarkError, match="of 8 sagas"):
        bed.settle(1)
    with pytest.raises(BenchmarkError, match="bench_methods"):
        Bed("bench_methods", url, replace(OF_SAGAS, entries_per_saga=5)).settle(SAGAS)


def test_bench_shards(tmp_path: Path) -> None:
    """It measures what routing costs and each layout, finds every saga, and says what can't be told on these cores."""
    options = ["--rounds=1", "--seconds=0.02", "--routed=1", "--processes=1", "--callers=2"]
    done = python_module("benchmarks.shards", *options, f"--folder={tmp_path}", f"--json={tmp_path}/shards.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "shards.json").read_text())
    assert list(report["routing"]) == ["1", "64"]
    assert report["layouts"].keys() == {str(layout) for layout in shards.LAYOUTS}
    assert report["layouts"]["1 shard on 1 server"]["ratio"] == 1
    report["machine"]["cores"] = 2
    assert "can't be told on 2 cores" in "\n".join(shards.render(report))
    report["machine"]["cores"] = 8
    report["layouts"]["2 shards on 2 servers"]["ratio"] = 1.69
    assert "two servers do at least 1.7 of one: 1.69, NOT MET" in "\n".join(shards.render(report))


def test_bench(tmp_path: Path) -> None:
    """It measures every row on a durable server of its own, prints the tables and the targets, and writes them down."""
    options = [
        "--crowds=1,2",
        "--rounds=1",
        "--seconds=0.01",
        "--pairs=3",
        "--counted=2",
        "--hot-sagas=8",
        "--finished=100",
    ]
    done = bench(*options, f"--folder={tmp_path}", f"--json={tmp_path}/bench.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())

    missing = [row for row in ROWS if not installed(row)]
    assert list(report["rows"]) == [row.key for row in ROWS if row not in missing]
    assert list(report["skipped"]) == [row.key for row in missing]
    for row in missing:
        assert f"SKIPPED: {row.key}" in done.stdout

    assert {report["server"]["settings"][name] for name in ("fsync", "full_page_writes", "synchronous_commit")} == {
        "on"
    }
    for row in report["rows"].values():
        assert done.stdout.count(row["title"]) >= len(report["crowds"]), row["title"]
        for figures in row["at"].values():
            assert figures["rounds"][0]["sagas"] > 0
            assert min(figures["statements"], figures["transactions"], figures["wal_bytes"]) > 0
        assert row["sagas"] >= sum(figures["rounds"][0]["sagas"] for figures in row["at"].values())
    assert report["rows"]["checkpoints"]["at"]["1"]["statements"] == 6
    assert report["rows"]["methods"]["at"]["1"]["transactions"] == 12
    for target in report["targets"]:
        assert target["text"] in done.stdout

    shown = bench(f"--render={tmp_path}/bench.json")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() in done.stdout
    assert not list(tmp_path.glob("server-*"))


class TestViews:
    def test_every_view_is_measured(self, empty_database: "Database") -> None:
        """It fills the tables, explains what each view sends and each query by SQL, and prints a line for each."""
        url = empty_database.url()
        views.fill(url, 300)
        few = views.costs(url)
        views.break_down(url, 50)
        broken = views.costs(url)
        table = views.render(few, few, broken, (300, 300, 50)).splitlines()
        assert [*few][: len(views.CONSTANT)] == [*views.CONSTANT]
        assert len([name for name in few if name.startswith("By SQL: ")]) == 4
        assert len(table) == 3 + len(few)
        assert all(cost.pages > 0 for cost in few.values())
        with psycopg.connect(url) as connection:
            counts = connection.execute(
                "SELECT count(*), count(*) FILTER (WHERE status = 'RUNNING') FROM saga_executions"
            )
            assert counts.fetchone() == (300, 150 + 50 // 2)

    def test_a_view_that_costs_more_is_told(self) -> None:
        """What has to be constant may cost half as much again among many sagas; nothing may read a whole table."""
        few = dict.fromkeys([*views.CONSTANT, *views.OTHERS], views.Cost(100, 1.0, scans=False))
        dear, cheap = list(views.CONSTANT)[:2]
        many = few | {
            dear: views.Cost(151, 1.0, scans=False),
            cheap: views.Cost(150, 9.0, scans=False),
            "in doubt": views.Cost(100, 1.0, scans=True),
        }
        assert views.misses(few, few) == []
        assert views.misses(few, many) == [
            f"{dear}: 1.51 times as many pages",
            "in doubt: reads a whole table",
        ]


def test_telling_is_measured(empty_database: "Database") -> None:
    """Each way in each round, all compared with the one that tells nothing."""
    schema.upgrade(empty_database.url())
    found = asyncio.run(telemetry.measure(empty_database.url(), rounds=2, sagas=2, at_a_time=2))
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(telemetry.WAYS, 2)
    table = telemetry.render(found).splitlines()
    assert len(table) == 3 + len(telemetry.WAYS)
    assert "1.000" in table[3]
