"""What a process of the service is made of, from DATABASE_URL to the worker; everything is closed at its end."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from examples.by_hand.runner import Saga
from examples.service.orders import NAME, ReserveGoods, Ship, TakePayment
from examples.service.outside import Bank, Carrier
from saga_store.recovery import RecoveryWorker
from saga_store.sqlalchemy import SqlAlchemySagaStorage

LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", "30"))
"""How long an order waits for another process after its own has died, and longer than any pause of a process."""


@dataclass(frozen=True)
class Service:
    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncSession]
    storage: SqlAlchemySagaStorage
    worker: RecoveryWorker


@asynccontextmanager
async def opened() -> AsyncIterator[Service]:
    engine = create_async_engine(os.environ["DATABASE_URL"])
    try:
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        storage = SqlAlchemySagaStorage(engine)
        order = Saga([ReserveGoods(), TakePayment(Bank(engine)), Ship(Carrier(engine))], sessions.begin)
        worker = RecoveryWorker(
            storage,
            {NAME: order.see_through},
            lease=timedelta(seconds=LEASE_SECONDS),
            stale_after=timedelta(seconds=LEASE_SECONDS / 5),  # short, since whoever works holds a lease
            poll_every=timedelta(seconds=LEASE_SECONDS / 5),
            backoff=timedelta(seconds=LEASE_SECONDS / 3),
            concurrency=20,
        )
        yield Service(engine, sessions, storage, worker)
    finally:
        await engine.dispose()
