"""A worker under a lease of its own that is in the middle of a step, for those who want to take its saga from it.

python -m tests.fenced_worker URL SAGA_ID: it says "started", waits for a line, and says what became of its commit.
"""

import asyncio
import sys
from datetime import timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import SagaConcurrencyError, SagaStatus, SagaStepStatus
from saga_store.sqlalchemy import SqlAlchemySagaStorage


async def main(url: str, saga_id: UUID) -> None:
    engine = create_async_engine(url)
    storage = SqlAlchemySagaStorage(engine)
    async with storage.run(saga_id, owner="worker-1", lease=timedelta(hours=1), write_ahead=True, renew=True) as run:
        await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        print("started", flush=True)  # noqa: T201 - whoever has started it listens
        await asyncio.to_thread(sys.stdin.readline)
        await run.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED, "by the worker")
        await run.update_status(saga_id, SagaStatus.COMPLETED)
        try:
            await run.commit()
        except SagaConcurrencyError:
            print("refused", flush=True)  # noqa: T201 - likewise
        else:
            print("written", flush=True)  # noqa: T201 - likewise
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], UUID(sys.argv[2])))
