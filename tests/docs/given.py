"""What the pages take for given: a shop's database with the sagas that they name, and Python's names."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import psycopg

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.recovery import RecoveryWorker
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.connections import engine_on
from tests.databases import Database
from tests.test_cqrs import OrderContext, OrderSaga, World, WorldContainer

IN_DOUBT = UUID("3f2a9c1d-0000-4000-8000-000000000001")
EXHAUSTED = UUID("82b94010-0000-4000-8000-000000000002")
FINISHED = UUID("9f4dfb4e-2f6a-4a53-8b53-0d7c1ad0c0de")


def elsewhere(folder: Path) -> Mapping[str, str]:
    """Return what stands in the pages for places that aren't here, and where they are in a test."""
    target = folder / "target"
    target.mkdir(exist_ok=True)
    return {"s3://backup/sagas": str(target), "/var/lib/node_exporter": str(folder)}


async def fill(database: Database) -> None:
    """Write the sagas that the pages name: one in doubt, one whose attempts are used up, one that finished long ago."""
    started = LogStep("TakePayment", "act", SagaStepStatus.STARTED)
    declined = LogStep("ChargeCard", "act", SagaStepStatus.FAILED, "card_declined")
    async with engine_on(database.url("asyncpg")) as engine:
        storage = SqlAlchemySagaStorage(engine)
        await storage.save(
            Checkpoint(IN_DOUBT, name="order", status=SagaStatus.RUNNING, steps=[started], recovery_attempts=1)
        )
        await storage.save(
            Checkpoint(
                EXHAUSTED, name="subscription-renewal", status=SagaStatus.RUNNING, steps=[declined], recovery_attempts=5
            )
        )
        await storage.save(Checkpoint(FINISHED, name="order", status=SagaStatus.FAILED, steps=[declined]))
    with psycopg.connect(database.url()) as connection:
        for saga_id, age in ((IN_DOUBT, "2 hours"), (EXHAUSTED, "2 hours"), (FINISHED, "400 days")):
            connection.execute(
                "UPDATE saga_executions SET created_at = created_at - %s::interval, "
                "updated_at = updated_at - %s::interval WHERE id = %s",
                [age, age, saga_id],
            )
            connection.execute(
                "UPDATE saga_logs SET created_at = created_at - %s::interval WHERE saga_id = %s", [age, saga_id]
            )


def hold(database: Database) -> None:
    """Have the worker that the runbook names hold the saga in doubt."""
    with psycopg.connect(database.url()) as connection:
        connection.execute(
            "UPDATE saga_executions SET lease_owner = 'worker-2b1d.eu-1 pid 977', "
            "lease_expires_at = now() + interval '1 hour' WHERE id = %s",
            [IN_DOUBT],
        )


@asynccontextmanager
async def names(page: str, database: Database) -> AsyncIterator[dict[str, object]]:
    async with engine_on(database.url("asyncpg")) as engine:
        yield {
            "__name__": "page",
            "engine": engine,
            "storage": SqlAlchemySagaStorage(engine),
            "saga_id": FINISHED if page == "docs/retention.md" else IN_DOUBT,
            "RecoveryWorker": RecoveryWorker,
            "url": database.url("psycopg"),
            "urls": [database.url("asyncpg")],
            "OrderSaga": OrderSaga,
            "OrderContext": OrderContext,
            "container": WorldContainer(World()),
        }
