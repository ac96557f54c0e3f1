"""Figures for Prometheus: what is exported, what of it if the database can't be asked, and the verb that prints it."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import (
    Checkpoint,
    InvalidSagaDataError,
    LogStep,
    MemorySagaStorage,
    SagaStatus,
    SagaStepStatus,
    StorageUnavailableError,
    schema,
)
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.inspection import SagaCondition, SagaFigures
from saga_store.retention import RetentionPolicy
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.telemetry import prometheus
from saga_store.telemetry.prometheus import OTHERS, SagaCollector, exposition
from tests.databases import Database

HOSTILE = 'x\x1b[31m\u202e",condition="held"} 7\\n\\\n\r\u2028saga_store_up 1\n# {'
NAMES = {
    "saga_store_unfinished",
    "saga_store_oldest_unfinished_seconds",
    "saga_store_in_doubt_steps",
    "saga_store_failed_24h",
    "saga_store_table_bytes",
    "saga_store_dead_tuples",
    "saga_store_log_entries_total",
    "saga_store_archived_total",
    "saga_store_archived_bytes",
    "saga_store_archives_failed_24h",
    "saga_store_oldest_open_archive_seconds",
    "saga_store_up",
    "saga_store_snapshot_timestamp_seconds",
    "saga_store_names_left_out",
    "saga_store_estimated",
}
STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)

Samples: TypeAlias = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Return what Prometheus would read, each sample once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def key(metric: str, /, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return metric, frozenset(labels.items())


def some_figures(unfinished: dict[tuple[str, SagaCondition], int]) -> SagaFigures:
    return SagaFigures(unfinished, timedelta(seconds=90), 2, 3, None, 4, {("saga_logs", "heap"): 5}, {"saga_logs": 6})


class Clock:
    """Stands in for the module ``time``."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(prometheus, "time", clock)
    return clock


class Failing(MemorySagaStorage):
    """A storage whose figures can be had, or not."""

    error: Exception | None = None
    asked = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: asyncio.Queue[int] = asyncio.Queue()

    async def get_figures(self, **judging: Any) -> SagaFigures:  # noqa: ANN401 - as in the interface
        self.asked += 1
        self.calls.put_nowait(self.asked)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return await super().get_figures(**judging)


class TestExposition:
    def test_it_has_every_figure_by_its_name(self) -> None:
        """Names and labels are those of the documentation; nothing else is exported."""
        found = samples(exposition(some_figures({("order", SagaCondition.STALE): 1})))
        assert {name for name, _ in found} == NAMES
        assert found[key("saga_store_unfinished", name="order", condition="stale")] == 1
        assert found[key("saga_store_oldest_unfinished_seconds")] == 90
        assert found[key("saga_store_in_doubt_steps")] == 2
        assert found[key("saga_store_failed_24h")] == 3
        assert found[key("saga_store_log_entries_total")] == 4
        assert found[key("saga_store_table_bytes", table="saga_logs", part="heap")] == 5
        assert found[key("saga_store_dead_tuples", table="saga_logs")] == 6
        assert found[key("saga_store_up")] == 1

    def test_a_figure_that_is_an_estimate_says_so(self) -> None:
        """Beside the figure, so that an alert can tell."""
        figures = SagaFigures({}, timedelta.max, 0, 0, None, 0, {}, {}, estimated=("finished", "unfinished"))
        found = samples(exposition(figures))
        assert found[key("saga_store_estimated", figure="unfinished")] == 1
        assert found[key("saga_store_estimated", figure="in_doubt_steps")] == 0
        assert found[key("saga_store_oldest_unfinished_seconds")] == timedelta.max.total_seconds()

    def test_retention(self) -> None:
        """How many sagas were let go is always told, and how far that lags behind if there is a policy."""
        figures = replace(some_figures({}), archived_sagas=7)
        found = samples(exposition(figures))
        assert found[key("saga_store_archived_total")] == 7
        assert key("saga_store_retention_lag_seconds") not in found
        assert key("saga_store_last_archive_timestamp_seconds") not in found
        assert found[key("saga_store_oldest_open_archive_seconds")] == 0
        ledger = replace(
            figures,
            archived_bytes=8,
            archives_failed_24h=9,
            oldest_open_archive=timedelta(minutes=1),
            last_archived_at=datetime(2026, 11, 26, tzinfo=UTC),
        )
        found = samples(exposition(ledger))
        assert found[key("saga_store_archived_bytes")] == 8
        assert found[key("saga_store_archives_failed_24h")] == 9
        assert found[key("saga_store_oldest_open_archive_seconds")] == 60
        assert found[key("saga_store_last_archive_timestamp_seconds")] == 1795651200
        found = samples(exposition(replace(figures, retention_lag=timedelta(hours=1), estimated=("retention_lag",))))
        assert found[key("saga_store_retention_lag_seconds")] == 3600
        assert found[key("saga_store_estimated", figure="retention_lag")] == 1

    @given(st.dictionaries(st.tuples(st.text(min_size=1), st.sampled_from(SagaCondition)), st.integers(1, 9)))
    def test_any_name_comes_back_as_it_was(self, unfinished: dict[tuple[str, SagaCondition], int]) -> None:
        """Quotes, backslashes, line breaks and whole samples in a name stay inside its label."""
        unfinished = {
            (name.encode(errors="replace").decode(), condition): count
            for (name, condition), count in unfinished.items()
        } | {(HOSTILE, SagaCondition.HELD): 1}
        found = samples(exposition(some_figures(unfinished)))
        assert {
            (dict(labels)["name"], dict(labels)["condition"]): count
            for (name, labels), count in found.items()
            if name == "saga_store_unfinished"
        } == unfinished

    @given(
        st.dictionaries(
            st.tuples(st.sampled_from(["a", "b", "c", "d", OTHERS]), st.sampled_from(SagaCondition)), st.integers(1, 9)
        ),
        st.integers(0, 6),
    )
    def test_names_are_bounded(self, unfinished: dict[tuple[str, SagaCondition], int], most: int) -> None:
        """Those with the most sagas are kept, the rest is added up, and how many names that are is told."""
        found = samples(exposition(some_figures(unfinished), max_names=most))
        counted = {labels: count for (name, labels), count in found.items() if name == "saga_store_unfinished"}
        names = {name for name, _ in unfinished}
        shown = {dict(labels)["name"] for labels in counted}
        assert sum(counted.values()) == sum(unfinished.values())
        assert len(shown - {OTHERS}) <= most
        left_out = found[key("saga_store_names_left_out")]
        assert left_out == max(len(names) - most, 0)
        if not left_out:
            assert shown == names


class TestCollector:
    async def test_it_shows_the_snapshot(self, clock: Clock) -> None:
        """A registry collects what the last refresh read, in any thread, without asking the database."""
        storage = Failing()
        await storage.create_saga(uuid4(), "order", {})
        registry = CollectorRegistry(auto_describe=False)
        collector = SagaCollector(storage)
        registry.register(collector)
        assert samples(generate_latest(registry).decode()) == {key("saga_store_up"): 0}
        await collector.refresh()
        found = samples((await asyncio.to_thread(generate_latest, registry)).decode())
        assert found[key("saga_store_unfinished", name="order", condition="active")] == 1
        assert found[key("saga_store_snapshot_timestamp_seconds")] == clock.time()
        assert storage.asked == 1

    async def test_it_asks_by_its_settings(self) -> None:
        """What is stale, what exhausted, and the policy that sagas are let go by."""
        storage = MemorySagaStorage()
        await storage.save(Checkpoint(uuid4(), name="order", recovery_attempts=1))
        await storage.save(Checkpoint(uuid4(), name="order", status=SagaStatus.COMPLETED))
        policy = RetentionPolicy(completed=timedelta(0))
        collector = SagaCollector(storage, stale_after=timedelta(0), max_attempts=1, retention=policy)
        found = samples(await collector.scrape())
        assert found[key("saga_store_unfinished", name="order", condition="exhausted")] == 1
        assert found[key("saga_store_retention_lag_seconds")] >= 0

    async def test_a_failure_is_told_and_old_figures_are_dropped(self, clock: Clock) -> None:
        """After a failure saga_store_up is 0 at once; figures are shown until they are too old, and never longer."""
        storage = Failing()
        collector = SagaCollector(storage, every=timedelta(seconds=10), max_age=timedelta(seconds=30))
        await collector.refresh()
        taken, clock.now = clock.time(), clock.now + 20
        storage.error = StorageUnavailableError("down")
        with pytest.raises(StorageUnavailableError):
            await collector.refresh()
        found = samples(collector.text())
        assert (found[key("saga_store_up")], found[key("saga_store_failed_24h")]) == (0, 0)
        clock.now += 11
        assert samples(collector.text()) == {
            key("saga_store_up"): 0,
            key("saga_store_snapshot_timestamp_seconds"): taken,
        }
        storage.error = None
        await collector.refresh()
        assert samples(collector.text())[key("saga_store_up")] == 1

    async def test_a_refresher_that_died_is_seen(self, clock: Clock) -> None:
        """Figures that nobody refreshes any more are dropped, although no attempt has failed."""
        collector = SagaCollector(MemorySagaStorage(), every=timedelta(seconds=10))
        await collector.refresh()
        clock.now += 31
        found = samples(collector.text())
        assert found[key("saga_store_up")] == 0
        assert key("saga_store_failed_24h") not in found

    @pytest.mark.parametrize("error", [StorageUnavailableError("down"), RuntimeError("a bug")])
    async def test_keeping_fresh_goes_on(self, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever goes wrong, the next attempt is made; the log has one line until it goes well again."""
        storage = Failing()
        storage.error = error
        collector = SagaCollector(storage, every=timedelta(0))
        with caplog.at_level("INFO", "saga_store"):
            task = asyncio.create_task(collector.keep_fresh())
            while await storage.calls.get() < 3:
                pass
            storage.error = None
            while await storage.calls.get() < 6:
                pass
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        assert samples(collector.text())[key("saga_store_up")] in {0, 1}

    async def test_a_crowd_of_scrapes_asks_once(self, clock: Clock) -> None:
        """Scrapes share a snapshot as long as it is fresh; one that can't be had raises nothing."""
        storage = Failing()
        collector = SagaCollector(storage, every=timedelta(seconds=10))
        texts = await asyncio.gather(*(collector.scrape() for _ in range(20)))
        assert (storage.asked, len(set(texts))) == (1, 1)
        clock.now += 10
        storage.error = StorageUnavailableError("down")
        assert samples(await collector.scrape())[key("saga_store_up")] == 0
        assert storage.asked == 2

    @pytest.mark.parametrize(
        "settings",
        [
            {"every": 3},
            {"every": timedelta(seconds=-1)},
            {"max_names": -1},
            {"max_attempts": "5"},
            {"stale_after": None},
            {"every": timedelta(seconds=9), "max_age": timedelta(seconds=8)},
        ],
        ids=str,
    )
    def test_settings_that_cannot_be_used_are_refused(self, settings: dict[str, Any]) -> None:
        """At once, and by name."""
        with pytest.raises(InvalidSagaDataError):
            SagaCollector(MemorySagaStorage(), **settings)

    def test_describing_asks_nobody(self) -> None:
        """What may be exported is known without a database, so that names that clash are refused when registering."""
        described = {family.name for family in SagaCollector(Failing()).describe()}
        assert described == {name.removesuffix("_total") for name in NAMES} | {
            "saga_store_retention_lag_seconds",
            "saga_store_last_archive_timestamp_seconds",
            "saga_store_shard_up",
        }
        registry = CollectorRegistry(auto_describe=True)
        registry.register(SagaCollector(MemorySagaStorage()))
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(SagaCollector(MemorySagaStorage()))


Command: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def url(database: Database) -> str:
    """A database with an unfinished saga of a hostile name, in doubt, and one that failed."""

    async def make() -> None:
        engine = create_async_engine(database.url("psycopg"), poolclass=NullPool)
        storage = SqlAlchemySagaStorage(engine)
        await storage.save(Checkpoint(uuid4(), name=HOSTILE, status=SagaStatus.RUNNING, steps=[STARTED]))
        await storage.save(Checkpoint(uuid4(), name="order", status=SagaStatus.FAILED))
        await engine.dispose()

    asyncio.run(make())
    return database.url()


@pytest.fixture
def metrics(capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["metrics", *arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


class TestCommand:
    @pytest.mark.parametrize("driver", ["postgresql", "postgresql+asyncpg"])
    def test_it_prints_what_prometheus_reads(self, metrics: Command, url: str, driver: str) -> None:
        """The figures of the database, over both drivers; --json has the same samples."""
        url = url.replace("postgresql", driver, 1)
        code, out, err = metrics("--url", url, "--stale-after", "0")
        found = samples(out)
        assert (code, err) == (Exit.DONE, "")
        assert {name for name, _ in found} == NAMES
        assert found[key("saga_store_unfinished", name=HOSTILE, condition="stale")] == 1
        assert found[key("saga_store_in_doubt_steps")] == 1
        assert found[key("saga_store_failed_24h")] == 1
        assert found[key("saga_store_table_bytes", table="saga_executions", part="heap")] > 0
        code, out, _ = metrics("--url", url, "--stale-after", "0", "--json")
        listed = {key(one["name"], **one["labels"]): one["value"] for one in json.loads(out)["metrics"]}
        assert (code, listed.keys()) == (Exit.DONE, found.keys())

    def test_no_id_of_a_saga_is_exported(self, metrics: Command, database: Database, url: str) -> None:
        """Nothing that grows with the sagas is a label."""
        with psycopg.connect(database.url()) as connection:
            ids = [str(saga_id) for (saga_id,) in connection.execute("SELECT id FROM saga_executions")]
        _, out, _ = metrics("--url", url)
        assert ids
        assert not any(saga_id in out or saga_id.replace("-", "") in out for saga_id in ids)

    def test_the_schema_is_the_one_named(self, metrics: Command, database: Database, url: str) -> None:
        """The tables of that schema are counted, wherever the search path leads."""
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute('CREATE SCHEMA "Sagas 2"')
        schema.upgrade(url, schema="Sagas 2")
        _, out, _ = metrics("--url", url, "--schema", "Sagas 2")
        assert samples(out)[key("saga_store_failed_24h")] == 0
        code, out, err = metrics("--url", url, "--schema", "none")
        assert (code, samples(out)) == (Exit.FAILED, {key("saga_store_up"): 0})
        assert "none" in err

    def test_how_far_archiving_lags_behind(self, metrics: Command, database: Database, url: str) -> None:
        """By the policy that is given, as `saga-store archive` takes it; without one it isn't told."""
        with psycopg.connect(database.url()) as connection:
            connection.execute("UPDATE saga_executions SET created_at = now() - interval '4 days'")
            connection.execute("UPDATE saga_executions SET updated_at = now() - interval '3 days'")
        _, out, _ = metrics("--url", url, "--failed", "2d")
        assert 86000 < samples(out)[key("saga_store_retention_lag_seconds")] < 90000
        _, out, _ = metrics("--url", url, "--failed", "2d", "--name", "order=ever")
        assert samples(out)[key("saga_store_retention_lag_seconds")] == 0
        _, out, _ = metrics("--url", url)
        assert key("saga_store_retention_lag_seconds") not in samples(out)

    def test_a_role_that_may_not_look_hears_what_it_lacks(self, metrics: Command, database: Database, url: str) -> None:
        """With the GRANT."""
        role = f"r{uuid4().hex}"
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
            try:
                code, out, err = metrics("--url", re.sub("//.*@", f"//{role}:x@", url))
            finally:
                admin.execute(f"DROP ROLE {role}".encode())
        assert (code, samples(out)) == (Exit.FAILED, {key("saga_store_up"): 0})
        assert f"GRANT SELECT ON TABLE public.saga_executions TO {role};" in err
        assert err.count("\n") == 1

    def test_a_file_is_replaced_as_a_whole(self, metrics: Command, url: str, tmp_path: Path) -> None:
        """For node_exporter: readable by another user, without a trace of a temporary file; nothing on stdout."""
        file = tmp_path / "saga_store.prom"
        file.write_text("old")
        assert metrics("--url", url, "--output", str(file)) == (Exit.DONE, "", "")
        assert {name for name, _ in samples(file.read_bytes().decode())} == NAMES
        assert file.stat().st_mode & 0o777 == 0o644
        assert list(tmp_path.iterdir()) == [file]

    def test_what_could_not_be_read_is_not_shown_as_it_was(self, metrics: Command, tmp_path: Path) -> None:
        """A database that can't be asked: saga_store_up is 0 in place of old figures, and the exit code is 1."""
        file = tmp_path / "saga_store.prom"
        file.write_text("saga_store_failed_24h 7\n")
        nowhere = "postgresql://user:secret@127.0.0.1:1/shop"
        code, out, err = metrics("--url", nowhere, "--output", str(file))
        assert (code, out, samples(file.read_text())) == (Exit.FAILED, "", {key("saga_store_up"): 0})
        assert err.startswith("saga-store: can't connect")
        assert err.count("\n") == 1
        assert "secret" not in err
        assert samples(metrics("--url", nowhere)[1]) == {key("saga_store_up"): 0}
        code, out, _ = metrics("--url", nowhere, "--json")
        assert (code, json.loads(out)["exit_code"]) == (Exit.FAILED, 1)

    @pytest.mark.parametrize("target", ["missing/saga.prom", ".", "fifo"])
    def test_a_file_that_cannot_be_written_is_named(
        self, metrics: Command, url: str, tmp_path: Path, target: str
    ) -> None:
        """A folder that isn't there, a folder, a device: one line, exit code 1, and it is left as it was."""
        os.mkfifo(tmp_path / "fifo")
        code, out, err = metrics("--url", url, "--output", str(tmp_path / target))
        assert (code, out, err.count("\n")) == (Exit.FAILED, "", 1)
        assert str(tmp_path / target) in err
        assert [path.name for path in tmp_path.iterdir()] == ["fifo"]
        assert (tmp_path / "fifo").is_fifo()

    @pytest.mark.parametrize(
        "arguments",
        [("--max-names", "-1"), ("--max-attempts", "-1"), ("--json", "--output", "x")],
        ids=" ".join,
    )
    def test_wrong_usage(self, metrics: Command, url: str, arguments: tuple[str, ...]) -> None:
        """It is told as that, and nothing is printed that Prometheus would read."""
        code, out, err = metrics("--url", url, *arguments)
        assert (code, err.count("\n")) == (Exit.USAGE, 1)
        assert "saga_store_up" not in out

    def test_it_is_utf_8_whatever_the_locale(self, database: Database, url: str) -> None:
        """Prometheus takes nothing else."""
        assert url
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "DATABASE_URL": database.url()}
        command = [sys.executable, "-m", "saga_store", "metrics"]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert HOSTILE in {dict(labels).get("name") for _, labels in samples(done.stdout.decode())}

    def test_without_the_extra_it_says_which(self, database: Database, tmp_path: Path) -> None:
        """One line, with what to install."""
        (tmp_path / "prometheus_client.py").write_text("raise ImportError('not here')")
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "DATABASE_URL": database.url()}
        command = [sys.executable, "-m", "saga_store", "metrics"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
        assert (done.returncode, done.stdout) == (Exit.FAILED, "")
        assert done.stderr == (
            "saga-store: saga_store.telemetry.prometheus needs prometheus-client: pip install saga-store[ops]\n"
        )


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal."""
    ends = os.openpty()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


def test_a_terminal_gets_no_control_character(database: Database, url: str, terminal: tuple[int, int]) -> None:
    """For a person's eyes names are written out; it is only for them, and still one sample a line."""
    person, program = terminal
    environment = os.environ | {"DATABASE_URL": database.url()}
    assert url
    subprocess.run(
        [sys.executable, "-m", "saga_store", "metrics"], env=environment, stdout=program, stdin=program, check=True
    )
    shown = os.read(person, 100_000).decode()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"\u202e" in shown
