"""What the processes of test_recovery.py run: claiming, recovering, and hanging in the middle of a step.

python -m tests.recovery_processes claim|recover|hang URL OWNER
"""

import asyncio
import logging
import sys
from datetime import timedelta
from functools import partial

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga_store import SagaRun, SagaStatus, SagaStepStatus
from saga_store.recovery import RecoveryWorker, run_until_signalled
from saga_store.sqlalchemy import SqlAlchemySagaStorage

# No lease ends by itself while a test runs, however slow the machine: the test ends those of the dead.
LEASE = timedelta(hours=1)
NOW = timedelta(0)

STEPS = ("reserve", "pay", "ship")

# What the steps do to the world. Who worked on a saga, from when until when, by the database's clock.
TABLES = """
CREATE TABLE effects (
    saga_id uuid, step text, attempt integer, owner text NOT NULL, PRIMARY KEY (saga_id, step, attempt)
);
CREATE TABLE work (
    saga_id uuid, attempt integer, owner text NOT NULL,
    begun timestamptz NOT NULL DEFAULT clock_timestamp(), seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (saga_id, attempt)
);
CREATE TABLE signals (name text PRIMARY KEY);
"""

BEGIN = text("INSERT INTO work (saga_id, attempt, owner) VALUES (:saga_id, :attempt, :owner)")
EFFECT = text("""
WITH seen AS (
    UPDATE work SET seen = clock_timestamp() WHERE saga_id = :saga_id AND attempt = :attempt
)
INSERT INTO effects (saga_id, step, attempt, owner) VALUES (:saga_id, :step, :attempt, :owner)
""")


class World:
    """What the steps act on, in this attempt to see one saga through."""

    def __init__(self, engine: AsyncEngine, run: SagaRun, owner: str, attempt: int) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._facts = {"saga_id": run.saga_id, "owner": owner, "attempt": attempt}

    async def begin(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(BEGIN, self._facts)

    async def change(self, step: str) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(EFFECT, self._facts | {"step": step})

    async def until_signalled(self) -> None:
        async with self._engine.connect() as connection:
            while not (await connection.execute(text("SELECT name FROM signals"))).all():
                await connection.execute(text("SELECT pg_sleep(0.02)"))


async def begin(engine: AsyncEngine, run: SagaRun, owner: str) -> World:
    attempt = (await SqlAlchemySagaStorage(engine).get_saga(run.saga_id)).recovery_attempts
    world = World(engine, run, owner, attempt)
    await world.begin()
    return world


async def see_through(engine: AsyncEngine, owner: str, run: SagaRun) -> None:
    """Do what is left of the steps, each written ahead; an order that can't be shipped is undone."""
    world = await begin(engine, run, owner)
    saga_id = run.saga_id
    status, context = await run.load_saga_state(saga_id)
    done = {
        (entry.step_name, entry.action)
        for entry in await run.get_step_history(saga_id)
        if entry.status is not SagaStepStatus.STARTED
    }
    for step in STEPS:
        if status is SagaStatus.COMPENSATING:
            break
        if (step, "act") not in done:
            await run.log_step(saga_id, step, "act", SagaStepStatus.STARTED)
            await world.change(step)
            if step == "ship" and context["unshippable"]:
                await run.log_step(saga_id, step, "act", SagaStepStatus.FAILED)
                status = SagaStatus.COMPENSATING
            else:
                await run.log_step(saga_id, step, "act", SagaStepStatus.COMPLETED)
                status = SagaStatus.RUNNING
            await run.update_status(saga_id, status)
            await run.commit()
    for step in ("pay", "reserve") if status is SagaStatus.COMPENSATING else ():
        if (step, "compensate") not in done:
            await run.log_step(saga_id, step, "compensate", SagaStepStatus.STARTED)
            await world.change(f"undo {step}")
            await run.log_step(saga_id, step, "compensate", SagaStepStatus.COMPENSATED)
            await run.commit()
    await run.update_status(saga_id, SagaStatus.FAILED if status is SagaStatus.COMPENSATING else SagaStatus.COMPLETED)
    await run.commit()


async def hang(engine: AsyncEngine, owner: str, run: SagaRun) -> None:
    """Act, and write that only when the test says so, whatever has happened meanwhile."""
    world = await begin(engine, run, owner)
    await run.log_step(run.saga_id, "pay", "act", SagaStepStatus.STARTED)
    await world.change("pay")
    await world.until_signalled()
    await run.log_step(run.saga_id, "pay", "act", SagaStepStatus.COMPLETED, "by the zombie")
    await run.update_status(run.saga_id, SagaStatus.FAILED)
    await run.commit()


async def claim(storage: SqlAlchemySagaStorage, owner: str) -> None:
    while claimed := await storage.claim_sagas(owner=owner, lease=LEASE, limit=100, stale_after=NOW):
        sys.stdout.writelines(f"{saga.id}\n" for saga in claimed)


async def main(what: str, url: str, owner: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    engine = create_async_engine(url, connect_args={"server_settings": {"application_name": owner}})
    storage = SqlAlchemySagaStorage(engine)
    if what == "claim":
        await claim(storage, owner)
    else:
        worker = RecoveryWorker(
            storage,
            {"order": partial(see_through if what == "recover" else hang, engine, owner)},
            owner=owner,
            lease=LEASE,
            stale_after=NOW,
            backoff=NOW,
            max_attempts=10_000,
            concurrency=5,
            poll_every=timedelta(milliseconds=50),
        )
        await run_until_signalled(worker)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
