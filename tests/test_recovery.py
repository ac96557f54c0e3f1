"""Recovery by failing: processes that are killed, stopped and continued, sagas that can't be recovered.

The interleavings. A worker is somewhere between these lines when it dies, or is stopped for longer than its lease:

1. before the claim's commit: nothing happened; the rows are unlocked with the connection.
2. after the claim, before the run is entered: leased to a dead owner, one attempt counted. Claimable when the lease
   has expired, and the pause after that attempt is over.
3. the run is entered: as 2, at the next version.
4. STARTED is committed (write-ahead), the step not done: in doubt. The next worker does the step.
5. the step is done, its outcome not committed: in doubt, too. The next worker does it again, so steps have to be
   repeatable; the unique key (saga, step, attempt) shows that it is another attempt.
6. the outcome is committed: the next worker skips the step.
7. COMPLETED or FAILED is committed: the lease went with it. Nobody claims the saga any more.

Who else is there:

- another claim at the same moment: each skips the rows that the other has locked, and after its commit sees the
  lease. A row that was claimed between another's snapshot and its lock is judged anew with the lock, and is left out.
- a zombie, stopped at 4 or 5 and continued after another worker went through 1 to 7: that one's entering and commits
  raised the version. The zombie's commit and heartbeat expect the old one, and are refused whole; leaving its run
  releases nothing, for that expects the version too.
- a zombie's effects in the world: between 4 and 5 nobody can stop it. What a service needs in order to refuse it is
  a key of its own, such as the attempt.
- a background renewal beside a commit of the same run: they take turns, since the commit raises the version.
- a claim by the same process, of a saga whose lease lapsed while its handler was at it: the claim has raised the
  version, so the handler is lost and is cancelled. The claim is given back, attempt and all, since nobody knows how
  soon the handler ends; another claim comes after ``stale_after``.
- a claim by the worker that has just taken the saga (``take``), before the lease of that run is written: both are in
  the worker's name, so the run takes the lease over from the claim, whose answer comes before or after that. The
  handler goes on, and the attempt counts. Whether the run came after the claim is seen by the versions.
- ``stop()`` between a claim and the first step of its task, while the run is entered, in the handler, or while the run
  is left: the task is never kept from beginning, for it alone gives back. Release and attempt are one write.
- a commit beside an operator's verb: the row's lock decides; whoever comes second is refused by the version (the
  operator looks again).
"""

import asyncio
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial, update_wrapper, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga_store import (
    InvalidSagaDataError,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaConcurrencyError,
    SagaExecution,
    SagaNotFoundError,
    SagaRun,
    SagaStatus,
    SagaStepStatus,
)
from saga_store.recovery import Handler, RecoveryWorker
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.write import Write
from tests.databases import Database
from tests.recovery_processes import TABLES

ROOT = Path(__file__).parent.parent
HOUR = timedelta(hours=1)
NOW = timedelta(0)

NEW_SAGAS = """
INSERT INTO saga_executions (id, name, status, context, updated_at)
SELECT gen_random_uuid(), 'order', (ARRAY['PENDING', 'RUNNING'])[1 + n %% 2],
    json_build_object('unshippable', n %% 5 = 0), now() - interval '1 hour'
FROM generate_series(1, %s) AS n
"""
# What time does to the leases of a worker that is gone.
EXPIRE = "UPDATE saga_executions SET lease_expires_at = now() - interval '1 second' WHERE lease_owner = %s"
UNFINISHED = "SELECT count(*) FROM saga_executions WHERE status NOT IN ('COMPLETED', 'FAILED')"


Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(database: Database) -> Iterator[Start]:
    """Start processes on the test's database; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(what: str, owner: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.recovery_processes", what, database.url("asyncpg"), owner]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(admin: psycopg.Connection, query: str, process: "subprocess.Popen[str] | None" = None) -> None:
    """Wait until the query gives a row."""
    give_up = time.monotonic() + 120
    while not admin.execute(query.encode()).fetchall():
        assert time.monotonic() < give_up, query
        assert process is None or process.poll() is None
        admin.execute("SELECT pg_sleep(0.02)")


def test_eight_processes_claim_ten_thousand_sagas(admin: psycopg.Connection, start: Start) -> None:
    """Each saga is claimed exactly once, by one of them, and none is left."""
    admin.execute(NEW_SAGAS, [10_000])
    begun = time.monotonic()
    processes = [start("claim", f"worker-{number}") for number in range(8)]
    claims = [process.communicate(timeout=120)[0].split() for process in processes]
    seconds = time.monotonic() - begun

    assert [process.returncode for process in processes] == [0] * 8
    claimed = Counter(saga_id for claim in claims for saga_id in claim)
    assert len(claimed) == 10_000
    assert set(claimed.values()) == {1}
    left = "SELECT count(*) FROM saga_executions WHERE lease_owner IS NULL OR recovery_attempts <> 1 OR version <> 2"
    assert admin.execute(left).fetchone() == (0,)
    print(f"\n10,000 sagas claimed by {sum(map(bool, claims))} of 8 processes in {seconds:.1f} s, start included")  # noqa: T201


def test_workers_that_are_killed_at_random_moments(admin: psycopg.Connection, start: Start) -> None:
    """200 sagas, 4 workers, killed and restarted: all sagas end, and no two workers were on one at a time."""
    admin.execute(TABLES)
    admin.execute(NEW_SAGAS, [200])
    workers = {f"worker-{number}": start("recover", f"worker-{number}") for number in range(4)}
    kills = 0
    while True:
        [effects] = admin.execute("SELECT count(*) FROM effects").fetchone() or [0]
        progress = random.randint(5, 40)  # noqa: S311 - a moment, not a secret
        wait_for(
            admin,
            f"SELECT 1 WHERE (SELECT count(*) FROM effects) >= {effects + progress} OR ({UNFINISHED}) = 0",  # noqa: S608 - our own numbers
        )
        if admin.execute(UNFINISHED).fetchone() == (0,):
            break
        owner = random.choice(list(workers))  # noqa: S311 - whoever it hits
        dead = workers.pop(owner)
        dead.kill()
        dead.wait()
        kills += 1
        # Its sessions may still finish what they were sent.
        wait_for(admin, f"SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = '{owner}')")  # noqa: S608 - our own name
        admin.execute(EXPIRE, [owner])
        workers[f"successor-{kills}"] = start("recover", f"successor-{kills}")

    for worker in workers.values():
        worker.terminate()
    # SIGTERM is a graceful end, but for one that is only just starting.
    assert {worker.wait(60) for worker in workers.values()} <= {0, -signal.SIGTERM}
    assert kills > 3
    statuses = admin.execute("SELECT context ->> 'unshippable', status, count(*) FROM saga_executions GROUP BY 1, 2")
    assert set(statuses.fetchall()) == {("false", "COMPLETED", 160), ("true", "FAILED", 40)}
    assert admin.execute("SELECT count(*) FROM saga_executions WHERE lease_owner IS NOT NULL").fetchone() == (0,)
    overlaps = admin.execute(
        "SELECT a.saga_id, a.owner, b.owner FROM work a JOIN work b ON a.saga_id = b.saga_id AND a.attempt < b.attempt "
        "WHERE b.begun <= a.seen"
    )
    assert overlaps.fetchall() == []
    # Whatever was done was done: every step of every saga, those of unshippable ones undone.
    missing = admin.execute(
        "SELECT e.id, step FROM saga_executions e CROSS JOIN unnest(CASE WHEN e.status = 'FAILED' "
        "THEN ARRAY['reserve', 'pay', 'ship', 'undo pay', 'undo reserve'] ELSE ARRAY['reserve', 'pay', 'ship'] END) "
        "AS step WHERE NOT EXISTS (SELECT FROM effects f WHERE f.saga_id = e.id AND f.step = step)"
    )
    assert missing.fetchall() == []
    [again] = admin.execute("SELECT count(*) FROM work WHERE attempt > 1").fetchone() or [0]
    print(f"\n200 sagas seen through with {kills} kills; {again} times somebody else had to go on")  # noqa: T201


async def test_a_zombie_writes_nothing(admin: psycopg.Connection, start: Start, engine: AsyncEngine) -> None:
    """A worker stopped beyond its lease is refused when it goes on; the history has nothing of it."""
    admin.execute(TABLES)
    storage = SqlAlchemySagaStorage(engine)
    saga_id = uuid4()
    await storage.create_saga(saga_id, "order", {"unshippable": False})
    zombie = start("hang", "zombie")
    wait_for(admin, "SELECT 1 FROM effects", zombie)
    zombie.send_signal(signal.SIGSTOP)
    os.waitpid(zombie.pid, os.WUNTRACED)  # noqa: ASYNC222 - nothing else is to happen meanwhile

    admin.execute(EXPIRE, ["zombie"])
    [claimed] = await storage.claim_sagas(owner="other", lease=HOUR, limit=1, stale_after=NOW, backoff=NOW)
    assert claimed.id == saga_id
    [in_doubt] = await storage.get_in_doubt_steps(saga_id)
    assert in_doubt.step_name == "pay"
    async with storage.run(saga_id, owner="other", lease=HOUR) as run:
        await run.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED, "by the other")
        await run.update_status(saga_id, SagaStatus.COMPLETED)
        await run.commit()
    saga, history = await storage.get_saga(saga_id), await storage.get_step_history(saga_id)

    zombie.send_signal(signal.SIGCONT)
    admin.execute("INSERT INTO signals VALUES ('go on')")
    assert zombie.stdout
    lines = iter(zombie.stdout.readline, "")
    assert any(f"saga_id={saga_id}" in line and "outcome=lost" in line for line in lines)
    zombie.terminate()
    assert zombie.wait(60) == 0
    assert await storage.get_saga(saga_id) == saga
    assert await storage.get_step_history(saga_id) == history
    assert [entry.details for entry in history] == [None, "by the other"]


@pytest.fixture
def engine(make_engine: Callable[[str], AsyncEngine]) -> AsyncEngine:
    return make_engine("asyncpg")


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2024, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


class TestWorker:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def storage(self, clock: Clock) -> MemorySagaStorage:
        return MemorySagaStorage(MemoryDatabase(clock=clock))

    async def test_a_poisoned_saga_keeps_nobody_waiting(self, storage: MemorySagaStorage, clock: Clock) -> None:
        """It is tried max_attempts times with growing pauses; 100 healthy ones are recovered at the first poll."""
        poisoned = uuid4()
        await storage.create_saga(poisoned, "order", {})
        for _ in range(100):
            await storage.create_saga(uuid4(), "order", {"customer": "alice"})
        tried: list[datetime] = []

        async def recover(run: SagaRun) -> None:
            if run.saga_id == poisoned:
                tried.append(clock.now)
            _, context = await run.load_saga_state(run.saga_id)
            await run.update_context(run.saga_id, {"customer": context["customer"].title()})
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)
            await run.commit()

        worker = RecoveryWorker(
            storage, {"order": recover}, concurrency=101, stale_after=timedelta(minutes=1), backoff=timedelta(minutes=1)
        )
        clock.now += timedelta(minutes=1)
        assert await worker.poll() == 101
        assert [saga.id for saga in await storage.find_stale_sagas(stale_after=NOW)] == [poisoned]
        for _ in range(120):
            clock.now += timedelta(minutes=1)
            await worker.poll()
        pauses = [(later - earlier).seconds // 60 for earlier, later in pairwise(tried)]
        assert pauses == [1 + 1, 1 + 3, 1 + 7, 1 + 15]
        [exhausted] = await storage.find_exhausted_sagas()
        assert (exhausted.id, exhausted.recovery_attempts, exhausted.status) == (poisoned, 5, SagaStatus.PENDING)

    async def test_stopping_lets_handlers_finish(self, storage: MemorySagaStorage) -> None:
        """After stop() nothing more is claimed, and what is at work is seen through."""
        first, second = uuid4(), uuid4()
        for saga_id in (first, second):
            await storage.create_saga(saga_id, "order", {})

        async def recover(run: SagaRun) -> None:
            worker.stop()
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)
            await run.commit()

        worker = RecoveryWorker(storage, {"order": recover}, concurrency=1, stale_after=NOW)
        await worker.run()
        statuses = {(await storage.get_saga(saga_id)).status for saga_id in (first, second)}
        assert statuses == {SagaStatus.COMPLETED, SagaStatus.PENDING}

    async def test_stopping_releases_what_cant_finish(
        self, storage: MemorySagaStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After the grace a handler is cancelled, and its saga is free for the next worker."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})

        async def recover(run: SagaRun) -> None:
            worker.stop()
            await asyncio.Event().wait()
            await run.commit()

        worker = RecoveryWorker(storage, {"order": recover}, stale_after=NOW, grace=NOW)
        caplog.set_level("INFO", "saga_store.recovery")
        await worker.run()
        assert (await storage.get_saga(saga_id)).lease_owner is None
        assert re.search(rf"owner=\S+ saga_id={saga_id} saga_name=order attempt=1 outcome=released", caplog.text)

    async def test_a_saga_is_taken_at_once(self, storage: MemorySagaStorage, caplog: pytest.LogCaptureFixture) -> None:
        """It is worked on under the worker's lease, without a claim and an attempt; its outcome is logged."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        owners = []

        async def recover(run: SagaRun) -> None:
            owners.append((await storage.get_saga(run.saga_id)).lease_owner)
            worker.stop()
            await one_turn()
            await finish(run)

        worker = RecoveryWorker(storage, {"order": recover}, stale_after=HOUR)
        caplog.set_level("INFO", "saga_store.recovery")
        assert await worker.take(saga_id)
        assert not await worker.take(saga_id)  # it is at it already
        await worker.run()  # stopped by the handler, it waits for it
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.recovery_attempts, owners) == (SagaStatus.COMPLETED, 0, [worker.owner])
        assert [record.outcome for record in of_worker(caplog)] == ["recovered"]
        assert not await worker.take(saga_id)

    async def test_there_has_to_be_room_for_what_is_taken(self, storage: MemorySagaStorage) -> None:
        """With ``concurrency`` sagas at work, or once it is stopped, a worker takes none; they wait to be claimed."""
        first, second = uuid4(), uuid4()
        for saga_id in (first, second):
            await storage.create_saga(saga_id, "order", {})
        worker = RecoveryWorker(storage, {"order": hang}, concurrency=1, stale_after=HOUR, grace=NOW)
        running = asyncio.create_task(worker.run())
        assert await worker.take(first)
        assert not await worker.take(second)
        worker.stop()
        await running
        assert not await worker.take(second)
        for saga_id in (first, second):
            saga = await storage.get_saga(saga_id)
            assert (saga.status, saga.recovery_attempts, saga.lease_owner) == (SagaStatus.PENDING, 0, None)

    async def test_a_worker_in_the_background(self, storage: MemorySagaStorage) -> None:
        """It works while the block goes on; leaving it, be it by an exception, waits for what is at work."""
        claimed, taken = uuid4(), uuid4()
        await storage.create_saga(claimed, "order", {})

        async def recover(run: SagaRun) -> None:
            await asyncio.sleep(0.01)
            await finish(run)

        async def serve() -> None:
            async with RecoveryWorker(storage, {"order": recover}, stale_after=NOW) as worker:
                assert (await storage.wait_for_saga(claimed, HOUR)).status is SagaStatus.COMPLETED
                await storage.create_saga(taken, "order", {})
                assert await worker.take(taken)
                raise KeyError

        with pytest.raises(KeyError):
            await serve()
        saga = await storage.get_saga(taken)
        assert (saga.status, saga.lease_owner) == (SagaStatus.COMPLETED, None)

    async def test_what_somebody_else_holds_isnt_taken(
        self, storage: MemorySagaStorage, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its holder goes on, and nothing is logged; once the lease has expired, it is taken."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        worker = RecoveryWorker(storage, {"order": finish}, stale_after=HOUR)
        async with storage.run(saga_id, owner="somebody else", lease=HOUR):
            assert not await worker.take(saga_id)
            await worker.poll()
            assert (await storage.get_saga(saga_id)).status is SagaStatus.PENDING
            assert of_worker(caplog) == []
            clock.now += 2 * HOUR
            assert await worker.take(saga_id)
            await worker.poll()
        assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED

    async def test_what_cant_be_taken(self, storage: MemorySagaStorage) -> None:
        """Neither a saga that isn't there, nor one that no handler is for."""
        worker = RecoveryWorker(storage, {"order": finish})
        saga_id = uuid4()
        with pytest.raises(SagaNotFoundError):
            await worker.take(saga_id)
        await storage.create_saga(saga_id, "refund", {})
        with pytest.raises(InvalidSagaDataError, match="a handler for: order, not 'refund'"):
            await worker.take(saga_id)

    async def test_what_was_stopped_before_claims_nothing(self, storage: MemorySagaStorage) -> None:
        """Whether it was stopped before it ran, or by a block that raises at once; nor does it wait for anything."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})

        async def serve() -> None:
            async with RecoveryWorker(storage, {"order": hang}, stale_after=NOW):
                raise KeyError

        worker = RecoveryWorker(storage, {"order": hang}, stale_after=NOW)
        worker.stop()
        async with asyncio.timeout(5):
            await worker.run()
            with pytest.raises(KeyError):
                await serve()
        assert (await storage.get_saga(saga_id)).version == 1

    async def test_a_stop_ends_a_round_of_claims(self, clock: Clock) -> None:
        """A worker that is stopped while it claims doesn't go on to its other names."""
        claims = 0

        class Stops(MemorySagaStorage):
            async def claim_sagas(self, **rest: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
                nonlocal claims
                claims += 1
                worker.stop()
                return await super().claim_sagas(**rest)

        storage = Stops(MemoryDatabase(clock=clock))
        worker = RecoveryWorker(storage, {"order": finish, "refund": finish}, stale_after=NOW)
        await worker.run()
        assert claims == 1

    @pytest.mark.parametrize("is_cancelled", [False, True])
    def test_a_worker_runs_once(self, storage: MemorySagaStorage, is_cancelled: bool) -> None:  # noqa: FBT001 - a parameter
        """Whoever runs it once more, be it in another loop, is told to make another one; it takes nothing any more."""
        worker = RecoveryWorker(storage, {"order": finish}, stale_after=NOW)

        async def run_once() -> None:
            running = asyncio.create_task(worker.run())
            await one_turn()
            with pytest.raises(InvalidSagaDataError, match="make another RecoveryWorker"):
                await worker.run()
            if is_cancelled:
                running.cancel()
            else:
                worker.stop()
            await asyncio.wait([running])

        async def run_again() -> None:
            for again in (worker.run, worker.__aenter__, worker.poll):
                with pytest.raises(InvalidSagaDataError, match="make another RecoveryWorker"):
                    await again()
            saga_id = uuid4()
            await storage.create_saga(saga_id, "order", {})
            assert not await worker.take(saga_id)

        asyncio.run(run_once())
        asyncio.run(run_again())

    async def test_what_is_taken_while_a_claim_is_under_way(
        self, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It has to wait for it: together they are never more than ``concurrency``, and no look is lost."""
        storage = SlowToClaim(MemoryDatabase(clock=clock))
        saga_ids = [uuid4() for _ in range(12)]
        for saga_id in saga_ids:
            await storage.create_saga(saga_id, "order", {})
        at_work, most = 0, 0

        async def recover(run: SagaRun) -> None:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.01 * saga_ids.index(run.saga_id))
            at_work -= 1
            await finish(run)

        worker = RecoveryWorker(storage, {"order": recover}, concurrency=3, stale_after=NOW, poll_every=HOUR)
        async with asyncio.timeout(30), worker:
            await storage.is_claiming.wait()
            assert [await worker.take(saga_id) for saga_id in saga_ids[-3:]] == [False] * 3
            for saga_id in saga_ids:
                await storage.wait_for_saga(saga_id, HOUR)
        assert most == 3
        assert not [record for record in of_worker(caplog) if record.levelno > logging.INFO]

    async def test_a_claim_that_finds_nothing_keeps_nobody_from_taking(self, clock: Clock) -> None:
        storage = SlowToClaim(MemoryDatabase(clock=clock))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        async with RecoveryWorker(storage, {"order": finish}, stale_after=HOUR, concurrency=1) as worker:
            await storage.is_claiming.wait()
            assert await worker.take(saga_id)
        assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED

    @pytest.mark.parametrize("is_entered", [False, True])
    @pytest.mark.parametrize("is_stopped", [False, True])
    async def test_what_is_taken_and_then_claimed(
        self,
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
        is_entered: bool,  # noqa: FBT001 - a parameter
        is_stopped: bool,  # noqa: FBT001 - a parameter
    ) -> None:
        """A claim that comes before the lease of what was taken is this worker's, too: the handler goes on under it."""
        has_claimed, may_answer, may_enter = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Overtakes(MemorySagaStorage):
            async def claim_sagas(self, **rest: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
                claimed = await super().claim_sagas(**rest)
                has_claimed.set()
                await may_answer.wait()
                return claimed

            async def _write(self, write: Write) -> int:
                if write.lease and write.lease.owner:
                    await may_enter.wait()
                return await super()._write(write)

        storage = Overtakes(MemoryDatabase(clock=clock))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def recover(run: SagaRun) -> None:
            begun.set()
            await may_end.wait()
            await finish(run)

        worker = RecoveryWorker(storage, {"order": recover}, stale_after=NOW)
        caplog.set_level("INFO", "saga_store.recovery")
        assert await worker.take(saga_id)
        polling = asyncio.create_task(worker.poll())
        async with asyncio.timeout(30):
            await has_claimed.wait()
            if is_entered:
                may_enter.set()
                await begun.wait()
            may_answer.set()
            await asyncio.sleep(0.01)
            may_enter.set()
            await begun.wait()
            if is_stopped:
                polling.cancel()
            may_end.set()
            await asyncio.wait([polling])
        assert [record.outcome for record in of_worker(caplog)] == ["released" if is_stopped else "recovered"]
        saga = await storage.get_saga(saga_id)
        status, attempts = (SagaStatus.PENDING, 0) if is_stopped else (SagaStatus.COMPLETED, 1)
        assert (saga.status, saga.recovery_attempts, saga.lease_owner) == (status, attempts, None)

    async def test_a_claim_that_never_answers_keeps_nobody_waiting(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever takes meanwhile is told that there is no room; the saga waits to be claimed."""
        monkeypatch.setattr("saga_store.recovery._MOST_SECONDS_FOR_A_CLAIM", 0.05)

        class Hangs(MemorySagaStorage):
            async def claim_sagas(self, **_: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
                await asyncio.Event().wait()
                return []

        storage = Hangs(MemoryDatabase(clock=clock))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        worker = RecoveryWorker(storage, {"order": finish})
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            await one_turn()
            assert not await worker.take(saga_id)
            running.cancel()
            await asyncio.wait([running])

    async def test_only_handled_names_are_claimed(self, storage: MemorySagaStorage) -> None:
        """Each saga goes to the handler of its name; one that has none is left alone."""
        seen: dict[UUID, str] = {}

        def handler(name: str) -> Callable[[SagaRun], object]:
            async def recover(run: SagaRun) -> None:
                seen[run.saga_id] = name
                await run.update_status(run.saga_id, SagaStatus.COMPLETED)
                await run.commit()

            return recover

        names = {uuid4(): name for name in ("order", "refund", "other")}
        for saga_id, name in names.items():
            await storage.create_saga(saga_id, name, {})
        handlers = {name: handler(name) for name in ("order", "refund")}
        assert await RecoveryWorker(storage, handlers, stale_after=NOW).poll() == 2  # type: ignore[arg-type] # coroutines
        assert seen == {saga_id: name for saga_id, name in names.items() if name != "other"}

    async def test_a_stop_gives_the_attempt_back(self, storage: MemorySagaStorage, clock: Clock) -> None:
        """However often a worker is stopped in the middle of a healthy saga, its attempts aren't used up."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        for _ in range(7):
            clock.now += HOUR
            worker = stopping_worker(storage)
            await worker.run()
        saga = await storage.get_saga(saga_id)
        assert (saga.recovery_attempts, saga.lease_owner, saga.status) == (0, None, SagaStatus.PENDING)

    @pytest.mark.parametrize("turns", range(12))
    async def test_a_cancelled_worker_gives_the_attempt_back(self, storage: MemorySagaStorage, turns: int) -> None:
        """Cancelled at any moment from the claim on, again and again, it leaves no lease and no attempt behind."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        worker = RecoveryWorker(storage, {"order": hang}, stale_after=NOW)
        running = asyncio.create_task(worker.run())
        for _ in range(turns):
            await one_turn()
        for _ in range(3):
            running.cancel()
            await one_turn()
        await asyncio.wait([running])
        saga = await storage.get_saga(saga_id)
        assert (saga.recovery_attempts, saga.lease_owner) == (0, None)

    async def test_what_isnt_finished_is_told(
        self, storage: MemorySagaStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A handler that returns leaves its saga finished, and otherwise that is a warning."""
        caplog.set_level("INFO", "saga_store.recovery")

        async def forget(run: SagaRun) -> None:
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)

        opened = storage._bind  # noqa: SLF001 - to open a session on it
        assert isinstance(opened, MemoryDatabase)

        async def settle_elsewhere(run: SagaRun) -> None:
            session = MemorySession(opened)
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)
            await run.commit(into=session)
            await session.commit()

        handlers = {"nothing": do_nothing, "forget": forget, "finish": finish, "elsewhere": settle_elsewhere}
        for name in handlers:
            await storage.create_saga(uuid4(), name, {})
        assert await RecoveryWorker(storage, handlers, stale_after=NOW).poll() == 4
        told = {(record.saga_name, record.outcome, record.levelname) for record in of_worker(caplog)}
        assert told == {
            ("nothing", "unfinished", "WARNING"),
            ("forget", "unfinished", "WARNING"),
            ("finish", "recovered", "INFO"),
            ("elsewhere", "recovered", "INFO"),
        }

    async def test_a_broken_lease_ends_the_handler(
        self, storage: MemorySagaStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """At the next renewal after its lease was broken a handler is cancelled, and that is no release."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})

        async def recover(run: SagaRun) -> None:
            await storage.break_lease(run.saga_id, by="alice", reason="it hangs")
            await hang(run)

        lease = timedelta(milliseconds=30)
        async with asyncio.timeout(30):
            await RecoveryWorker(storage, {"order": recover}, stale_after=NOW, lease=lease).poll()
        [record] = of_worker(caplog)
        assert (record.outcome, record.levelname) == ("lost", "WARNING")
        assert (await storage.get_saga(saga_id)).recovery_attempts == 1

    @pytest.mark.parametrize("workers", [1, 2])
    async def test_never_two_handlers_of_one_saga(
        self, storage: MemorySagaStorage, clock: Clock, workers: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A saga whose lease lapsed, and that the process claims again, is given back; its handler is cancelled."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        caplog.set_level("INFO", "saga_store.recovery")
        at_work, most = 0, 0

        async def recover(run: SagaRun) -> None:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            try:
                await hang(run)
            finally:
                await one_turn()  # it takes its time
                at_work -= 1

        first, *others = [RecoveryWorker(storage, {"order": recover}, stale_after=NOW) for _ in range(workers)]
        polls = [asyncio.create_task(first.poll())]
        while not at_work:
            await one_turn()
        clock.now += HOUR
        polls.append(asyncio.create_task((others or [first])[0].poll()))
        async with asyncio.timeout(30):
            await asyncio.gather(*polls)
        assert most == 1
        assert sorted(record.outcome for record in of_worker(caplog)) == ["lost", "released"]
        saga = await storage.get_saga(saga_id)
        assert (saga.recovery_attempts, saga.lease_owner) == (1, None)

    async def test_a_loss_in_a_group_is_a_loss(
        self, storage: MemorySagaStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In a TaskGroup, or as the cause of another error; but not if it was about another saga."""

        async def in_a_group(run: SagaRun) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(lose(run.saga_id))

        async def as_a_cause(run: SagaRun) -> None:
            try:
                await lose(run.saga_id)
            except SagaConcurrencyError as exc:
                raise RuntimeError from exc

        async def of_another(_: SagaRun) -> None:
            await lose(uuid4())

        handlers = {"group": in_a_group, "cause": as_a_cause, "another": of_another}
        for name in handlers:
            await storage.create_saga(uuid4(), name, {})
        await RecoveryWorker(storage, handlers, stale_after=NOW).poll()
        outcomes = {record.saga_name: record.outcome for record in of_worker(caplog)}
        assert outcomes == {"group": "lost", "cause": "lost", "another": "failed"}

    async def test_whatever_is_raised_it_goes_on(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """A storage that raises anything for one name keeps nobody of another name waiting."""

        class Trouble(MemorySagaStorage):
            async def claim_sagas(self, *, name: str | None = None, **rest: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
                if name == "refund":
                    raise ValueError("a row that can't be read")
                return await super().claim_sagas(name=name, **rest)

        storage = Trouble(MemoryDatabase(clock=clock))
        for name in ("order", "refund", "cancelled"):
            await storage.create_saga(uuid4(), name, {})

        async def cancel_itself(_: SagaRun) -> None:
            raise asyncio.CancelledError

        worker = RecoveryWorker(
            storage, {"order": finish, "refund": finish, "cancelled": cancel_itself}, stale_after=NOW
        )
        caplog.set_level("INFO", "saga_store.recovery")
        assert await worker.poll() == 2
        outcomes = {record.saga_name: record.outcome for record in of_worker(caplog) if hasattr(record, "outcome")}
        assert outcomes == {"order": "recovered", "cancelled": "failed"}
        assert "a row that can't be read" in caplog.text

    async def test_what_the_driver_cancels_is_tried_again(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """Neither a claim nor the renewal of a lease ends with it: nobody has cancelled the worker."""
        left = Counter(claim=1, renewal=1)
        is_renewed = asyncio.Event()

        class Cancels(MemorySagaStorage):
            async def claim_sagas(self, **rest: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
                cancel_once("claim")
                return await super().claim_sagas(**rest)

            async def _write(self, write: Write) -> int:
                if write.lease and write.lease.renews and not write.steps and not write.status:
                    cancel_once("renewal")
                    is_renewed.set()
                return await super()._write(write)

        def cancel_once(what: str) -> None:
            left[what] -= 1
            if left[what] == 0:
                raise asyncio.CancelledError

        async def recover(run: SagaRun) -> None:
            await is_renewed.wait()
            await finish(run)

        storage = Cancels(MemoryDatabase(clock=clock))
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {})
        soon = timedelta(milliseconds=30)
        worker = RecoveryWorker(storage, {"order": recover}, stale_after=NOW, lease=soon, poll_every=soon)
        async with asyncio.timeout(30), worker:
            await storage.wait_for_saga(saga_id, HOUR)
        assert "couldn't claim sagas, will try again: CancelledError" in caplog.text
        assert "couldn't be renewed: CancelledError" in caplog.text


class SlowToClaim(MemorySagaStorage):
    """A claim is committed at once, and its answer takes a while."""

    def __init__(self, bind: MemoryDatabase) -> None:
        super().__init__(bind)
        self.is_claiming = asyncio.Event()

    async def claim_sagas(self, **rest: Any) -> list[SagaExecution]:  # noqa: ANN401 - as it is
        self.is_claiming.set()
        claimed = await super().claim_sagas(**rest)
        await asyncio.sleep(0.02)
        return claimed


async def hang(_: SagaRun) -> None:
    await asyncio.Event().wait()


async def do_nothing(_: SagaRun) -> None:
    pass


async def finish(run: SagaRun) -> None:
    await run.update_status(run.saga_id, SagaStatus.COMPLETED)
    await run.commit()


async def lose(saga_id: UUID) -> None:
    raise SagaConcurrencyError(saga_id, 1, 2)


async def one_turn() -> None:
    await asyncio.sleep(0)


def of_worker(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.name == "saga_store.recovery"]


def stopping_worker(storage: MemorySagaStorage) -> RecoveryWorker:
    async def recover(run: SagaRun) -> None:
        worker.stop()
        await hang(run)

    worker = RecoveryWorker(storage, {"order": recover}, stale_after=NOW, grace=NOW)
    return worker


class CallableHandler:
    async def __call__(self, run: SagaRun) -> None:
        await finish(run)

    async def method(self, run: SagaRun) -> None:
        await finish(run)


async def with_options(run: SagaRun, _: str) -> None:
    await finish(run)


def calls(run: SagaRun) -> Awaitable[None]:
    return finish(run)


def in_a_thread(work: Callable[[SagaRun], None]) -> Handler:
    @wraps(work)
    async def in_thread(run: SagaRun) -> None:
        await asyncio.to_thread(work, run)
        await finish(run)

    return in_thread


def through_another(work: Callable[[SagaRun], None]) -> Handler:
    @wraps(work)
    def call(run: SagaRun) -> Awaitable[None]:
        return in_a_thread(work)(run)

    return call


class Decorated:
    """A decorator that is a class."""

    def __init__(self, work: Callable[[SagaRun], None]) -> None:
        update_wrapper(self, work)
        self._handler = in_a_thread(work)

    async def __call__(self, run: SagaRun) -> None:
        await self._handler(run)


def not_awaited(work: Handler) -> Callable[[SagaRun], None]:
    @wraps(work)
    def call(run: SagaRun) -> None:
        work(run)

    return call


def versioned(run: SagaRun) -> int | None:
    return run.version


def plain(_: SagaRun) -> None:
    pass


def yields(run: SagaRun) -> Iterator[SagaRun]:
    yield run


async def yields_too(run: SagaRun) -> AsyncIterator[SagaRun]:
    yield run


class TestSettings:
    @pytest.mark.parametrize(
        "handler",
        [
            finish,
            calls,
            lambda run: with_options(run, ""),
            partial(with_options, _=""),
            CallableHandler(),
            CallableHandler().method,
            in_a_thread(plain),
            through_another(plain),
            Decorated(plain),
            partial(in_a_thread(plain)),
        ],
    )
    async def test_handlers(self, handler: Handler) -> None:
        """Whatever returns something to await is a handler."""
        storage = MemorySagaStorage()
        await storage.create_saga(uuid4(), "order", {})
        assert await RecoveryWorker(storage, {"order": handler}, stale_after=NOW).poll() == 1
        assert await storage.find_stale_sagas(stale_after=NOW) == []

    @pytest.mark.parametrize(
        "handler",
        [
            plain,
            lambda _: None,
            print,
            SagaRun,
            None,
            "finish",
            finish.__name__,
            yields,
            yields_too,
            not_awaited(finish),
        ],
    )
    def test_no_handlers(self, handler: Any) -> None:  # noqa: ANN401 - that is the point
        """What plainly returns nothing to await is refused, and so is what can't be called."""
        with pytest.raises(InvalidSagaDataError, match="handlers"):
            RecoveryWorker(MemorySagaStorage(), {"order": handler})

    async def test_what_turns_out_to_be_none(self, caplog: pytest.LogCaptureFixture) -> None:
        """A handler whose result can't be awaited after all fails, and the error says so."""
        storage = MemorySagaStorage()
        await storage.create_saga(uuid4(), "order", {})
        worker = RecoveryWorker(storage, {"order": versioned}, stale_after=NOW)  # type: ignore[dict-item] # that is the point
        await worker.poll()
        assert "can't be awaited" in caplog.text
        assert "outcome=failed" in caplog.text

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("owner", ""),
            ("owner", "x" * 256),
            ("owner", 7),
            ("lease", timedelta(seconds=-1)),
            ("lease", NOW),
            ("lease", 30),
            ("stale_after", 5),
            ("stale_after", timedelta(seconds=-1)),
            ("concurrency", 0),
            ("concurrency", 1.5),
            ("poll_every", 5),
            ("poll_every", timedelta(seconds=-1)),
            ("grace", None),
            ("max_attempts", 0),
            ("backoff", 10),
            ("max_backoff", timedelta(seconds=-1)),
        ],
    )
    def test_bad_settings(self, argument: str, value: Any) -> None:  # noqa: ANN401 - that is the point
        """A setting that can't be meant is refused by its name."""
        with pytest.raises(InvalidSagaDataError, match=argument):
            RecoveryWorker(MemorySagaStorage(), {"order": finish}, **{argument: value})

    @pytest.mark.parametrize("handlers", [{}, [finish], None, {"": finish}, {7: finish}])
    def test_bad_handlers(self, handlers: Any) -> None:  # noqa: ANN401 - that is the point
        """Handlers go by names of sagas."""
        with pytest.raises(InvalidSagaDataError, match="handlers"):
            RecoveryWorker(MemorySagaStorage(), handlers)

    async def test_bad_storages(self, make_engine: Callable[[str], AsyncEngine]) -> None:
        """A storage that joins a transaction, or that has no claims, is refused."""
        async with AsyncSession(make_engine("asyncpg")) as session:
            for storage in (
                SqlAlchemySagaStorage(session),
                MemorySagaStorage(MemorySession(MemoryDatabase())),
                MemoryDatabase(),
            ):
                with pytest.raises(InvalidSagaDataError, match="storage"):
                    RecoveryWorker(storage, {"order": finish})  # type: ignore[arg-type] # that is the point
            with pytest.raises(InvalidSagaDataError, match="renew"):
                SqlAlchemySagaStorage(session).run(uuid4(), owner="me", lease=HOUR, renew=True)
