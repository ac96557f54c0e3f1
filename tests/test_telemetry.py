"""What a storage tells of its work, in OpenTelemetry's words, and that telling it changes nothing of the work."""

import asyncio
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from saga_store import (
    Checkpoint,
    LogStep,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SagaStorage,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.observation import OPERATIONS, operation_of
from saga_store.telemetry.opentelemetry import OpenTelemetry
from saga_store.write import Lease, Write
from tests.databases import Database
from tests.proxy import Cut
from tests.scene import NEVER, PATIENT, Scene, change, until
from tests.telemetries import Failing, Recording

STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)
HOUR = timedelta(hours=1)
SAGA_ID = UUID(int=7)


@pytest.fixture
def recording() -> Recording:
    return Recording()


@pytest.fixture(params=["asyncpg", "psycopg"])
def engine(request: pytest.FixtureRequest, make_engine: Callable[[str], AsyncEngine]) -> AsyncEngine:
    return make_engine(request.param)


@pytest.mark.parametrize("telemetry", ["otel", object(), Recording])
def test_what_is_no_telemetry_is_refused(make_engine: Callable[[str], AsyncEngine], telemetry: Any) -> None:  # noqa: ANN401 - what it shouldn't be
    """At once, and not by a log that nobody reads."""
    with pytest.raises(TypeError, match="telemetry must be"):
        SqlAlchemySagaStorage(make_engine("asyncpg"), telemetry=telemetry)


class TestNames:
    def test_every_call_has_one(self) -> None:
        """Whatever a storage fetches or writes is told by the name of the method that people call."""
        primitives = SagaStorage.__abstractmethods__ | {"_fetch_state", "_recent_writes", "_fetch_unfinished"}
        # The last two give something to work with, which sends what it sends in calls of its own.
        others = {"_apply", "_archiving", "_snapshot"}
        assert {name for name in primitives if name.startswith("_")} == OPERATIONS.keys() | others
        public = {name for name, _ in inspect.getmembers(SqlAlchemySagaStorage, inspect.isfunction)}
        of_runs = {"renew_lease", "get_recent_writes", "change_archive"}
        assert {operation for operation, _ in OPERATIONS.values()} <= public | of_runs

    @pytest.mark.parametrize(
        ("write", "operation"),
        [
            (Write(SAGA_ID, name="order", context="{}"), "create_saga saga_executions"),
            (Write(SAGA_ID, name="order", status=SagaStatus.RUNNING), "save saga_executions"),
            (Write(SAGA_ID, status=SagaStatus.RUNNING), "update_status saga_executions"),
            (Write(SAGA_ID, context="{}", lease=Lease(lasts=HOUR)), "update_context saga_executions"),
            (Write(SAGA_ID, steps=(STARTED,)), "log_step saga_logs"),
            (Write(SAGA_ID, steps=(STARTED,), lease=Lease(lasts=HOUR)), "log_step saga_logs"),
            (Write(SAGA_ID, steps=(STARTED,), status=SagaStatus.RUNNING), "save saga_executions"),
            (Write(SAGA_ID, lease=Lease()), "renew_lease saga_executions"),
            (Write(SAGA_ID, recovery_attempts=0), "save saga_executions"),
        ],
        ids=range(9),
    )
    def test_a_write_is_called_by_what_it_writes(self, write: Write, operation: str) -> None:
        """Also one of a run, whose method is only ever `commit`."""
        assert " ".join(operation_of(write)) == operation


class TestTelling:
    async def test_calls(self, engine: AsyncEngine, recording: Recording) -> None:
        """Each call is told once, with its saga, where it goes, and the error that its caller gets."""
        storage = SqlAlchemySagaStorage(engine, telemetry=recording)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        await storage.get_saga(saga_id)
        with pytest.raises(SagaConcurrencyError) as refused:
            await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=7)
        missing = uuid4()
        with pytest.raises(SagaNotFoundError):
            await storage.get_step_history(missing)
        await storage.get_figures()
        async for _ in storage.iter_step_history(saga_id):
            pass
        assert [(call.operation, call.table, call.saga_id) for call, _ in recording.calls] == [
            ("create_saga", "saga_executions", saga_id),
            ("get_saga", "saga_executions", saga_id),
            ("update_status", "saga_executions", saga_id),
            ("get_step_history", "saga_logs", missing),
            ("get_figures", "saga_executions", None),
            ("iter_step_history", "saga_logs", saga_id),
        ]
        assert recording.calls[2][1] is refused.value
        assert isinstance(recording.calls[3][1], SagaNotFoundError)
        assert {(call.namespace, call.host, call.port) for call, _ in recording.calls} == {
            (engine.url.database, engine.url.host, engine.url.port)
        }

    @pytest.mark.parametrize(
        "bind", [async_sessionmaker, AsyncSession, AsyncEngine.connect], ids=lambda bind: bind.__name__
    )
    async def test_every_bind_tells(self, engine: AsyncEngine, recording: Recording, bind: Any) -> None:  # noqa: ANN401 - of three kinds
        """Where the caller commits, too; there is no flush then."""
        bound = bind(engine)
        async with nullcontext(bound) if bind is async_sessionmaker else bound as joined:
            storage = SqlAlchemySagaStorage(joined, telemetry=recording, schema="public")
            await storage.create_saga(uuid4(), "order", {})
        assert recording.operations == ["create_saga"]
        assert recording.calls[0][0].namespace == f"{engine.url.database}|public"
        assert len(recording.flushes) == (bind is async_sessionmaker)

    async def test_a_run_tells_what_it_writes(self, engine: AsyncEngine, recording: Recording) -> None:
        """Its commits by what is in them, its lease, and what it commits into a transaction."""
        storage = SqlAlchemySagaStorage(engine, telemetry=recording)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        recording.calls.clear()
        async with storage.run(saga_id, owner="me", lease=HOUR) as run:
            await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
            await run.commit()
            await run.update_status(saga_id, SagaStatus.COMPLETED)
            async with engine.begin() as connection:
                await run.commit(into=connection)
        written = [name for name in recording.operations if not name.startswith("get_")]
        assert written == ["renew_lease", "log_step", "update_status", "renew_lease"]

    async def test_flushes(self, engine: AsyncEngine, recording: Recording) -> None:
        """Of a crowd: every row is in one of them, and every write has waited, the first one not at all."""
        storage = SqlAlchemySagaStorage(engine, telemetry=recording)
        checkpoints = [Checkpoint(uuid4(), name="order", steps=[STARTED, STARTED]) for _ in range(40)]
        await asyncio.gather(*map(storage.save, checkpoints))
        rows, waits = zip(*recording.flushes, strict=True)
        assert sum(rows) == 3 * 40
        assert len(rows) < 40
        assert len([seconds for waited in waits for seconds in waited]) == 39
        assert all(0 <= seconds < 60 for waited in waits for seconds in waited)
        assert rows[0] == 3

    @pytest.mark.parametrize("group_commit", [True, False])
    async def test_waits_for_locks(
        self, engine: AsyncEngine, database: Database, recording: Recording, *, group_commit: bool
    ) -> None:
        """One for each write that has waited, when it is over."""
        storage = SqlAlchemySagaStorage(engine, telemetry=recording, group_commit=group_commit)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        with psycopg.connect(database.url()) as connection:
            connection.execute("SELECT FROM saga_executions WHERE id = %s FOR UPDATE", [saga_id])
            write = asyncio.create_task(storage.update_status(saga_id, SagaStatus.RUNNING))
            await asyncio.sleep(0.1)
            assert not recording.lock_waits
        await write
        [waited] = recording.lock_waits
        assert 0 < waited < 60
        assert recording.operations == ["create_saga", "update_status"]

    async def test_retries(self, engine: AsyncEngine, database: Database, recording: Recording) -> None:
        """Each statement that is sent again is told, with what it failed by; the call is told once, and succeeded."""
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute("CREATE SEQUENCE attempts")
            connection.execute("GRANT USAGE ON SEQUENCE attempts TO PUBLIC")
            connection.execute(
                "CREATE FUNCTION fail_twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF nextval('public.attempts') <= 2 THEN RAISE SQLSTATE '40001'; END IF; RETURN NEW; END $$"
            )
            connection.execute(
                "CREATE TRIGGER fail BEFORE INSERT ON saga_executions FOR EACH ROW EXECUTE FUNCTION fail_twice()"
            )
        storage = SqlAlchemySagaStorage(engine, telemetry=recording)
        await storage.create_saga(uuid4(), "order", {})
        assert [getattr(error, "sqlstate", None) for error in recording.retries] == ["40001", "40001"]
        assert [error for _, error in recording.calls] == [None]


def of_scene(scene: Scene, recording: Recording, *, retry_for: timedelta = PATIENT) -> Scene:
    scene.storage = SqlAlchemySagaStorage(scene.engine, retry_for=retry_for, telemetry=recording)
    return scene


class TestLostAnswers:
    @pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER])
    async def test_one_that_is_resolved(self, database: Database, recording: Recording, cut: Cut) -> None:
        """It is there, whether it was there or had to be written again."""
        async with Scene.on(database, "asyncpg", retry_for=PATIENT) as scene:
            of_scene(scene, recording).proxy.cut = cut
            assert await change(scene) == 2
        assert recording.resolutions == ["written"]

    async def test_one_that_is_refused(self, database: Database, recording: Recording) -> None:
        """Others have written meanwhile, and what was lost was never executed."""
        async with Scene.on(database, "asyncpg", retry_for=PATIENT) as scene:
            write = await of_scene(scene, recording).lose(Cut.BEFORE_SENDING, change(scene))
            await scene.write_meanwhile(1)
            scene.proxy.gate.set()
            with pytest.raises(SagaConcurrencyError):
                await write
        assert recording.resolutions == ["refused"]

    @pytest.mark.parametrize("retry_for", [NEVER, PATIENT])
    async def test_one_that_nobody_can_tell(
        self, database: Database, recording: Recording, retry_for: timedelta
    ) -> None:
        """It expects no version, or nothing is to be tried again."""
        async with Scene.on(database, "asyncpg", retry_for=PATIENT) as scene:
            of_scene(scene, recording, retry_for=retry_for).proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(UnknownOutcomeError):
                await scene.storage.update_status(scene.saga_id, SagaStatus.RUNNING)
            await scene.storage.get_saga(scene.saga_id)  # on a new connection, which isn't what is to be cut
            scene.proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(UnknownOutcomeError):
                await scene.storage.claim_sagas(owner="me", lease=HOUR, limit=1, stale_after=timedelta(0))
        assert recording.resolutions == ["unknown", "unknown"]

    async def test_one_of_a_run_that_commits_again(self, database: Database, recording: Recording) -> None:
        """A commit that was cancelled, and is made again, finds what it wrote."""
        async with Scene.on(database, "asyncpg", retry_for=PATIENT) as scene:
            of_scene(scene, recording)
            async with scene.storage.run(scene.saga_id) as run:
                await run.update_context(scene.saga_id, {"n": 1})
                commit = await scene.lose(Cut.BEFORE_ANSWER, run.commit())
                commit.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await commit
                scene.proxy.gate.set()
                await run.commit()
            await until(lambda: len(recording.resolutions) > 0)
        assert recording.resolutions == ["written"]


@pytest.mark.parametrize("begins", [True, False])
async def test_what_fails_is_logged_once(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture, *, begins: bool
) -> None:
    """Of each kind, with the error: what fails for one write fails for all."""
    storage = SqlAlchemySagaStorage(engine, telemetry=Failing(begins=begins), group_by=lambda: "all")
    with caplog.at_level(logging.WARNING, "saga_store"):
        for _ in range(3):
            await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(5)))
    told = [str(record.args[0]) for record in caplog.records if isinstance(record.args, tuple)]
    assert sorted(told) == sorted(["end" if begins else "begin", "detach", "flushed"])


class Otel:
    """OpenTelemetry's SDK, exporting to memory."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider(metric_readers=[self._reader])
        self.tracers = TracerProvider()
        self._spans = InMemorySpanExporter()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meter, self.tracer = self.meters.get_meter("test"), self.tracers.get_tracer("test")

    def spans(self) -> Sequence[ReadableSpan]:
        return self._spans.get_finished_spans()

    def points(self) -> dict[str, list[Any]]:
        """Return the data points of each instrument, by its name and unit."""
        data = self._reader.get_metrics_data()
        assert data is not None
        [resource] = data.resource_metrics
        return {
            f"{metric.name} {metric.unit}": list(metric.data.data_points)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def otel() -> Iterator[Otel]:
    otel = Otel()
    yield otel
    otel.meters.shutdown()
    otel.tracers.shutdown()


class TestOpenTelemetry:
    async def test_spans(self, engine: AsyncEngine, otel: Otel) -> None:
        """A span for each call, a child of the caller's, by the conventions for databases."""
        storage = SqlAlchemySagaStorage(engine, telemetry=OpenTelemetry(meter=otel.meter, tracer=otel.tracer))
        saga_id = uuid4()
        with otel.tracer.start_as_current_span("caller") as caller:
            await asyncio.gather(
                storage.create_saga(saga_id, "order", {}), *(storage.create_saga(uuid4(), "o", {}) for _ in range(9))
            )
            with pytest.raises(SagaConcurrencyError):
                await storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=7)
            assert trace.get_current_span() is caller
        *created, refused, last = otel.spans()
        assert last.name == "caller"
        assert {span.name for span in created} == {"create_saga saga_executions"}
        for span in (*created, refused):
            assert span.parent is not None
            assert span.parent.span_id == caller.get_span_context().span_id
            assert span.kind is trace.SpanKind.CLIENT
        [mine] = [
            dict(span.attributes or {})
            for span in created
            if (span.attributes or {}).get("saga_store.saga_id") == str(saga_id)
        ]
        assert mine == {
            "db.system.name": "postgresql",
            "db.operation.name": "create_saga",
            "db.collection.name": "saga_executions",
            "db.namespace": engine.url.database,
            "server.address": engine.url.host,
            "server.port": engine.url.port,
            "saga_store.saga_id": str(saga_id),
        }
        assert (refused.attributes or {})["error.type"] == "SagaConcurrencyError"
        assert refused.status.status_code is trace.StatusCode.ERROR
        assert all(span.status.status_code is trace.StatusCode.UNSET for span in created)

    async def test_an_error_of_the_server(self, engine: AsyncEngine, otel: Otel, database: Database) -> None:
        """It goes by its SQLSTATE."""
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute("ALTER TABLE saga_executions ADD CHECK (name <> 'bad')")
        storage = SqlAlchemySagaStorage(engine, telemetry=OpenTelemetry(meter=otel.meter, tracer=otel.tracer))
        with pytest.raises(StorageUnavailableError):
            await storage.create_saga(uuid4(), "bad", {})
        [span] = otel.spans()
        attributes = span.attributes or {}
        assert (attributes["error.type"], attributes["db.response.status_code"]) == ("23514", "23514")
        [duration] = otel.points()["db.client.operation.duration s"]
        assert duration.attributes["error.type"] == "23514"

    async def test_a_cancelled_call(self, engine: AsyncEngine, otel: Otel, database: Database) -> None:
        """Its span ends then, and says why."""
        storage = SqlAlchemySagaStorage(engine, telemetry=OpenTelemetry(meter=otel.meter, tracer=otel.tracer))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        with psycopg.connect(database.url()) as connection:
            connection.execute("SELECT FROM saga_executions WHERE id = %s FOR UPDATE", [saga_id])
            write = asyncio.create_task(storage.update_status(saga_id, SagaStatus.RUNNING))
            await asyncio.sleep(0.05)
            write.cancel()
            with pytest.raises(asyncio.CancelledError):
                await write
        assert (otel.spans()[-1].attributes or {})["error.type"] == "CancelledError"

    async def test_instruments(self, engine: AsyncEngine, otel: Otel) -> None:
        """By their names, units and attributes; no saga's id is among them, and without a tracer there are no spans."""
        telemetry = OpenTelemetry(meter=otel.meter)
        storage = SqlAlchemySagaStorage(engine, telemetry=telemetry)
        await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(9)))
        telemetry.retried(StorageUnavailableError("a deadlock", "40P01"))
        telemetry.resolved("refused")
        telemetry.waited_for_lock(0.2)
        points = otel.points()
        assert points.keys() == {
            "db.client.operation.duration s",
            "saga_store.flush.rows {row}",
            "saga_store.queue.wait_time s",
            "saga_store.lock.wait_time s",
            "saga_store.retries {retry}",
            "saga_store.lost_answers {answer}",
        }
        [duration], [rows] = points["db.client.operation.duration s"], points["saga_store.flush.rows {row}"]
        assert (duration.count, duration.attributes["db.operation.name"]) == (9, "create_saga")
        assert duration.explicit_bounds[0] == 0.001
        assert rows.sum == 9
        assert [dict(point.attributes) for point in points["saga_store.retries {retry}"]] == [{"error.type": "40P01"}]
        assert [dict(point.attributes) for point in points["saga_store.lost_answers {answer}"]] == [
            {"saga_store.resolution": "refused"}
        ]
        assert not any("saga_id" in str(point.attributes) for several in points.values() for point in several)
        assert not otel.spans()

    @pytest.mark.parametrize("groups", [True, False])
    async def test_a_flush_is_in_nobodys_trace(self, engine: AsyncEngine, otel: Otel, *, groups: bool) -> None:
        """Where callers share a statement, what happens in it, such as a pool's event, is no child of one of them."""
        seen: list[trace.Span] = []
        event.listen(engine.sync_engine, "checkout", lambda *_: seen.append(trace.get_current_span()))
        storage = SqlAlchemySagaStorage(
            engine,
            telemetry=OpenTelemetry(meter=otel.meter, tracer=otel.tracer),
            group_by=(lambda: "all") if groups else None,
        )
        with otel.tracer.start_as_current_span("caller"):
            await asyncio.gather(*(storage.create_saga(uuid4(), "order", {}) for _ in range(30)))
        alone, *shared = seen
        assert alone.get_span_context().is_valid == groups
        assert shared
        assert not any(span.get_span_context().is_valid for span in shared)
        points = otel.points()
        assert not any(point.exemplars for point in points["saga_store.flush.rows {row}"])
        assert not any(point.exemplars for point in points["saga_store.queue.wait_time s"])


def test_without_the_extra_it_says_which(tmp_path: Path) -> None:
    """One line, with what to install; the storage itself needs nothing of it."""
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not here')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import saga_store.telemetry, saga_store.sqlalchemy; "
    command = [sys.executable, "-c", program + "import saga_store.telemetry.opentelemetry"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: saga_store.telemetry.opentelemetry needs opentelemetry-api: pip install saga-store[otel]"
    )
