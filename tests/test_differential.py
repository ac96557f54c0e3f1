"""Whatever is done to the twin and to PostgreSQL, over either driver and any bind, both answer the same."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from functools import partial

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage
from saga_store.testing.commit_into import Joinable
from saga_store.testing.differential import DifferentialContract, TransactionDifferentialContract
from saga_store.testing.lease import LeaseUnit
from saga_store.testing.transaction import Transactions
from tests.test_contract import JOINING_BINDS, OWNING_BINDS, PostgreSQLFixtures


class TestPostgreSQL(PostgreSQLFixtures, DifferentialContract):
    schedules = 6

    @pytest.fixture(params=[("engine", "connection"), ("sessionmaker", "session")], ids="-".join)
    def binds(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        """What the storage is bound to, and what its runs commit into."""
        owning, joining = request.param
        return owning, joining

    @pytest.fixture
    def unit(self, binds: tuple[str, str], engine: AsyncEngine) -> LeaseUnit:
        storage = SqlAlchemySagaStorage(OWNING_BINDS[binds[0]](engine))
        return lambda: nullcontext(storage)

    @pytest.fixture
    def joinable(self, binds: tuple[str, str], engine: AsyncEngine) -> Joinable:
        return partial(JOINING_BINDS[binds[1]], engine)


class TestPostgreSQLTransaction(PostgreSQLFixtures, TransactionDifferentialContract):
    schedules = 6

    @pytest.fixture(params=JOINING_BINDS)
    def transaction(self, request: pytest.FixtureRequest, engine: AsyncEngine) -> Transactions[SagaStorage]:
        @asynccontextmanager
        async def transaction() -> AsyncIterator[tuple[SagaStorage, AsyncSession | AsyncConnection]]:
            async with JOINING_BINDS[request.param](engine) as bind:
                yield SqlAlchemySagaStorage(bind), bind

        return transaction
