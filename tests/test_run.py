"""Runs, whose callers are cancelled, time out, share them, and commit them with other rows.

What can happen between a buffer and the row. A commit freezes the buffer: from then on it is a write with an id and an
expected version, *sent*, until it is known what came of it.

1. It is refused, or nothing was sent: everything is one buffer again.
2. The caller is cancelled, times out, or gets UnknownOutcomeError, before the statement is executed, in the middle of
   it, or after it: it stays sent. The next commit sends the same again, first of all. It is written then, or the row
   has its id; what was buffered in between follows as a write of its own, which expects what the first has led to.
3. As 2, and the first attempt arrives only after the second: it is refused by the version, or by the id if only
   entries were logged.
4. As 2, and somebody else has written in between: both are refused.
5. As 2, then ``rollback()``: it isn't sent again. If it arrived, the fence goes on from it, else from where it was.

Between tasks: whoever buffers, reads or commits has the turn. An entry that is logged while another task commits is
part of the next commit. A heartbeat waits for the turn as well.

With ``commit(into=...)`` the write is sent in a transaction of the caller's, and shares its fate:

6. ROLLBACK, of it all or to a savepoint from before; the connection is lost before COMMIT was sent; a session is
   closed: SQLAlchemy tells at once, and it is buffered again.
7. COMMIT of a session, and it says so afterwards: the run goes on from there.
8. COMMIT of a connection: SQLAlchemy tells before it is sent. The version goes on, and the next call looks at the row.
9. COMMIT fails, or its answer gets lost: the next call looks. If the id isn't there, it may yet come, as in 3. So it
   stays sent, and is sent again: by the run's own storage, or in the next transaction.
10. The transaction is open: a commit elsewhere would wait for the row's lock, which the same task may hold, so it is
    refused. Heartbeats are left out. Others, such as an operator, wait for the lock.
11. A heartbeat was sent before it was known that 8 or 9 was a commit: it is refused by the version. The run looks,
    finds its own id, and sends the heartbeat again with the version that it led to.
12. A savepoint that was set after the write is rolled back: the write stays.

When the run is left, whoever leaves may be cancelled once, or again at every await. The release is a task of its own,
which nobody cancels; whoever leaves waits for it, and then goes on being cancelled.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from saga_store import (
    InvalidSagaDataError,
    SagaConcurrencyError,
    SagaRun,
    SagaStatus,
    SagaStepStatus,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from tests.connections import engine_on, until_blocked, until_returned
from tests.databases import Database
from tests.proxy import Cut, Proxy
from tests.scene import NEVER, Scene, until
from tests.test_cancellation import CancelledAt
from tests.test_contract import DRIVERS

HOUR = timedelta(hours=1)
COMPLETED = SagaStepStatus.COMPLETED


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def engine(driver: str, make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    return make_engine(driver, pool_size=4, max_overflow=0)


async def log(run: SagaRun, *names: str) -> None:
    for name in names:
        await run.log_step(run.saga_id, name, "act", COMPLETED)


async def steps_of(storage: SagaStorage | SagaRun, saga_id: UUID) -> list[str]:
    return [entry.step_name for entry in await storage.get_step_history(saga_id)]


async def new_saga(storage: SagaStorage) -> UUID:
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {})
    return saga_id


async def cancel_at(suspension: int, call: Callable[[], Awaitable[object]], *, answered: bool) -> bool:
    """Make a call, cancelled at one of its suspensions; whether it has so many."""
    cancelled = CancelledAt(suspension, answered)

    async def make() -> None:
        await cancelled.run(call())  # type: ignore[arg-type] # a coroutine

    with suppress(asyncio.CancelledError):
        await asyncio.ensure_future(make())
    return cancelled.reached


class TestCommitAgain:
    """Rows of one buffer come once, however often its commit was cut short."""

    @pytest.mark.parametrize("options", [{}, {"group_commit": False}, {"retry_for": NEVER}], ids=str)
    @pytest.mark.parametrize("what", ["entries", "status", "creation"])
    async def test_a_cancelled_commit_is_made_again(
        self, what: str, options: dict[str, Any], engine: AsyncEngine
    ) -> None:
        """Cancelled anywhere, with more buffered in between, and made again: everything is there once, in order."""
        storage = SqlAlchemySagaStorage(engine, **options)
        reached, suspension = True, 0
        while reached:
            for answered in (False, True):
                saga_id = uuid4() if what == "creation" else await new_saga(storage)
                async with storage.run(saga_id) as run:
                    if what == "creation":
                        await run.create_saga(saga_id, "order", {"n": 1})
                    await log(run, "one", "two")
                    if what == "status":
                        await run.update_status(saga_id, SagaStatus.RUNNING)
                    reached = await cancel_at(suspension, run.commit, answered=answered)
                    await log(run, "three")
                    assert await steps_of(run, saga_id) == ["one", "two", "three"]
                    await run.commit()
                    assert await steps_of(run, saga_id) == ["one", "two", "three"]
                    saga = await storage.get_saga(saga_id)
                    assert run.version == saga.version == (2 if what == "status" else 1)
                assert await steps_of(storage, saga_id) == ["one", "two", "three"]
            suspension += 1
        assert suspension > 1

    @pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER, Cut.STRANDED])
    @pytest.mark.parametrize("changes", [False, True], ids=["entries", "status"])
    async def test_after_an_unknown_outcome(self, changes: bool, cut: Cut, driver: str, database: Database) -> None:  # noqa: FBT001 - a parameter
        """Whatever came of what was lost, the same is sent again: it comes once, also if the first attempt is late."""
        async with Scene.on(database, driver, retry_for=NEVER) as scene:
            run = scene.storage.run(scene.saga_id)
            async with run:
                await log(run, "one")
                if changes:
                    await run.update_status(scene.saga_id, SagaStatus.RUNNING)
                scene.proxy.cut = cut
                with pytest.raises(UnknownOutcomeError):
                    await run.commit()
                await log(run, "two")
                assert await steps_of(run, scene.saga_id) == ["one", "two"]
                await run.commit()
                await scene.proxy.deliver()
                assert await scene.steps() == await steps_of(run, scene.saga_id) == ["one", "two"]
                assert run.version == (await scene.saga()).version == 1 + changes

    async def test_somebody_else_was_faster(self, driver: str, database: Database) -> None:
        """If what was lost never arrived, and somebody else wrote, everything is refused, and is one buffer again."""
        async with Scene.on(database, driver, retry_for=NEVER) as scene, scene.storage.run(scene.saga_id) as run:
            await log(run, "one")
            scene.proxy.cut = Cut.BEFORE_SENDING
            with pytest.raises(UnknownOutcomeError):
                await run.commit()
            await scene.write_meanwhile(1)
            await log(run, "two")
            with pytest.raises(SagaConcurrencyError):
                await run.commit()
            assert await scene.steps() == ["theirs"]
            await run.rollback()
            await log(run, "three")
            await run.commit()
            assert await scene.steps() == ["theirs", "three"]

    async def test_many_entries_of_one_version(self, driver: str, database: Database) -> None:
        """When a row has no room for the ids of log entries, a commit that was lost stays unknown, and comes once."""
        async with Scene.on(database, driver, retry_for=NEVER) as scene, scene.storage.run(scene.saga_id) as run:
            for number in range(40):
                await log(run, str(number))
                await run.commit()
            await log(run, "lost")
            scene.proxy.cut = Cut.BEFORE_ANSWER
            for _ in range(3):
                with pytest.raises(UnknownOutcomeError):
                    await run.commit()
            assert (await scene.steps()).count("lost") == 1
            await run.rollback()

    @pytest.mark.parametrize("arrives", [False, True])
    async def test_what_was_dropped_is_not_sent_again(self, arrives: bool, driver: str, database: Database) -> None:  # noqa: FBT001 - a parameter
        """After a rollback the run goes on from what was lost if it arrived, lease and all, and doesn't repeat it."""
        async with Scene.on(database, driver, retry_for=NEVER) as scene:
            async with scene.storage.run(scene.saga_id, owner="me", lease=HOUR) as run:
                await run.update_status(scene.saga_id, SagaStatus.RUNNING)
                await log(run, "lost")
                scene.proxy.cut = Cut.BEFORE_ANSWER if arrives else Cut.BEFORE_SENDING
                with pytest.raises(UnknownOutcomeError):
                    await run.commit()
                await run.rollback()
                status, _ = await run.load_saga_state(scene.saga_id)
                assert status is (SagaStatus.RUNNING if arrives else SagaStatus.PENDING)
                await log(run, "after")
                await run.commit()
                assert await run.holds_lease()
            assert await scene.steps() == (["lost", "after"] if arrives else ["after"])
            assert (await scene.saga()).lease_owner is None

    async def test_a_lost_commit_is_no_lost_lease(self, driver: str, database: Database) -> None:
        """A heartbeat after a commit whose answer got lost finds that it was the run's own."""
        async with Scene.on(database, driver, retry_for=NEVER) as scene:
            async with scene.storage.run(scene.saga_id, owner="me", lease=HOUR) as run:
                await run.update_status(scene.saga_id, SagaStatus.RUNNING)
                scene.proxy.cut = Cut.BEFORE_ANSWER
                with pytest.raises(UnknownOutcomeError):
                    await run.commit()
                await run.heartbeat()
                assert await run.holds_lease()
                await run.commit()
            assert (await scene.saga()).lease_owner is None


class TestTurns:
    """Several tasks use one run."""

    @pytest.mark.parametrize("write_ahead", [False, True])
    async def test_parallel_steps(self, write_ahead: bool, engine: AsyncEngine) -> None:  # noqa: FBT001 - a parameter
        """Eight steps in a TaskGroup leave sixteen entries, each step's in order."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)

        async def step(run: SagaRun, name: str) -> None:
            await run.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
            await run.commit()
            await run.log_step(saga_id, name, "act", COMPLETED)
            await run.commit()
            assert (await steps_of(run, saga_id)).count(name) == 2

        run = storage.run(saga_id, write_ahead=write_ahead, owner="me", lease=HOUR)
        async with run, asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(step(run, str(number)))
        history = await storage.get_step_history(saga_id)
        assert len(history) == 16
        for number in range(8):
            assert [entry.status for entry in history if entry.step_name == str(number)] == [
                SagaStepStatus.STARTED,
                COMPLETED,
            ]

    async def test_what_is_logged_during_a_commit(self, engine: AsyncEngine) -> None:
        """An entry that is logged while another task's commit waits for the row comes with the next commit."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run, engine.connect() as other:
            await log(run, "one")
            await other.execute(text("SELECT FROM saga_executions WHERE id = :id FOR UPDATE"), {"id": saga_id})
            commit = asyncio.create_task(run.commit())
            await _a_moment()
            logged = asyncio.create_task(log(run, "two"))
            await _a_moment()
            await other.rollback()
            await asyncio.gather(commit, logged)
            assert await steps_of(storage, saga_id) == ["one"]
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one", "two"]


async def _a_moment() -> None:
    for _ in range(10):
        await asyncio.sleep(0.005)


async def held_by(storage: SagaStorage, saga_id: UUID) -> str | None:
    return (await storage.get_saga(saga_id)).lease_owner


class TestLeaving:
    """The lease is released, whoever cancels."""

    @pytest.mark.parametrize("place", ["body", "leaving"])
    async def test_anyio_cancels_again_and_again(self, place: str, engine: AsyncEngine) -> None:
        """In a scope that cancels at every await the lease is released, and the scope ends as cancelled."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        reached = False
        with anyio.move_on_after(0.2) as scope:
            async with storage.run(saga_id, owner="me", lease=HOUR, renew=True) as run:
                await log(run, "one")
                await run.commit()
                if place == "body":
                    await anyio.sleep_forever()
                scope.cancel()
            await anyio.lowlevel.checkpoint()
            reached = True
        assert scope.cancelled_caught
        assert not reached
        assert await held_by(storage, saga_id) is None
        assert await steps_of(storage, saga_id) == ["one"]

    async def test_it_is_cancelled_while_others_share_its_statement(
        self, engine: AsyncEngine, database: Database, admin: psycopg.Connection
    ) -> None:
        """That goes on, and takes the lease later; whoever was entering waits for it, and gives it back."""
        storage = SqlAlchemySagaStorage(engine)
        first, slow, saga_id = [await new_saga(storage) for _ in range(3)]
        admin.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$"
        )
        admin.execute(
            f"CREATE TRIGGER slow BEFORE UPDATE ON saga_executions FOR EACH ROW WHEN (NEW.id = '{slow}') "
            "EXECUTE FUNCTION wait()".encode()
        )

        async def enter() -> None:
            async with storage.run(saga_id, owner="me", lease=HOUR):
                raise AssertionError

        admin.execute("SELECT pg_advisory_lock(1)")
        alone = asyncio.create_task(storage.update_context(first, {}))
        await asyncio.sleep(0)
        sharing, entering = asyncio.create_task(storage.update_context(slow, {})), asyncio.create_task(enter())
        await alone
        await until_blocked(database)
        entering.cancel()
        await asyncio.sleep(0.1)
        admin.execute("SELECT pg_advisory_unlock(1)")
        with pytest.raises(asyncio.CancelledError):
            await entering
        await sharing
        saga = await storage.get_saga(saga_id)
        assert saga.lease_owner is None
        assert saga.version > 2  # it was taken

    async def test_asyncio_times_out(self, engine: AsyncEngine) -> None:
        """A timeout inside the run is a TimeoutError outside, and the lease is released."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), storage.run(saga_id, owner="me", lease=HOUR):
                await asyncio.Event().wait()
        assert await held_by(storage, saga_id) is None

    async def test_it_is_cancelled_anywhere(self, engine: AsyncEngine) -> None:
        """Cancelled at each suspension of entering, working and leaving, the saga is free when the task has ended."""
        storage = SqlAlchemySagaStorage(engine)
        for suspension in range(1000):
            reached = False
            for answered in (False, True):
                saga_id = await new_saga(storage)

                async def work(saga_id: UUID = saga_id) -> None:
                    async with storage.run(saga_id, owner="me", lease=HOUR, renew=True) as run:
                        await log(run, "one")
                        await run.commit()

                reached |= await cancel_at(suspension, work, answered=answered)
                assert await held_by(storage, saga_id) is None
                assert await steps_of(storage, saga_id) in ([], ["one"])
            if not reached:
                break
        assert suspension > 2

    async def test_it_takes_its_time_and_no_more(
        self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """If somebody has locked the row for longer than leaving may take, a warning says so: the lease will expire."""
        monkeypatch.setattr("saga_store.run._MOST_SECONDS_TO_LEAVE", 0.2)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with engine.connect() as other:
            with anyio.move_on_after(0.1) as scope:
                async with storage.run(saga_id, owner="me", lease=HOUR):
                    await other.execute(text("SELECT FROM saga_executions WHERE id = :id FOR UPDATE"), {"id": saga_id})
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
        await until_returned(engine)
        [warning] = [record for record in caplog.records if record.name == "saga_store"]
        assert "couldn't be released in time" in warning.getMessage()
        assert str(saga_id) in warning.getMessage()

    async def test_a_leased_run_has_to_be_entered(self, engine: AsyncEngine) -> None:
        """Without `async with` nothing takes the lease: every call says so, and nothing is written."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        run = storage.run(saga_id, owner="me", lease=HOUR)
        for call in (log(run, "one"), run.commit(), run.heartbeat(), run.load_saga_state(saga_id)):
            with pytest.raises(InvalidSagaDataError, match="async with"):
                await call
        assert not await run.holds_lease()
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.lease_owner) == (1, None)


BUSINESS = "CREATE TABLE payments (id uuid PRIMARY KEY, saga_id uuid REFERENCES saga_executions, amount integer)"
CLOSES = "ALTER TABLE payments ADD CONSTRAINT one UNIQUE (amount) DEFERRABLE INITIALLY DEFERRED"

Opened = AsyncSession | AsyncConnection
OPENERS: dict[str, Callable[[AsyncEngine], AbstractAsyncContextManager[Opened]]] = {
    "session": AsyncSession,
    "connection": AsyncEngine.connect,
}


@pytest.fixture(params=OPENERS)
def opener(request: pytest.FixtureRequest) -> Callable[[AsyncEngine], AbstractAsyncContextManager[Opened]]:
    return OPENERS[request.param]


async def pay(into: Opened, saga_id: UUID, amount: int = 12) -> None:
    await into.execute(
        text("INSERT INTO payments VALUES (:id, :saga_id, :amount)"),
        {"id": uuid4(), "saga_id": saga_id, "amount": amount},
    )


def payments(admin: psycopg.Connection) -> int:
    [count] = admin.execute("SELECT count(*) FROM payments").fetchone() or (None,)
    assert isinstance(count, int)
    return count


Opener = Callable[[AsyncEngine], AbstractAsyncContextManager[Opened]]


class TestCommitInto:
    """A commit into a session or connection; what any transaction promises is in the kit."""

    @pytest.fixture(autouse=True)
    def business(self, admin: psycopg.Connection) -> None:
        admin.execute(BUSINESS)

    @pytest.mark.parametrize("commits", [True, False])
    async def test_beside_business_rows(
        self,
        commits: bool,  # noqa: FBT001 - a parameter
        opener: Opener,
        engine: AsyncEngine,
        admin: psycopg.Connection,
    ) -> None:
        """Both are there, or neither is, and the leased run goes on."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id, owner="me", lease=HOUR) as run:
            async with opener(engine) as into:
                await pay(into, saga_id)
                await run.update_context(saga_id, {"paid": True})
                await run.commit(into=into)
                await pay(into, saga_id, 13)
                await (into.commit() if commits else into.rollback())
            assert run.version == 2 + commits
            assert payments(admin) == (2 if commits else 0)
            assert (await storage.get_saga(saga_id)).context == ({"paid": True} if commits else {})
            await log(run, "after")
            await run.commit()
            assert await run.holds_lease()
        assert (await storage.get_saga(saga_id)).context == {"paid": True}
        assert await steps_of(storage, saga_id) == ["after"]

    async def test_savepoints(self, opener: Opener, engine: AsyncEngine) -> None:
        """One that was set before the commit takes it back; one that was set after it, or released, doesn't."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run, opener(engine) as into:
            outer = await into.begin_nested()
            inner = await into.begin_nested()
            await log(run, "one")
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.commit(into=into)
            await inner.commit()
            assert run.version == 2
            await outer.rollback()
            assert run.version == 1
            assert await run.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})
            await log(run, "two")
            await run.commit(into=into)
            later = await into.begin_nested()
            await log(run, "three")
            await run.commit(into=into)
            await later.rollback()
            assert run.version == 2
            assert await steps_of(run, saga_id) == ["one", "two", "three"]
            await into.commit()
            assert await steps_of(storage, saga_id) == ["one", "two"]
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one", "two", "three"]

    async def test_savepoints_that_nobody_tells_of(self, engine: AsyncEngine) -> None:
        """After a rollback by SQL of one's own the run looks, and its buffer isn't lost."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run, engine.connect() as into:
            await into.execute(text("SAVEPOINT mine"))
            await log(run, "one")
            await run.commit(into=into)
            await into.execute(text("ROLLBACK TO SAVEPOINT mine"))
            await into.commit()
            assert await steps_of(storage, saga_id) == []
            await run.commit()
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one"]

    async def test_a_session_that_joins_a_connection(self, engine: AsyncEngine) -> None:
        """What the session says is no more than a savepoint: the connection's transaction decides."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run:
            async with engine.connect() as connection:
                await connection.begin()
                async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                    await log(run, "one")
                    await run.commit(into=session)
                    await session.commit()
                await log(run, "two")
                with pytest.raises(InvalidSagaDataError):
                    await run.commit()
                await connection.rollback()
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one", "two"]

    @pytest.mark.parametrize("cut", [Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER])
    @pytest.mark.parametrize("again", ["own", "into", "heartbeat", "leave"])
    async def test_a_lost_commit(  # noqa: PLR0913, PLR0917 - parameters of the test, and fixtures
        self, again: str, cut: Cut, opener: Opener, driver: str, database: Database, admin: psycopg.Connection
    ) -> None:
        """When the answer to COMMIT is lost, the row tells: what is there is recognised, and the rest written once."""
        async with Scene.on(database, driver) as scene:
            saga_id, there = scene.saga_id, cut is Cut.BEFORE_ANSWER
            async with scene.storage.run(saga_id, owner="me", lease=HOUR) as run:
                await log(run, "one")
                await run.update_status(saga_id, SagaStatus.RUNNING)
                with suppress(SQLAlchemyError, OSError):
                    async with opener(scene.engine) as into:
                        await pay(into, saga_id)
                        await run.commit(into=into)
                        scene.proxy.cut = cut
                        await into.commit()
                        pytest.fail("the answer wasn't lost")
                await until(lambda: payments(admin) == there)
                if again == "own":
                    await run.commit()
                elif again == "into":
                    async with opener(scene.engine) as into:
                        await run.commit(into=into)
                        await into.commit()
                else:
                    assert await steps_of(run, saga_id) == ["one"]
                    assert run.version == (3 if there else 2)
                    if again == "heartbeat":
                        await run.heartbeat()
                        assert await run.holds_lease()
                if again in {"own", "into"}:
                    assert run.version == 3
                    await log(run, "two")
                    await run.commit()
                    assert await scene.steps() == ["one", "two"]
            saga = await scene.saga()
            assert saga.lease_owner is None
            assert (await scene.steps()).count("one") == (there or again in {"own", "into"})

    async def test_a_connection_that_is_lost(self, opener: Opener, driver: str, database: Database) -> None:
        """Lost before COMMIT was sent, nothing of it is there, and the buffer is."""
        async with Scene.on(database, driver) as scene, scene.storage.run(scene.saga_id) as run:
            await run.update_status(scene.saga_id, SagaStatus.RUNNING)
            with suppress(SQLAlchemyError, OSError, StorageUnavailableError):
                async with opener(scene.engine) as into:
                    await into.execute(text("SELECT 1"))
                    scene.proxy.cut = Cut.BEFORE_ANSWER
                    await run.commit(into=into)
            assert run.version == 1
            assert (await scene.saga()).version == 1
            await run.commit()
            assert run.version == (await scene.saga()).version == 2

    async def test_a_commit_that_fails(self, opener: Opener, engine: AsyncEngine, admin: psycopg.Connection) -> None:
        """A COMMIT that the server refuses has stored nothing; in the next transaction it is written."""
        admin.execute(CLOSES)
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            async with opener(engine) as into:
                await pay(into, saga_id)
                await pay(into, saga_id)
                await run.commit(into=into)
                with pytest.raises(IntegrityError):
                    await into.commit()
            assert await run.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})
            assert run.version == 1
            await log(run, "after")
            async with opener(engine) as into:
                await pay(into, saga_id)
                await run.commit(into=into)
                await into.commit()
            assert payments(admin) == 1
        assert await steps_of(storage, saga_id) == ["after"]
        assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING

    async def test_it_is_cancelled_anywhere(self, opener: Opener, engine: AsyncEngine) -> None:
        """Cancelled at each suspension of a commit and the transaction's own, and made again: it is there once."""
        storage = SqlAlchemySagaStorage(engine)
        for suspension in range(1000):
            reached = False
            for answered in (False, True):
                saga_id = await new_saga(storage)
                async with storage.run(saga_id, owner="me", lease=HOUR) as run:
                    await log(run, "one")

                    async def work(run: SagaRun = run) -> None:
                        async with opener(engine) as into:
                            await run.commit(into=into)
                            await into.commit()

                    reached |= await cancel_at(suspension, work, answered=answered)
                    await log(run, "two")
                    await run.commit()
                    assert await run.holds_lease()
                assert await steps_of(storage, saga_id) == ["one", "two"]
                assert await held_by(storage, saga_id) is None
            if not reached:
                break
        assert suspension > 2
        await until_returned(engine)

    async def test_what_is_refused(self, engine: AsyncEngine, driver: str, empty_database: Database) -> None:
        """Autocommit, another database, a storage that joins a transaction already: each is refused by name."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run, engine_on(empty_database.url(driver)) as elsewhere:
            await log(run, "one")
            async with engine.connect() as into:
                await into.execution_options(isolation_level="AUTOCOMMIT")
                with pytest.raises(InvalidSagaDataError, match="autocommit"):
                    await run.commit(into=into)
            async with AsyncSession(elsewhere) as session:
                with pytest.raises(InvalidSagaDataError, match="database"):
                    await run.commit(into=session)
            async with AsyncSession(engine) as session:
                with pytest.raises(InvalidSagaDataError, match="AsyncSession"):
                    await run.commit(into=session.sync_session)
                bound = SqlAlchemySagaStorage(session).run(saga_id)
                await log(bound, "two")
                with pytest.raises(InvalidSagaDataError, match="bound to"):
                    await bound.commit(into=session)
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one"]

    async def test_a_transaction_that_is_forgotten(self, engine: AsyncEngine) -> None:
        """A connection that nobody ends, and that is gone, keeps the run from nothing."""
        storage = SqlAlchemySagaStorage(engine)
        saga_id = await new_saga(storage)
        async with storage.run(saga_id) as run:
            await log(run, "one")
            into = AsyncSession(engine)
            await run.commit(into=into)
            await into.close()
            del into
            await run.commit()
        assert await steps_of(storage, saga_id) == ["one"]


async def test_a_repeated_commit_that_gets_no_connection_is_as_open_as_before(database: Database, driver: str) -> None:
    """It has written nothing, but the one before may have: that is no error that says that nothing was written."""
    one = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}
    async with Proxy.before(database.url(driver)) as (proxy, url), engine_on(url, **one) as engine:
        storage = SqlAlchemySagaStorage(engine, retry_for=timedelta())
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        for _ in range(8):  # until the driver has prepared what is to be lost
            async with storage.run(saga_id) as run:
                await run.log_step(saga_id, "warm", "act", SagaStepStatus.STARTED)
                await run.commit()
        async with storage.run(saga_id) as run:
            await run.log_step(saga_id, "mine", "act", SagaStepStatus.STARTED)
            proxy.cut = Cut.BEFORE_ANSWER
            with pytest.raises(UnknownOutcomeError):
                await run.commit()
            async with engine.connect():
                with pytest.raises(UnknownOutcomeError):
                    await run.commit()
            await run.commit()
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)].count("mine") == 1


async def test_a_repeated_commit_goes_on_until_it_is_told(database: Database, driver: str) -> None:
    """As any other write whose outcome is open, although an attempt fails that wouldn't be made again otherwise."""
    one = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}
    async with engine_on(database.url(driver), **one) as engine:
        storage = SqlAlchemySagaStorage(engine, retry_for=timedelta(seconds=30))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with storage.run(saga_id) as run:
            await run.log_step(saga_id, "mine", "act", SagaStepStatus.STARTED)
            first = asyncio.create_task(run.commit())
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            async with engine.connect():
                second = asyncio.create_task(run.commit())
                await asyncio.sleep(0.1)  # longer than the pool's patience
                assert not second.done()
            await second
        assert len(await storage.get_step_history(saga_id)) == 1
