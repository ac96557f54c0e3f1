"""Group commit: the interleavings, written down before the code.

Who can be where: a *caller* is queued (its write waits), in flight (its write is in the statement that is awaited,
by itself if it came alone, else by a flusher) or put aside (its row was locked, and one task tries all of those again
now and then, with no connection in between). Of *flushers* there are none, one or two, each awaiting a statement.
Nothing else awaits, so between two awaits the queue is consistent; and a saga in flight is never ready too, so two
statements in flight have no saga in common.

===========================================  ==========================================================
what happens                                 what must follow
===========================================  ==========================================================
nobody else is there                         flushed at once, alone, in the caller's own task
callers arrive during a flush                they share the next statement
the one who flushes alone is cancelled       so is its statement, and the others are flushed
one of a batch is cancelled in flight        its write goes on, and the others get their answers
one is cancelled while queued                its write is never sent
two writes of one saga are queued            they go in two statements, in the order of the calls
a create and an update at once               likewise, so the update finds the saga
a crowd is queued, nothing in flight         it goes in two statements, which then alternate
more is queued than is in flight             a statement takes half of both together
a few are queued, a crowd is in flight       they wait for it: a statement for them alone isn't worth its price
a write of a saga in flight, two flushes     it waits for its own saga's flush, whatever the other one does
one of two flushes fails                     the other's callers don't notice
one write of a batch is refused              the others are written, and answered; it is asked for again, to be told why
telling the refused ones fails               they hear of it, and the others' writes stay written
a batch fails for one write's sake           it is split until that write fails alone
a batch fails for all                        every caller gets an error of its own
the connection is lost                       every caller gets UnknownOutcomeError for its own saga
no connection is to be had                   every caller gets StorageUnavailableError
a row is locked by another transaction       that caller is put aside, holds nothing, and nobody else waits
a saga is being created by another one       likewise
a hundred rows are locked                    they are tried again in one statement
the same, and that caller is cancelled       it is sent no more, and the saga's line moves on
a caller is cancelled while it is tried      its write may be stored, and the saga's line moves on after it
a flusher is giving its connection back      whoever comes meanwhile doesn't wait for it
the loop ends with writes queued             the callers are cancelled, and a new loop finds a queue that works
two loops use one storage                    the second is told to make one of its own
===========================================  ==========================================================
"""

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import (
    Checkpoint,
    LogStep,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    SchemaError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage, pooled
from saga_store.sqlalchemy import group_commit as module
from saga_store.sqlalchemy.binds import EngineBind
from saga_store.sqlalchemy.execution import Executor, News
from saga_store.sqlalchemy.group_commit import GroupCommit
from saga_store.sqlalchemy.writer import Patience, Writer
from saga_store.write import Outcome, Write
from tests.connections import engine_on, until_blocked
from tests.databases import Database
from tests.proxy import Cut, Proxy
from tests.scene import until

MakeEngine = Callable[..., AsyncEngine]


class Statements:
    """Stands where PostgreSQL would: keeps each batch until the test answers it."""

    def __init__(self) -> None:
        self.batches: list[list[Write]] = []
        self.locked: set[UUID] = set()
        self.refused: set[UUID] = set()
        self.told: list[list[UUID]] = []
        self.telling_fails: SagaStoreError | None = None
        self.guilty: set[UUID] = set()
        self.error: SagaStoreError | None = None
        self.bug: Exception | None = None
        self.gate = asyncio.Event()
        self.returning = asyncio.Event()
        self.returning.set()
        self.held: list[asyncio.Event] = []
        self.limit = Patience()
        self.key = "a place"
        self.group = GroupCommit(Statements.neutral)

    def neutral(self) -> "Statements":
        return self

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Statements"]:
        yield self
        await self.returning.wait()

    async def write_now(self, writes: Sequence[Write]) -> list[Outcome | None]:
        self.batches.append(list(writes))
        await self._until_released()
        if self.bug:
            raise self.bug
        if self.error and (not self.guilty or self.guilty & {write.saga_id for write in writes}):
            raise self.error
        left_out = self.locked | self.refused
        return [None if write.saga_id in left_out else len(self.batches) for write in writes]

    async def explain(self, writes: Sequence[Write]) -> list[Outcome | None]:
        self.told.append([write.saga_id for write in writes])
        if self.telling_fails:
            raise self.telling_fails
        return [
            None
            if write.saga_id in self.locked
            else SagaNotFoundError(write.saga_id)
            if write.saga_id in self.refused
            else 99
            for write in writes
        ]

    async def patience(self) -> Patience:
        return self.limit

    async def _until_released(self) -> None:
        own = asyncio.Event()
        self.held.append(own)
        ways = [asyncio.ensure_future(event.wait()) for event in (self.gate, own)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.held.remove(own)
            for way in ways:
                way.cancel()

    def call(self, saga_id: UUID | None = None, context: str = "{}") -> asyncio.Task[Outcome]:
        return asyncio.create_task(self._call(Write(saga_id or uuid4(), context=context)))

    async def _call(self, write: Write) -> Outcome:
        return await self.group.write(write, self)

    async def under_way(self) -> asyncio.Task[Outcome]:
        """Have a statement in flight, so that those who come now share the next one."""
        leader = self.call()
        await settle()
        self.batches.clear()
        return leader

    def release(self, which: int = 0) -> None:
        """Let a statement in flight end, the oldest if not told otherwise, and no other."""
        self.held[which].set()

    async def in_two_halves(self) -> list[asyncio.Task[Outcome]]:
        """Have two statements of 20 writes each in flight; return the calls in their order."""
        leader = await self.under_way()
        crowd = [self.call() for _ in range(40)]
        await settle()
        self.release()
        await leader
        await settle()
        assert self.sizes() == [20, 20]
        return crowd

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


async def settle() -> None:
    """Let every task run until it waits for something that only the test can give."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def statements() -> Statements:
    return Statements()


class TestQueue:
    """The queue alone, with statements that end when the test says so."""

    async def test_a_lonely_write_is_flushed_at_once(self, statements: Statements) -> None:
        statements.gate.set()
        assert await statements.call() == 1
        assert [len(batch) for batch in statements.batches] == [1]

    async def test_those_who_arrive_during_a_flush_share_the_next(self, statements: Statements) -> None:
        calls = [statements.call()]
        await settle()
        calls += [statements.call() for _ in range(10)]
        await settle()
        statements.gate.set()
        assert await asyncio.gather(*calls) == [1] + [2] * 10
        assert [len(batch) for batch in statements.batches] == [1, 10]

    async def test_one_who_flushes_alone_and_is_cancelled_disturbs_nobody(self, statements: Statements) -> None:
        first = statements.call()
        await settle()
        second = statements.call()
        await settle()
        first.cancel()
        statements.gate.set()
        assert await second == 2
        assert first.cancelled()
        assert statements.sizes() == [1, 1]

    async def test_one_of_a_batch_cancelled_in_flight_disturbs_nobody(self, statements: Statements) -> None:
        leader = await statements.under_way()
        first, second = statements.call(), statements.call()
        await settle()
        statements.release()
        await leader
        await settle()
        first.cancel()
        await settle()
        statements.gate.set()
        assert await second == 1
        assert first.cancelled()
        assert statements.sizes() == [2]

    async def test_a_write_cancelled_while_queued_is_never_sent(self, statements: Statements) -> None:
        first = statements.call()
        await settle()
        queued, other = statements.call(), statements.call()
        await settle()
        queued.cancel()
        statements.gate.set()
        await asyncio.gather(first, other)
        assert [len(batch) for batch in statements.batches] == [1, 1]

    async def test_writes_of_one_saga_keep_their_order_in_statements_of_their_own(self, statements: Statements) -> None:
        await statements.under_way()
        saga_id = uuid4()
        calls = [statements.call(saga_id, f'{{"n":{n}}}') for n in range(5)] + [statements.call()]
        await settle()
        statements.gate.set()
        assert await asyncio.gather(*calls) == [1, 2, 3, 4, 5, 1]
        contexts = [write.context for batch in statements.batches for write in batch if write.saga_id == saga_id]
        assert contexts == [f'{{"n":{n}}}' for n in range(5)]

    async def test_a_crowd_goes_in_two_statements_that_alternate(self, statements: Statements) -> None:
        """While the server works on one half, the other half's callers are answered, and come back."""
        crowd = await statements.in_two_halves()

        statements.release()
        await asyncio.gather(*crowd[:20])
        again = [statements.call() for _ in range(20)]
        await settle()

        assert statements.sizes() == [20, 20, 20]
        assert not any(call.done() for call in crowd[20:] + again)
        statements.gate.set()
        await asyncio.gather(*crowd, *again)

    async def test_the_two_statements_get_equal_shares(self, statements: Statements) -> None:
        """One that took all that is queued could leave the other with next to nothing, and they would take turns."""
        crowd = await statements.in_two_halves()
        more = [statements.call() for _ in range(40)]
        await settle()

        statements.release()
        await settle()
        assert statements.sizes() == [20, 20, 30]  # half of those in flight and queued
        statements.release()
        await settle()
        assert statements.sizes() == [20, 20, 30, 10]
        statements.gate.set()
        await asyncio.gather(*crowd, *more)

    async def test_a_few_wait_for_a_crowd_in_flight(self, statements: Statements) -> None:
        """A second statement is begun for a crowd only, and for no less than half of what is in flight."""
        leader = await statements.under_way()
        crowd = [statements.call() for _ in range(15)]
        await settle()
        statements.release()
        await leader
        few = [statements.call() for _ in range(7)]
        await settle()
        assert statements.sizes() == [15]

        few.append(statements.call())
        await settle()
        assert statements.sizes() == [15, 8]
        statements.gate.set()
        await asyncio.gather(*crowd, *few)

    async def test_a_saga_in_flight_has_no_write_in_the_other_statement(self, statements: Statements) -> None:
        crowd = await statements.in_two_halves()
        sagas = [write.saga_id for write in statements.batches[0]]
        again = [statements.call(saga_id) for saga_id in sagas]
        await settle()
        statements.release(1)
        await asyncio.gather(*crowd[20:])
        await settle()
        assert statements.sizes() == [20, 20]

        statements.gate.set()
        await asyncio.gather(*crowd, *again)
        assert [write.saga_id for batch in statements.batches[2:] for write in batch] == sagas

    async def test_one_of_two_flushes_that_fails_leaves_the_other_alone(self, statements: Statements) -> None:
        crowd = await statements.in_two_halves()
        statements.error = StorageUnavailableError("no memory", "53200")
        statements.guilty = {write.saga_id for write in statements.batches[0]}
        statements.gate.set()
        outcomes = await asyncio.gather(*crowd, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StorageUnavailableError] * 20 + [int] * 20

    async def test_batches_are_bounded_by_rows(self, statements: Statements, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_BATCH_ROWS", 10)
        await statements.under_way()
        calls = [statements.call() for _ in range(25)]
        await settle()
        statements.gate.set()
        await asyncio.gather(*calls)
        assert statements.sizes() == [10, 10, 5]

    async def test_batches_are_bounded_by_bytes_but_never_empty(
        self, statements: Statements, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_BATCH_BYTES", 100)
        await statements.under_way()
        calls = [statements.call(context="x" * size) for size in (40, 40, 40, 500, 10)]
        await settle()
        statements.gate.set()
        await asyncio.gather(*calls)
        assert [[len(write.context or "") for write in batch] for batch in statements.batches] == [
            [40, 40],
            [40],
            [500],
            [10],
        ]

    async def test_one_who_comes_while_a_connection_is_given_back_is_flushed(self, statements: Statements) -> None:
        leader = await statements.under_way()
        call = statements.call()
        statements.returning.clear()
        await settle()
        statements.gate.set()
        await asyncio.gather(leader, call)
        await settle()

        assert await statements.call() == 2
        statements.returning.set()
        await settle()

    async def test_only_what_was_left_out_is_told(self, statements: Statements) -> None:
        """Those that were written are answered by the first statement, whatever becomes of the second."""
        await statements.under_way()
        sagas = [uuid4() for _ in range(6)]
        statements.refused = set(sagas[:2])
        calls = [statements.call(saga_id) for saga_id in sagas]
        await settle()
        statements.gate.set()
        outcomes = await asyncio.gather(*calls)
        assert [type(outcome) for outcome in outcomes] == [SagaNotFoundError] * 2 + [int] * 4
        assert statements.sizes() == [6]
        assert statements.told == [sagas[:2]]

    @pytest.mark.parametrize("alone", [True, False])
    async def test_what_can_t_be_told_fails_nobody_else(self, statements: Statements, *, alone: bool) -> None:
        if not alone:
            await statements.under_way()
        refused = uuid4()
        statements.refused = {refused}
        statements.telling_fails = UnknownOutcomeError(refused)
        calls = [statements.call(refused), *[statements.call() for _ in range(0 if alone else 4)]]
        await settle()
        statements.gate.set()
        first, *others = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(first, UnknownOutcomeError)
        assert all(isinstance(outcome, int) for outcome in others)

    async def test_a_batch_that_fails_for_one_writes_sake_is_split(self, statements: Statements) -> None:
        await statements.under_way()
        calls = {saga_id: statements.call(saga_id) for saga_id in (uuid4() for _ in range(8))}
        await settle()
        guilty = list(calls)[5]
        statements.guilty = {guilty}
        statements.error = StorageUnavailableError("too deep for the stack", "54001")
        statements.gate.set()
        answers = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
        assert isinstance(answers.pop(guilty), StorageUnavailableError)
        assert all(isinstance(answer, int) for answer in answers.values())

    @pytest.mark.parametrize(
        "error",
        [
            StorageUnavailableError("no connection"),
            StorageUnavailableError("disk full", "53100"),
            StorageUnavailableError("read-only", "25006"),
            SchemaError(None, "saga_store_0001"),
        ],
        ids=str,
    )
    async def test_a_batch_that_fails_for_all_is_tried_once(
        self, statements: Statements, error: SagaStoreError
    ) -> None:
        """Each caller gets an error of its own, with the cause."""
        error.__cause__ = OSError("gone")
        leader = await statements.under_way()
        calls = [statements.call() for _ in range(4)]
        await settle()
        statements.error = error
        statements.gate.set()
        answers = await asyncio.gather(*calls)
        assert statements.sizes() == [4]
        with pytest.raises(type(error)):
            await leader
        assert len({id(answer) for answer in answers}) == 4
        for answer in answers:
            assert isinstance(answer, type(error))
            assert str(answer) == str(error)
            assert answer.__cause__ is error.__cause__

    async def test_an_unknown_outcome_names_each_callers_own_saga(self, statements: Statements) -> None:
        leader = await statements.under_way()
        calls = {saga_id: statements.call(saga_id) for saga_id in (uuid4(), uuid4())}
        await settle()
        statements.release()
        await leader
        statements.error = UnknownOutcomeError(uuid4())
        statements.gate.set()
        for saga_id, call in calls.items():
            answer = await call
            assert isinstance(answer, UnknownOutcomeError)
            assert answer.saga_id == saga_id

    async def test_a_bug_reaches_every_caller_and_the_queue_goes_on(self, statements: Statements) -> None:
        leader = await statements.under_way()
        calls = [statements.call(), statements.call()]
        await settle()
        statements.bug = ZeroDivisionError()
        statements.gate.set()
        for call in (leader, *calls):
            with pytest.raises(ZeroDivisionError):
                await call
        statements.bug = None
        assert await statements.call() == 2

    async def test_a_locked_row_is_put_aside(self, statements: Statements) -> None:
        locked = uuid4()
        statements.locked = {locked}
        statements.gate.set()
        stuck, behind = statements.call(locked), statements.call(locked)
        await asyncio.gather(*(statements.call() for _ in range(3)))
        assert not stuck.done()
        assert {saga_id for told in statements.told for saga_id in told} == {locked}

        statements.locked = set()
        assert await stuck == 99
        assert isinstance(await behind, int)

    @pytest.mark.parametrize("started", [True, False])
    async def test_a_caller_that_gives_up_on_a_locked_row_lets_the_next_one_try(
        self, statements: Statements, *, started: bool
    ) -> None:
        locked = uuid4()
        statements.locked = {locked}
        statements.gate.set()
        stuck, behind = statements.call(locked), statements.call(locked)
        # It is put aside in the same turn of the loop in which the answer is read.
        for _ in range(20 if started else 2):
            await asyncio.sleep(0)
        statements.locked = set()
        stuck.cancel()
        assert await behind == 2

    async def test_what_is_locked_is_tried_again_in_one_statement(self, statements: Statements) -> None:
        """However many there are, they need a connection for a moment now and then."""
        ids = [uuid4() for _ in range(100)]
        statements.locked = set(ids)
        statements.gate.set()
        stuck = [statements.call(saga_id) for saga_id in ids]
        await settle()
        await until(lambda: len(statements.told[-1]) == 100)
        assert isinstance(await statements.call(), int)
        statements.locked = set()
        assert await asyncio.gather(*stuck) == [99] * 100

    async def test_nothing_is_kept_when_all_is_done(self, statements: Statements) -> None:
        statements.gate.set()
        ids = [uuid4() for _ in range(10)]
        statements.locked = set(ids[:5])
        calls = [statements.call(saga_id) for saga_id in ids * 3]
        await settle()
        statements.locked = set()
        await asyncio.gather(*calls)
        await settle()
        [queue] = statements.group._queues.values()  # noqa: SLF001 - there is no other way to see a leak
        names = ("_first", "_ready", "_locked", "_flushers", "_in_flight", "_tasks")
        assert not any(getattr(queue, name) for name in names)
        assert queue.is_idle()


class TestHeldConnection:
    """A flusher keeps its connection while it has more to flush."""

    @pytest.fixture(params=["asyncpg", "psycopg"])
    def driver(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    async def crowd(self, storage: SqlAlchemySagaStorage, sagas: int = 40, steps: int = 10) -> None:
        async def one() -> None:
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            for number in range(steps):
                await storage.log_step(saga_id, str(number), "act", SagaStepStatus.COMPLETED)

        await asyncio.gather(*(one() for _ in range(sagas)))

    async def test_it_is_taken_once_for_many_statements(self, make_engine: MakeEngine, driver: str) -> None:
        engine = make_engine(driver)
        checkouts = []
        event.listen(engine.sync_engine, "checkout", lambda *_: checkouts.append(1))
        await self.crowd(SqlAlchemySagaStorage(engine))
        # One who flushes alone, and two who share the crowd: now and then they find nothing to flush, and end.
        assert len(checkouts) < 11

    async def test_everybody_else_gets_one_of_a_small_pool(self, make_engine: MakeEngine, driver: str) -> None:
        """While a crowd writes without a pause, a read doesn't wait for its end."""
        engine = make_engine(driver, pool_size=1, max_overflow=0)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        crowd = asyncio.create_task(self.crowd(storage, steps=40))
        await asyncio.sleep(0)
        for _ in range(5):
            await storage.get_saga(saga_id)
        assert not crowd.done()
        await crowd

    async def test_it_is_given_back_now_and_then(
        self, make_engine: MakeEngine, driver: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that what the pool does to a connection, such as replacing an old one, isn't put off for ever."""
        monkeypatch.setattr(pooled, "_MOST_STATEMENTS_HELD", 2)
        engine = make_engine(driver)
        checkouts = []
        event.listen(engine.sync_engine, "checkout", lambda *_: checkouts.append(1))
        await self.crowd(SqlAlchemySagaStorage(engine))
        assert len(checkouts) > 8

    async def test_one_that_dies_is_replaced(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        """Those whose answers got lost are told so, and whoever comes next doesn't notice."""
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine)
        crowd = asyncio.create_task(self.crowd(storage, steps=100))
        while not crowd.done():
            admin.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            await asyncio.wait([crowd], timeout=0.2)
        with contextlib.suppress(UnknownOutcomeError):
            await crowd
        await self.crowd(storage)

    async def test_an_engine_that_is_disposed_of_at_once_leaves_nothing_open(
        self, make_engine: MakeEngine, driver: str, admin: psycopg.Connection
    ) -> None:
        engine = make_engine(driver)
        await self.crowd(SqlAlchemySagaStorage(engine))
        await engine.dispose()
        await settle()
        mine = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        await until(lambda: admin.execute(mine).fetchone() == (0,))


class TestLoops:
    def test_a_loop_that_ends_with_writes_queued_cancels_them(self) -> None:
        """The callers aren't left waiting, and the storage works in the next loop."""
        statements: list[Statements] = []
        calls: list[asyncio.Task[Outcome]] = []

        async def leave() -> None:
            statements.append(Statements())
            calls.extend(statements[0].call() for _ in range(3))
            await settle()
            calls.append(statements[0].call())
            await settle()

        async def again() -> Outcome:
            statements[0].gate = asyncio.Event()
            statements[0].gate.set()
            return await statements[0].call()

        asyncio.run(leave())
        assert all(call.cancelled() for call in calls)
        assert asyncio.run(again()) == 2

    async def test_a_second_loop_is_refused_while_the_first_is_open(self, statements: Statements) -> None:
        """Engines of SQLAlchemy belong to one loop; the error says what to make instead."""
        statements.gate.set()
        assert await statements.call() == 1

        async def elsewhere() -> Outcome:
            return await statements.call()

        with pytest.raises(StorageUnavailableError, match="make an engine and a storage for each"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        assert await statements.call() == 2


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
class TestOnPostgreSQL:
    async def test_a_create_followed_at_once_by_an_update(self, make_engine: MakeEngine, driver: str) -> None:
        storage = SqlAlchemySagaStorage(make_engine(driver))
        saga_id = uuid4()
        await asyncio.gather(
            storage.create_saga(saga_id, "order", {}),
            storage.update_context(saga_id, {"n": 1}, expected_version=1),
            storage.update_status(saga_id, SagaStatus.RUNNING, expected_version=2),
        )
        assert (await storage.get_saga(saga_id)).version == 3

    async def test_every_write_of_a_batch_has_its_own_outcome(self, make_engine: MakeEngine, driver: str) -> None:
        storage = SqlAlchemySagaStorage(make_engine(driver))
        known, fresh, missing = uuid4(), uuid4(), uuid4()
        await storage.create_saga(known, "order", {})
        step = LogStep("pay", "act", SagaStepStatus.STARTED)
        answers = await asyncio.gather(
            storage.save(Checkpoint(fresh, name="order", steps=[step])),
            storage.save(Checkpoint(known, context={}, steps=[step], expected_version=7)),
            storage.save(Checkpoint(known, status=SagaStatus.RUNNING)),
            storage.save(Checkpoint(known, name="order")),
            storage.save(Checkpoint(missing, context={}, steps=[step])),
            storage.save(Checkpoint(known, steps=[step, step])),
            return_exceptions=True,
        )
        kinds = [answer if isinstance(answer, int) else type(answer) for answer in answers]
        assert kinds == [1, SagaConcurrencyError, 2, SagaAlreadyExistsError, SagaNotFoundError, 2]
        assert len(await storage.get_step_history(known)) == 2
        assert len(await storage.get_step_history(fresh)) == 1

    async def test_a_forgotten_transaction_stalls_no_other_saga(self, make_engine: MakeEngine, driver: str) -> None:
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine)
        held, other = uuid4(), uuid4()
        await asyncio.gather(storage.create_saga(held, "order", {}), storage.create_saga(other, "order", {}))
        async with AsyncSession(engine) as forgotten:
            await SqlAlchemySagaStorage(forgotten).update_context(held, {"n": 1})
            stuck = asyncio.create_task(storage.update_context(held, {"n": 2}))
            for n in range(10):
                await storage.update_context(other, {"n": n})
            assert not stuck.done()
            await forgotten.commit()
        await stuck
        assert (await storage.get_saga(held)).context == {"n": 2}
        assert (await storage.get_saga(held)).version == 3

    async def test_a_creation_that_is_not_committed_stalls_no_other_saga(
        self, make_engine: MakeEngine, driver: str
    ) -> None:
        """An INSERT can't skip an id that somebody is creating; it goes apart, and the others are written."""
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine)
        held, other = uuid4(), uuid4()
        await storage.create_saga(other, "order", {})
        async with AsyncSession(engine) as forgotten:
            await SqlAlchemySagaStorage(forgotten).create_saga(held, "order", {})
            stuck = asyncio.create_task(storage.create_saga(held, "order", {}))
            await asyncio.gather(
                *(storage.create_saga(uuid4(), "order", {}) for _ in range(5)),
                storage.update_context(other, {"n": 1}),
                storage.update_status(uuid4(), SagaStatus.RUNNING),
                return_exceptions=True,
            )
            assert (await storage.get_saga(other)).version == 2
            assert not stuck.done()
            await forgotten.rollback()
        await stuck
        assert (await storage.get_saga(held)).version == 1

    async def test_a_lost_connection_is_told_to_every_caller(self, database: Database, driver: str) -> None:
        ids = [uuid4() for _ in range(10)]
        async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url) as engine:
            storage = SqlAlchemySagaStorage(engine)
            for _ in range(8):
                await storage.create_saga(uuid4(), "order", {})
            proxy.let_pass, proxy.cut = 1, Cut.BEFORE_ANSWER  # the first caller flushes alone
            first, *answers = await asyncio.gather(
                *(storage.create_saga(saga_id, "order", {}) for saga_id in [uuid4(), *ids]), return_exceptions=True
            )
        assert first is None
        assert [getattr(answer, "saga_id", None) for answer in answers] == ids
        assert {type(answer) for answer in answers} == {UnknownOutcomeError}

    async def test_an_exhausted_pool_is_told_to_every_caller(self, make_engine: MakeEngine, driver: str) -> None:
        engine = make_engine(driver, pool_size=1, max_overflow=0, pool_timeout=0.01)
        storage = SqlAlchemySagaStorage(engine)
        async with engine.connect():
            answers = await asyncio.gather(
                *(storage.create_saga(uuid4(), "order", {}) for _ in range(5)), return_exceptions=True
            )
        assert {type(answer) for answer in answers} == {StorageUnavailableError}
        await storage.create_saga(uuid4(), "order", {})

    async def test_a_deadlock_is_retried(self, database: Database, make_engine: MakeEngine, driver: str) -> None:
        """Two transactions that create the same ids crosswise: PostgreSQL kills one, and it is tried again."""
        engine = make_engine(driver)
        storage = SqlAlchemySagaStorage(engine, group_commit=False)
        first, second = sorted([uuid4(), uuid4()])
        async with AsyncSession(engine) as session:
            joined = SqlAlchemySagaStorage(session)
            await joined.create_saga(second, "order", {})
            batch = [Write(first, name="order", context="{}"), Write(second, name="order", context="{}")]
            writer = Writer(Executor(EngineBind(engine, None).target(writes=True), 5, News()), resolves=True)
            crosswise = asyncio.create_task(writer.explain(batch, waits=True))
            await until_blocked(database)
            [refusal] = await asyncio.gather(joined.create_saga(first, "order", {}), return_exceptions=True)
            if refusal is None:
                await session.commit()
            else:
                await session.rollback()
            outcomes = await crosswise
        # Whichever of the two PostgreSQL chose: a transaction of the caller's isn't retried, a batch is.
        assert refusal is None or getattr(refusal, "sqlstate", None) == "40P01"
        assert [isinstance(outcome, int | SagaAlreadyExistsError) for outcome in outcomes] == [True, True]
        assert (await storage.get_saga(first)).version == (await storage.get_saga(second)).version == 1


class TestStorm:
    async def test_a_storm_with_bad_writes_and_cancelled_callers(self, make_engine: MakeEngine) -> None:
        """20,000 checkpoints from 500 tasks, 5% bad and 5% cancelled: every good one is there exactly once.

        Each task owns a saga and logs the numbers 0, 1, 2, ... to it; a cancelled one may or may not be there.
        """
        engine = make_engine("asyncpg")
        storage = SqlAlchemySagaStorage(engine)
        acknowledged: dict[UUID, list[int]] = {}
        cancelled: dict[UUID, set[int]] = {}

        async def good(saga_id: UUID, number: int) -> None:
            step = LogStep(str(number), "act", SagaStepStatus.COMPLETED)
            await storage.save(Checkpoint(saga_id, context={"n": number}, steps=[step]))
            acknowledged[saga_id].append(number)

        async def bad(saga_id: UUID, number: int) -> None:
            step = LogStep("bad", "act", SagaStepStatus.FAILED)
            wrong, error = [
                (Checkpoint(uuid4(), context={}, steps=[step]), SagaNotFoundError),
                (Checkpoint(saga_id, context={}, steps=[step], expected_version=-1), SagaConcurrencyError),
                (Checkpoint(saga_id, name="again", steps=[step]), SagaAlreadyExistsError),
            ][number % 3]
            with pytest.raises(error):
                await storage.save(wrong)

        async def worker() -> None:
            saga_id = uuid4()
            acknowledged[saga_id], cancelled[saga_id] = [], set()
            await storage.create_saga(saga_id, "storm", {})
            for number in range(39):
                if number % 20 == 7:
                    await bad(saga_id, number)
                elif number % 20 == 13:
                    task = asyncio.create_task(good(saga_id, number))
                    for _ in range(number % 5):
                        await asyncio.sleep(0)
                    cancelled[saga_id].add(number)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                else:
                    await good(saga_id, number)

        tracemalloc.start()
        await asyncio.gather(*(worker() for _ in range(100)))
        after_warm_up = tracemalloc.get_traced_memory()[0]
        await asyncio.gather(*(worker() for _ in range(400)))
        growth = tracemalloc.get_traced_memory()[0] - after_warm_up
        tracemalloc.stop()

        for saga_id, numbers in acknowledged.items():
            history = [int(entry.step_name) for entry in await storage.get_step_history(saga_id)]
            assert history == sorted(history)
            assert len(set(history)) == len(history)
            assert set(numbers) <= set(history) <= set(numbers) | cancelled[saga_id]
        # What the test itself remembers of 400 more sagas is about a megabyte.
        assert growth < 5_000_000
