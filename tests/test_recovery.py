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
- a commit beside an operator's verb: the row's lock decides; whoever comes second is refused by the version (the
  operator looks again).
"""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store import MemoryDatabase, MemorySagaStorage, SagaRun, SagaStatus, SagaStepStatus
from saga_store.recovery import RecoveryWorker
from saga_store.sqlalchemy import SqlAlchemySagaStorage
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
