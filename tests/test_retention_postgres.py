"""Letting go on PostgreSQL: what others do by SQL of their own, what roles may see, lost answers, and big sagas."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, LiteralString, cast
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors
from psycopg.sql import SQL, Identifier
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import Checkpoint, SagaArchivedError, SagaStatus, SagaStepStatus
from saga_store.retention_model import Restored, SagaRecord
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.statement import Statement
from saga_store.testing.retention import Kept, RetentiveStorage, expired, finished, let_go, read, stored, verified
from saga_store.write import Write
from saga_store.write_ids import identified
from tests.connections import engine_on
from tests.databases import Database
from tests.test_grants import as_role, role_on

MakeEngine = Callable[[str], AsyncEngine]
APPEND: LiteralString = (
    "INSERT INTO saga_logs (saga_id, step_name, action, status) VALUES (%s, 'foreign', 'act', 'FAILED')"
)
BIG = 24 * 2**20


@pytest.fixture(params=["asyncpg", "psycopg"])
def engine(request: pytest.FixtureRequest, make_engine: MakeEngine) -> AsyncEngine:
    return make_engine(request.param)


@pytest.fixture
def storage(engine: AsyncEngine) -> RetentiveStorage:
    return cast("RetentiveStorage", SqlAlchemySagaStorage(engine))


@pytest.fixture
async def other(database: Database) -> AsyncIterator[psycopg.AsyncConnection]:
    """Somebody who appends by SQL, and locks no more than the foreign key does."""
    async with await psycopg.AsyncConnection.connect(database.url()) as connection:
        yield connection


class TestOthers:
    """Whoever doesn't know stubs loses nothing, and changes none."""

    async def test_an_entry_that_is_on_its_way_keeps_its_saga(
        self, storage: RetentiveStorage, other: psycopg.AsyncConnection
    ) -> None:
        """It isn't committed yet, and its saga isn't touched."""
        saga_id = await finished(storage, "order")
        marks = [saga.mark for saga in await expired(storage, "order")]
        archive = await verified(storage)
        await other.execute(APPEND, [saga_id])
        assert list((await storage.make_stubs(archive.id, marks)).made) == []
        await other.commit()
        assert list((await storage.make_stubs(archive.id, marks)).made) == []
        assert len(await storage.get_step_history(saga_id)) == 3

    async def test_an_entry_that_comes_late_is_kept(
        self, storage: RetentiveStorage, other: psycopg.AsyncConnection
    ) -> None:
        """It stands at the stub, which isn't forgotten; restored, the saga has it after the others."""
        saga_id = await finished(storage, "order")
        before = await stored(storage, saga_id)
        _, record = await let_go(storage, saga_id)
        await other.execute(APPEND, [saga_id])
        await other.commit()
        with pytest.raises(SagaArchivedError):
            await storage.get_step_history(saga_id)
        assert await storage.forget_stubs(older_than=timedelta(0)) == 0
        assert await storage.restore_saga(record) is Restored.RESTORED
        saga, history = await stored(storage, saga_id)
        assert (saga, history[:-1], history[-1].step_name) == (before.saga, before.history, "foreign")

    @pytest.mark.parametrize(
        "change",
        [
            "status = 'RUNNING'",
            "status = 'FAILED', version = version + 1, updated_at = statement_timestamp()",
            "context = '{\"a\": 1}'",
            "lease_owner = 'worker', lease_expires_at = now()",
        ],
    )
    async def test_a_stub_is_not_changed(
        self, storage: RetentiveStorage, other: psycopg.AsyncConnection, change: LiteralString
    ) -> None:
        """What a release writes that doesn't know stubs is refused by PostgreSQL."""
        saga_id = await finished(storage, "order")
        await let_go(storage, saga_id)
        with pytest.raises(errors.CheckViolation, match="ck_saga_executions_stub"):
            await other.execute(SQL("UPDATE saga_executions SET {} WHERE id = %s").format(SQL(change)), [saga_id])

    async def test_what_is_referred_to_is_not_forgotten(self, storage: RetentiveStorage, database: Database) -> None:
        """By an application's table; the others are, around it."""
        ids = [await finished(storage, "order") for _ in range(5)]
        for saga_id in ids:
            await let_go(storage, saga_id)
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute("CREATE TABLE orders (saga_id uuid REFERENCES saga_executions)")
            admin.execute("INSERT INTO orders VALUES (%s)", [ids[2]])
        assert await storage.forget_stubs(older_than=timedelta(0), limit=2) == 2
        assert await storage.forget_stubs(older_than=timedelta(0), limit=10) == 2
        assert await storage.forget_stubs(older_than=timedelta(0), limit=10) == 0
        assert await storage.find_stub(ids[2]) is not None


class TestLedger:
    async def test_who_may_not_read_it_goes_on(
        self, storage: RetentiveStorage, engine: AsyncEngine, database: Database
    ) -> None:
        """The error names no archive then, and the caller's transaction can still be used."""
        saga_id, another = await finished(storage, "order"), await finished(storage, "refund")
        await let_go(storage, saga_id)
        with role_on(database, f"saga_test_{uuid4().hex[:8]}") as role:
            with psycopg.connect(database.url(), autocommit=True) as admin:
                granted = "GRANT SELECT, INSERT, UPDATE ON saga_executions, saga_logs TO {0}"
                admin.execute(SQL(granted).format(Identifier(role)))
                admin.execute(SQL("GRANT USAGE ON SEQUENCE saga_logs_id_seq TO {}").format(Identifier(role)))
            url = as_role(database, role).url(engine.dialect.driver)
            async with engine_on(url) as limited, AsyncSession(limited) as session:
                joined = SqlAlchemySagaStorage(session)
                with pytest.raises(SagaArchivedError) as caught:
                    await joined.log_step(saga_id, "late", "act", SagaStepStatus.FAILED)
                assert caught.value.archive is None
                await joined.log_step(another, "late", "act", SagaStepStatus.FAILED)
                await session.commit()
        assert len(await storage.get_step_history(another)) == 3


class TestLag:
    """How far behind an archiver is, which nobody else would tell; days ago a walk had come to its end."""

    DAYS = 20

    @pytest.fixture
    def fill(self, database: Database) -> Callable[..., None]:
        """Insert so many sagas that were created and had ended so many days ago, within an hour; also as stubs."""

        def fill(count: int, days: float, *, name: str = "order", stub: bool = False) -> None:
            with psycopg.connect(database.url()) as connection:
                connection.execute(
                    """
                    INSERT INTO saga_executions (id, name, status, context, created_at, updated_at, archived_at)
                    SELECT gen_random_uuid(), %(name)s, 'COMPLETED', '{}', at, at, CASE WHEN %(stub)s THEN now() END
                    FROM generate_series(1, %(count)s) AS number, LATERAL (
                        SELECT now() - make_interval(secs => %(days)s * 86400 - 3600.0 * number / %(count)s) AS at) AS t
                    """,
                    {"name": name, "stub": stub, "count": count, "days": days},
                )

        return fill

    def walked(self, database: Database, *, uri: str | None = "memory://x") -> None:
        with psycopg.connect(database.url()) as connection:
            connection.execute(
                "INSERT INTO saga_archives (id, uri, state, archived_by, begun_at, archived_at) "
                "SELECT gen_random_uuid(), %s, 'REMOVED', 'cron', at, at FROM (SELECT now() - %s) AS t (at)",
                [uri, timedelta(days=self.DAYS)],
            )

    async def test_behind_more_stubs_than_a_page_looks_at(
        self, storage: RetentiveStorage, database: Database, fill: Callable[..., None]
    ) -> None:
        """A day's work of a busy shop was let go before the archiver ceased."""
        fill(30_000, self.DAYS + 31, stub=True)
        fill(3, self.DAYS + 29.5)
        self.walked(database)
        figures = await storage.get_figures(retention=Kept(completed=timedelta(days=30)))
        assert figures.retention_lag is not None
        assert timedelta(days=self.DAYS - 1) < figures.retention_lag < timedelta(days=self.DAYS)

    async def test_of_what_is_kept_longer_than_the_rest(
        self, storage: RetentiveStorage, database: Database, fill: Callable[..., None]
    ) -> None:
        """Each term has a place of its own where the last walk ended; stubs of years lie before them."""
        fill(210_000, 400, stub=True)
        fill(3, self.DAYS + 29.5)
        self.walked(database)
        kept = Kept(completed=timedelta(days=30), names={"tmp": timedelta(hours=1)})
        figures = await storage.get_figures(retention=kept)
        assert figures.retention_lag is not None
        assert timedelta(days=self.DAYS - 1) < figures.retention_lag < timedelta(days=self.DAYS)

    @pytest.mark.parametrize("uri", [None, "memory://x"])
    async def test_what_another_policy_has_let_go_hides_nothing(
        self, storage: RetentiveStorage, database: Database, fill: Callable[..., None], uri: str | None
    ) -> None:
        """A purge, or an archive, of one name only."""
        fill(3, 100)
        self.walked(database, uri=uri)
        figures = await storage.get_figures(retention=Kept(completed=timedelta(days=30)))
        assert figures.retention_lag is not None
        assert timedelta(days=69) < figures.retention_lag < timedelta(days=71)


class TestRuns:
    async def test_a_run_of_an_archived_saga(self, storage: RetentiveStorage, engine: AsyncEngine) -> None:
        """What it has buffered is refused, by itself and in a transaction of the caller's, which goes on."""
        saga_id = await finished(storage, "order")
        ours = SqlAlchemySagaStorage(engine)
        async with ours.run(saga_id) as alone, ours.run(saga_id) as joined:
            for run in (alone, joined):
                await run.load_saga_state(saga_id)
                await run.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
            await let_go(storage, saga_id)
            with pytest.raises(SagaArchivedError):
                await alone.commit()
            async with AsyncSession(engine) as session:
                with pytest.raises(SagaArchivedError):
                    await joined.commit(into=session)
                assert (await session.execute(text("SELECT 1"))).scalar() == 1
            await alone.rollback()
            await joined.rollback()
        stub = await storage.find_stub(saga_id)
        assert stub is not None

    async def test_a_write_whose_answer_was_lost_is_recognised(
        self, storage: RetentiveStorage, engine: AsyncEngine
    ) -> None:
        """It was written before the saga was let go; and one that never came is refused."""
        saga_id = await finished(storage, "order", SagaStatus.RUNNING)
        ours = SqlAlchemySagaStorage(engine)
        sent = identified(Write(saga_id, status=SagaStatus.COMPLETED, expected_version=1))
        late = identified(Write(saga_id, status=SagaStatus.FAILED, expected_version=1))
        assert await ours._apply(sent) == 2  # noqa: SLF001 - as a run sends it
        await let_go(storage, saga_id)
        assert await ours._apply(sent._replace(repeats=True)) == 2  # noqa: SLF001 - likewise
        refused = await ours._apply(late._replace(repeats=True))  # noqa: SLF001 - likewise
        assert isinstance(refused, SagaArchivedError)


class TestBigSagas:
    async def test_a_big_one_is_read_piece_by_piece(self, storage: RetentiveStorage, database: Database) -> None:
        """However big it is, the memory for it stays the same; it comes whole, and so do its entries."""
        saga_id = await finished(storage, "order", steps=())
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(
                "UPDATE saga_executions SET context = json_build_object('blob', repeat('\u00e9', %s)) WHERE id = %s",
                [BIG // 2, saga_id],
            )
            admin.execute(
                "INSERT INTO saga_logs (saga_id, step_name, action, status, details) "
                "SELECT %s, 'step', 'act', 'FAILED', repeat('x', 200) FROM generate_series(1, 20000)",
                [saga_id],
            )
        small = await finished(storage, "order")
        sagas = await expired(storage, "order")
        assert sagas[0].bytes > BIG
        tracemalloc.start()
        characters = entries = 0
        names = []
        async with storage.snapshot() as snapshot:
            async for reading in snapshot.read(sagas):
                names.append(reading.head.mark.id)
                async for piece in reading.context():
                    assert len(piece) <= 2**20
                    characters += len(piece)
                async for batch in reading.entries():
                    assert len(batch) <= 1000
                    entries += len(batch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert names == [saga_id, small]
        assert (characters, entries) == (BIG // 2 + len('{"blob" : ""}') + len('{"n":1.0}'), 20_002)
        assert peak < 40 * 2**20


async def test_what_stays_is_passed_over_once(
    storage: RetentiveStorage, admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two batches the walk goes on where it was, past stubs that an application's table refers to."""
    ids = [await finished(storage, "order") for _ in range(9)]
    for saga_id in ids:
        await let_go(storage, saga_id)
    admin.execute("CREATE TABLE parcels (saga_id uuid REFERENCES saga_executions)")
    admin.execute("INSERT INTO parcels SELECT unnest(%s::uuid[])", [ids[:5]])
    assert isinstance(storage, SqlAlchemySagaStorage)
    read, asked = storage._read, list[object]()  # noqa: SLF001 - what it asks of the server

    async def watched(statement: Statement, parameters: Mapping[str, object]) -> list[list[Any]]:
        asked.append(parameters.get("after_created_at"))
        return await read(statement, dict(parameters))

    monkeypatch.setattr(storage, "_read", watched)
    assert [gone async for gone in storage.forget_all_stubs(older_than=timedelta(0), at_once=2)] == [0, 0, 1, 2, 1]
    assert asked[0] is None
    assert [str(each) for each in asked[1:]] == sorted({str(each) for each in asked[1:]})
    assert len(asked) == 5


async def test_a_long_context_comes_back_in_pieces(
    storage: RetentiveStorage, admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the letter, wherever a piece ends: as a new row, in its stub, and compared once more."""
    monkeypatch.setattr("saga_store.sqlalchemy.restoring._MOST_CHARACTERS", 3)
    saga_id = await finished(storage, "order")
    archive, record = await let_go(storage, saga_id)
    long = replace(
        record, context='  {"a" : "\\u0000\\"\\\\ é \U0001f600 \\ud83d", "a": [1.50, 2e400], "b": {"":null}} \n'
    )
    assert await storage.restore_saga(long, archive_id=archive.id) is Restored.RESTORED
    new = replace(long, id=uuid4())
    assert await storage.restore_sagas([new, long], keep_for=timedelta(0)) == [Restored.RESTORED, Restored.SAME]
    other = replace(new, context=new.context.replace("é", "ë"))
    assert await storage.restore_sagas([new, long]) == [Restored.SAME, Restored.SAME]
    assert await storage.restore_saga(other) is Restored.OTHER
    for each in (new, long):
        [(context,)] = admin.execute("SELECT CAST(context AS text) FROM saga_executions WHERE id = %s", [each.id])
        assert context == long.context


async def test_a_crowd_of_restored_and_archived(storage: RetentiveStorage) -> None:
    """Twenty sagas go and come back, twice, while all of them are written to: nothing is lost, nothing twice."""
    ids = [await finished(storage, "order") for _ in range(20)]
    written: dict[UUID, int] = dict.fromkeys(ids, 2)

    async def write(saga_id: UUID) -> None:
        for _ in range(4):
            try:
                await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
            except SagaArchivedError:
                await asyncio.sleep(0.01)
            else:
                written[saga_id] += 1

    async def archive() -> None:
        for _ in range(4):
            records: list[SagaRecord] = await read(storage, await expired(storage, "order"))
            line = await verified(storage)
            made = set((await storage.make_stubs(line.id, [record.mark for record in records])).made)
            back = [record for record in records if record.id in made]
            assert await storage.restore_sagas(back, keep_for=timedelta(0)) == [Restored.RESTORED] * len(back)

    await asyncio.gather(archive(), *map(write, ids))
    for saga_id in ids:
        assert len(await storage.get_step_history(saga_id)) == written[saga_id]
    await storage.save(Checkpoint(ids[0], status=SagaStatus.RUNNING))
