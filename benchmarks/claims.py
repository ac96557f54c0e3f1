"""What a claim costs: among stale sagas alone, and among many finished ones."""

import asyncio
import time
from collections.abc import Sequence
from datetime import timedelta
from statistics import median

import psycopg

from benchmarks.ours import engine_on
from saga_store.sqlalchemy import SqlAlchemySagaStorage

STALE = 1000
CLAIMED = 100
CLAIMS = 8

_INSERT = (
    "INSERT INTO saga_executions (id, name, status, context, created_at, updated_at) "
    "SELECT gen_random_uuid(), 'order', %s, '{}', now() - interval '1 day', now() - interval '1 day' "
    "FROM generate_series(1, %s)"
)
_AFRESH = (
    "UPDATE saga_executions SET lease_owner = NULL, lease_expires_at = NULL, recovery_attempts = 0, "
    "updated_at = now() - interval '1 day' WHERE lease_owner IS NOT NULL"
)


def time_claims(url: str, *, finished: int) -> tuple[float, float]:
    """Return the median seconds of a claim of 100 among 1,000 stale sagas: with so many finished ones, and without."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_INSERT, ["RUNNING", STALE])
        connection.execute("VACUUM (ANALYZE) saga_executions")
        without = median(asyncio.run(_claim_all(url)))
        connection.execute(_AFRESH)
        connection.execute(_INSERT, ["COMPLETED", finished])
        connection.execute("VACUUM (ANALYZE) saga_executions")
        return median(asyncio.run(_claim_all(url))), without


async def _claim_all(url: str) -> Sequence[float]:
    """Claim nearly all of them, and return how long each claim but the first, which connects, took."""
    taken = []
    async with engine_on(url, connections=1) as engine:
        storage = SqlAlchemySagaStorage(engine)
        minute = timedelta(minutes=1)
        for _ in range(CLAIMS + 1):
            start = time.perf_counter()
            claimed = await storage.claim_sagas(owner="bench", lease=minute, limit=CLAIMED, stale_after=minute)
            taken.append(time.perf_counter() - start)
            if len(claimed) != CLAIMED:
                raise RuntimeError(f"claimed {len(claimed)} sagas, not {CLAIMED}")
    return taken[1:]
