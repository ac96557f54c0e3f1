"""A caller that is cancelled anywhere: whatever it was about to do is done wholly, or not at all.

A coroutine can be cancelled only where it is suspended, so each call is cancelled at its first suspension, then at its
second, and so on until it gets through; each time in two ways, for these are two different races:

- *waiting*: what it waits for hasn't happened yet;
- *answered*: it has just happened, and the caller is cancelled before it can see that.
"""

import asyncio
import gc
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import until_returned
from tests.databases import Database
from tests.test_contract import DRIVERS

STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)
COMPLETED = LogStep("pay", "act", SagaStepStatus.COMPLETED)

State = tuple[object, ...] | None
"""Of a saga, read in one statement: status, version, attempts, number of entries; None if it isn't there."""


@dataclass
class CancelledAt:
    """Runs a coroutine in the current task, which it cancels at one of the coroutine's suspensions."""

    suspension: int
    answered: bool
    reached: bool = False

    @types.coroutine
    def run(self, coroutine: Coroutine[Any, Any, object]) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task
        error: BaseException | None = None
        for number in range(10_000):
            try:
                waits_for = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration:
                return
            if number == self.suspension:
                self.reached = True
                if self.answered and waits_for is not None:
                    # Before the task's own callback, so that the task can't see the answer first.
                    waits_for.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            error = None
            try:
                yield waits_for
            except BaseException as exc:  # noqa: BLE001 - the coroutine gets what the task got
                error = exc
        raise AssertionError("the call doesn't end")


async def create(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    steps = [STARTED, COMPLETED]
    await storage.save(Checkpoint(saga_id, name="order", status=SagaStatus.RUNNING, steps=steps))


async def save(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    await storage.save(Checkpoint(saga_id, status=SagaStatus.COMPENSATING, steps=[STARTED, COMPLETED]))


async def commit_run(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    async with storage.run(saga_id) as run:
        await run.update_status(saga_id, SagaStatus.COMPENSATING)
        await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        await run.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED)
        await run.commit()


async def claim(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    name = (await storage.get_saga(saga_id)).name
    await storage.claim_sagas(owner="w", lease=timedelta(days=1), limit=1, stale_after=timedelta(), name=name)


async def read_history(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    await storage.get_step_history(saga_id)


async def stream_history(storage: SqlAlchemySagaStorage, saga_id: UUID) -> None:
    _ = [entry async for entry in storage.iter_step_history(saga_id, batch_size=1)]


@dataclass(frozen=True)
class Call:
    """A call, on what saga it is made, and what it makes of it."""

    make: Callable[[SqlAlchemySagaStorage, UUID], Coroutine[Any, Any, None]]
    before: State
    after: State


NEW = ("PENDING", 1, 0, 1)
CALLS = {
    "create": Call(create, None, ("RUNNING", 1, 0, 2)),
    "save": Call(save, NEW, ("COMPENSATING", 2, 0, 3)),
    "run": Call(commit_run, NEW, ("COMPENSATING", 2, 0, 3)),
    "claim": Call(claim, NEW, ("PENDING", 2, 1, 1)),
    "history": Call(read_history, NEW, NEW),
    "stream": Call(stream_history, NEW, NEW),
}


def look(database: Database, saga_id: UUID) -> State:
    query = (
        "SELECT status, version, recovery_attempts, (SELECT count(*) FROM saga_logs WHERE saga_id = e.id) "
        "FROM saga_executions e WHERE id = %s"
    )
    with psycopg.connect(database.url(), autocommit=True) as direct:
        return direct.execute(query, [saga_id]).fetchone()


async def cancel_everywhere(
    call: Call, database: Database, storage: SqlAlchemySagaStorage, prepare: Callable[[], Awaitable[object]]
) -> int:
    """Make the call again and again, cancelled at each of its suspensions in both ways; return how many there are."""
    for suspension in range(1000):
        reached = False
        for answered in (False, True):
            saga_id = uuid4()
            if call.before:
                await storage.save(Checkpoint(saga_id, name=f"order {saga_id}", steps=[STARTED]))
            await prepare()
            cancelled = CancelledAt(suspension, answered)
            task = asyncio.ensure_future(_awaiting(cancelled, call.make(storage, saga_id)))
            with suppress(asyncio.CancelledError):
                await task
            reached = reached or cancelled.reached
            if cancelled.reached:
                # A statement that is in flight may yet be executed, but what is seen of it is all of it.
                assert look(database, saga_id) in {call.before, call.after}
            else:
                assert look(database, saga_id) == call.after
        if not reached:
            return suspension
    raise AssertionError("the call has no end of suspensions")


async def _awaiting(cancelled: CancelledAt, coroutine: Coroutine[Any, Any, object]) -> None:
    await cancelled.run(coroutine)


@pytest.fixture(params=DRIVERS)
def engine(request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    return make_engine(request.param, pool_size=2, max_overflow=0)


async def open_connection(storage: SqlAlchemySagaStorage) -> None:
    await storage.find_stale_sagas(stale_after=timedelta(days=1))


class WritesStepsOneByOne(SqlAlchemySagaStorage):
    """Breaks the promise: what was written before the cancellation stays, and the rest is missing."""

    async def save(self, checkpoint: Checkpoint) -> int:
        version = await super().save(replace(checkpoint, steps=()))
        for step in checkpoint.steps:
            await super().save(Checkpoint(checkpoint.saga_id, steps=[step]))
        return version


async def assert_unharmed(engine: AsyncEngine, storage: SqlAlchemySagaStorage, log: pytest.LogCaptureFixture) -> None:
    """Assert that every connection comes back, that the storage works, and that asyncio has nothing to complain of."""
    await until_returned(engine)
    await storage.create_saga(uuid4(), "order", {})
    gc.collect()
    logged = [record.getMessage() for record in log.records if record.name == "asyncio"]
    # What asyncpg.connect() itself leaves behind, whoever cancels it.
    assert [entry for entry in logged if "ConnectionError('unexpected connection_lost() call')" not in entry] == []


class TestCancellation:
    @pytest.mark.parametrize("options", [{}, {"group_commit": False}], ids=["group_commit", "alone"])
    @pytest.mark.parametrize("call", ["create", "save", "run"])
    async def test_a_write_is_cancelled_anywhere(
        self,
        call: str,
        options: dict[str, Any],
        engine: AsyncEngine,
        database: Database,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """On a connection that is open: written or not, the connection comes back, and the storage works."""
        storage = SqlAlchemySagaStorage(engine, **options)
        assert await cancel_everywhere(CALLS[call], database, storage, lambda: open_connection(storage)) > 0
        await assert_unharmed(engine, storage, caplog)

    @pytest.mark.parametrize("call", ["claim", "history", "stream"])
    async def test_another_call_is_cancelled_anywhere(
        self, call: str, engine: AsyncEngine, database: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Likewise claims and reads, which don't go through group commit."""
        storage = SqlAlchemySagaStorage(engine)
        assert await cancel_everywhere(CALLS[call], database, storage, lambda: open_connection(storage)) > 0
        await assert_unharmed(engine, storage, caplog)

    async def test_a_first_call_is_cancelled_anywhere(
        self, engine: AsyncEngine, database: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Likewise while the connection is made."""
        storage = SqlAlchemySagaStorage(engine)
        assert await cancel_everywhere(CALLS["create"], database, storage, engine.dispose) > 5
        await assert_unharmed(engine, storage, caplog)

    @pytest.mark.parametrize("call", ["create", "save", "run"])
    async def test_one_of_many_is_cancelled_anywhere(
        self, call: str, engine: AsyncEngine, database: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Likewise in a queue for the next batch, and none of the others is disturbed."""
        storage = SqlAlchemySagaStorage(engine)
        others: list[asyncio.Task[int]] = []

        async def crowd() -> None:
            assert set(await asyncio.gather(*others)) <= {1}
            others[:] = [
                asyncio.create_task(storage.save(Checkpoint(uuid4(), name="other", steps=[STARTED]))) for _ in range(3)
            ]
            await asyncio.sleep(0)

        assert await cancel_everywhere(CALLS[call], database, storage, crowd) > 0
        assert set(await asyncio.gather(*others)) == {1}
        await assert_unharmed(engine, storage, caplog)

    async def test_half_a_write_would_be_noticed(self, engine: AsyncEngine, database: Database) -> None:
        """The control: a storage that writes a checkpoint piece by piece doesn't pass."""
        storage = WritesStepsOneByOne(engine)
        with pytest.raises(AssertionError):
            await cancel_everywhere(CALLS["create"], database, storage, lambda: open_connection(storage))
