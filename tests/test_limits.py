"""How big, how long and how many: contexts, histories and callers at their limits; docs/limits.md refers here.

SAGA_STORE_TEST_LIMITS=complete, or `make limits`, also goes to contexts of 50 MB, and to histories of 100,000 entries.
"""

import asyncio
import gc
import json
import os
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import (
    Checkpoint,
    InvalidSagaDataError,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SagaStorage,
    StorageUnavailableError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.group_commit import MAX_BATCH_BYTES
from saga_store.sqlalchemy.writer import Writer
from saga_store.write import Outcome, Write
from tests.databases import Database
from tests.test_contract import DRIVERS

MakeEngine = Callable[..., AsyncEngine]
MakeStorage = Callable[..., SagaStorage]

COMPLETE = os.environ.get("SAGA_STORE_TEST_LIMITS") == "complete"
KB, MB = 1000, 1_000_000
SIZES = [KB, 100 * KB, MB, 10 * MB, *([50 * MB] if COMPLETE else [])]
MANY = 1000
STEP = LogStep("pay", "act", SagaStepStatus.STARTED)
# Tracing the allocations takes several times as long as reading.
HISTORY_LENGTH = 100_000 if COMPLETE else 20_000
# How long the last of many waits for its turn depends on the machine, and isn't what is tested.
PATIENT_POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 300}


def context_of(size: int) -> dict[str, Any]:
    """Return a context of so many bytes as JSON, with numbers and what isn't ASCII among it."""
    items = [{"n": n, "text": "é" * 100, "more": "x" * 350} for n in range(size // 1000)]
    context = {"items": items, "rest": ""}
    context["rest"] = "x" * (size - encoded_size(context))
    return context


def encoded_size(context: dict[str, Any]) -> int:
    return len(json.dumps(context, separators=(",", ":")))


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yield what tells how many bytes Python had allocated at most, since the block began."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many bytes of contexts each statement of group commit carries."""
    sizes: list[list[int]] = []
    write_now = Writer.write_now

    async def noted(saver: Writer, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        sizes.append([len(write.context or "") for write in writes])
        return await write_now(saver, writes)

    monkeypatch.setattr(Writer, "write_now", noted)
    return sizes


@pytest.fixture(params=["memory", "engine", "session"])
async def make_storage(request: pytest.FixtureRequest, make_engine: MakeEngine) -> AsyncIterator[MakeStorage]:
    """Make storages on one database or in one transaction, of each kind that takes a maximum size."""
    if request.param == "memory":
        database = MemoryDatabase()
        yield lambda **options: MemorySagaStorage(database, **options)
        return
    engine = make_engine("asyncpg")
    if request.param == "engine":
        yield lambda **options: SqlAlchemySagaStorage(engine, **options)
        return
    async with AsyncSession(engine) as session:
        yield lambda **options: SqlAlchemySagaStorage(session, **options)


async def update_in_run(storage: SagaStorage, saga_id: UUID, context: dict[str, Any]) -> None:
    async with storage.run(saga_id) as run:
        await run.update_context(saga_id, context)
        await run.commit()


async def create_in_run(storage: SagaStorage, _: UUID, context: dict[str, Any]) -> None:
    async with storage.run(uuid4()) as run:
        await run.create_saga(run.saga_id, "order", context)
        await run.commit()


WRITES: dict[str, Callable[[SagaStorage, UUID, dict[str, Any]], Awaitable[object]]] = {
    "create_saga": lambda storage, _, context: storage.create_saga(uuid4(), "order", context),
    "update_context": lambda storage, saga_id, context: storage.update_context(saga_id, context),
    "save": lambda storage, saga_id, context: storage.save(Checkpoint(saga_id, context=context)),
    "a run that creates": create_in_run,
    "a run that updates": update_in_run,
}


class TestContextSize:
    @pytest.mark.parametrize("driver", DRIVERS)
    @pytest.mark.parametrize("size", SIZES)
    async def test_round_trip(self, size: int, driver: str, make_engine: MakeEngine) -> None:
        """A context of this many bytes comes back equal, over the driver itself and in a session."""
        storage, saga_id, context = SqlAlchemySagaStorage(engine := make_engine(driver)), uuid4(), context_of(size)
        assert encoded_size(context) == size

        await storage.create_saga(saga_id, "order", context)
        assert (await storage.get_saga(saga_id)).context == context
        async with AsyncSession(engine) as session:
            joined = SqlAlchemySagaStorage(session)
            context["rest"] = "changed"
            await joined.update_context(saga_id, context)
            assert (await joined.get_saga(saga_id)).context == context

    @pytest.mark.parametrize("write", WRITES)
    async def test_the_limit_counts_the_bytes_of_the_json(self, write: str, make_storage: MakeStorage) -> None:
        """A context of exactly the maximum is stored; one of a byte more is refused, with both sizes and the remedy."""
        storage, saga_id = make_storage(max_context_bytes=5000), uuid4()
        await storage.create_saga(saga_id, "order", {})

        await WRITES[write](storage, saga_id, context_of(5000))
        before = await storage.get_saga(saga_id)
        with pytest.raises(InvalidSagaDataError) as raised:
            await WRITES[write](storage, saga_id, context_of(5001))

        assert raised.value.field == "context"
        assert "5,001 bytes" in str(raised.value)
        assert "5,000" in str(raised.value)
        assert "max_context_bytes" in str(raised.value)
        assert await storage.get_saga(saga_id) == before

    async def test_a_run_refuses_at_the_call(self, make_storage: MakeStorage) -> None:
        """As all bad input, a context that is too big is refused by the run at the call, not at the commit."""
        storage, saga_id = make_storage(max_context_bytes=5000), uuid4()
        await storage.create_saga(saga_id, "order", {"total": 12})
        async with storage.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            with pytest.raises(InvalidSagaDataError, match="6,000 bytes"):
                await run.update_context(saga_id, context_of(6000))
            await run.commit()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})

    async def test_what_is_stored_stays_readable(self, make_storage: MakeStorage) -> None:
        """A lower maximum than yesterday's keeps nobody from reading a saga, nor from writing all else of it."""
        saga_id, context = uuid4(), context_of(6000)
        await make_storage().create_saga(saga_id, "order", context)
        storage = make_storage(max_context_bytes=5000)
        async with storage.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.commit()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, context)

    async def test_the_default_is_64_mib(self) -> None:
        storage, saga_id = MemorySagaStorage(), uuid4()
        frame = encoded_size({"text": ""})
        await storage.create_saga(saga_id, "order", {"text": "x" * (64 * 2**20 - frame)})
        with pytest.raises(InvalidSagaDataError, match=r"67,108,865 bytes .* 67,108,864"):
            await storage.update_context(saga_id, {"text": "x" * (64 * 2**20 - frame + 1)})

    @pytest.mark.parametrize("limit", [0, 1, -1, 2**29 + 1, 5000.0, True, "5000", None])
    def test_an_impossible_maximum_is_refused(self, limit: Any) -> None:  # noqa: ANN401 - whatever is no maximum
        """A maximum that no context keeps, or that PostgreSQL couldn't store, is refused at once."""
        with pytest.raises(InvalidSagaDataError) as raised:
            MemorySagaStorage(max_context_bytes=limit)
        assert raised.value.field == "max_context_bytes"

    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_big_ones_and_small_ones_at_once(
        self, driver: str, make_engine: MakeEngine, batches: list[list[int]]
    ) -> None:
        """Concurrent contexts from 1 KB to 6 MB are all stored, and what exceeds a batch's bound goes alone."""
        storage = SqlAlchemySagaStorage(make_engine(driver))
        contexts = {uuid4(): context_of(KB * (6000 if n % 20 == 0 else 300 if n % 3 == 0 else 1)) for n in range(40)}
        async with asyncio.TaskGroup() as tasks:
            for saga_id, context in contexts.items():
                tasks.create_task(storage.create_saga(saga_id, "order", context))

        assert sum(map(len, batches)) == len(contexts)
        assert any(len(batch) > 1 for batch in batches)
        assert all(len(batch) == 1 or sum(batch) <= MAX_BATCH_BYTES for batch in batches)
        for saga_id, context in contexts.items():
            assert (await storage.get_saga(saga_id)).context == context


@pytest.mark.parametrize("driver", DRIVERS)
class TestHistoryLength:
    async def test_a_long_history_in_bounded_memory(
        self, driver: str, make_engine: MakeEngine, database: Database
    ) -> None:
        """A history of tens of thousands of entries is streamed whole and in order, in the memory of a few batches."""
        storage, saga_id = SqlAlchemySagaStorage(make_engine(driver)), uuid4()
        await storage.create_saga(saga_id, "order", {})
        with psycopg.connect(database.url(), autocommit=True) as direct:
            direct.execute(
                "INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at) "
                "SELECT %s, 'step-' || n, 'act', 'COMPLETED', repeat('x', 200), now() "
                "FROM generate_series(1, %s) n",
                [saga_id, HISTORY_LENGTH],
            )
        count = 0
        with traced() as peak:
            async for entry in storage.iter_step_history(saga_id):
                count += 1
                assert entry.step_name == f"step-{count}"
            assert peak() < 5 * MB  # the whole list takes 600 bytes an entry

        assert count == HISTORY_LENGTH

    async def test_buffered_entries_are_not_in_the_stream(self, driver: str, make_engine: MakeEngine) -> None:
        """The stream is of what is stored: what a run has buffered is in it after the commit."""
        storage, saga_id = SqlAlchemySagaStorage(make_engine(driver)), uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with storage.run(saga_id) as run:
            await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
            assert [entry async for entry in storage.iter_step_history(saga_id)] == []
            await run.commit()
            assert [entry.step_name async for entry in storage.iter_step_history(saga_id)] == ["pay"]

    async def test_long_details(self, driver: str, make_engine: MakeEngine) -> None:
        """Details have no maximum of their own, and those of 5 MB come back to the letter."""
        storage, saga_id, details = SqlAlchemySagaStorage(make_engine(driver)), uuid4(), "é\n" * (5 * MB // 2)
        await storage.create_saga(saga_id, "order", {})
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.FAILED, details)
        [entry] = [entry async for entry in storage.iter_step_history(saga_id)]
        assert entry.details == details


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("group_commit", [True, False], ids=["group_commit", "alone"])
class TestManyCallers:
    async def test_1000_callers_on_a_pool_of_5(
        self, *, group_commit: bool, driver: str, make_engine: MakeEngine
    ) -> None:
        """A thousand callers at once write, append and read on five connections: all succeed, and nothing is lost."""
        storage = SqlAlchemySagaStorage(make_engine(driver, **PATIENT_POOL), group_commit=group_commit)
        sagas = {uuid4(): n for n in range(MANY)}
        shared = list(sagas)[:10]

        await asyncio.gather(*(storage.create_saga(saga_id, "order", {"n": n}) for saga_id, n in sagas.items()))
        await asyncio.gather(
            *(storage.log_step(shared[n % 10], f"step-{n}", "act", SagaStepStatus.STARTED) for n in range(MANY))
        )
        read = await asyncio.gather(*map(storage.get_saga, sagas))
        histories = await asyncio.gather(*map(storage.get_step_history, shared))

        assert {saga.id: saga.context["n"] for saga in read} == sagas
        # In the order of the calls if they share statements, and otherwise in the order in which they get connections.
        for line, history in enumerate(histories):
            names = [entry.step_name for entry in history]
            expected = [f"step-{n}" for n in range(line, MANY, 10)]
            assert names == expected if group_commit else sorted(names) == sorted(expected)

    async def test_an_exhausted_pool_is_told(self, *, group_commit: bool, driver: str, make_engine: MakeEngine) -> None:
        """If no connection comes back in time, every caller hears of the pool, and nothing is written."""
        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=0.05)
        storage, sagas = SqlAlchemySagaStorage(engine, group_commit=group_commit), [uuid4() for _ in range(50)]
        async with engine.connect():
            written = await asyncio.gather(
                *(storage.save(Checkpoint(saga_id, name="order")) for saga_id in sagas), return_exceptions=True
            )
            read = await asyncio.gather(*map(storage.get_saga, sagas), return_exceptions=True)

        for error in written + read:
            assert isinstance(error, StorageUnavailableError)
            assert "QueuePool limit of size 1 overflow 0 reached" in str(error)
        await storage.save(Checkpoint(sagas[0], name="order", steps=[STEP]))
        for saga_id in sagas[1:]:
            with pytest.raises(SagaNotFoundError):
                await storage.get_saga(saga_id)
