"""The contract kit on memory and on PostgreSQL, over both drivers.

In full with an engine and with a connection; with a sessionmaker and a session the subjects in which these differ.
`make pgbouncer` runs it in full with all four.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from saga_store import ICheckpointStorage, InvalidSagaDataError, MemoryDatabase, MemorySagaStorage, MemorySession
from saga_store.sqlalchemy import SagaExecutionModel, SagaLogModel, SqlAlchemySagaStorage
from saga_store.testing import (
    BAD_INPUTS,
    Age,
    CheckpointContract,
    CheckpointStorageContract,
    CheckpointUnit,
    ClaimContract,
    CommitIntoContract,
    ConcurrencyContract,
    Contract,
    HistoryStreamContract,
    HoldContract,
    InspectionContract,
    InterventionContract,
    Joinable,
    JoinedWaitContract,
    LeaseContract,
    LeaseRaceContract,
    RecoveryStorageContract,
    RetentionContract,
    RetentionRaceContract,
    RunContract,
    RunRaceContract,
    SettlementRaceContract,
    StartContract,
    StubContract,
    TransactionContract,
    Transactions,
    VersionRaceContract,
    WaitContract,
)
from tests.databases import Database, Databases

DRIVERS = ("asyncpg", "psycopg")

OWNING_BINDS: dict[str, Callable[[AsyncEngine], AsyncEngine | async_sessionmaker[AsyncSession]]] = {
    "engine": lambda engine: engine,
    "sessionmaker": async_sessionmaker,
}

JOINING_BINDS: dict[str, Callable[[AsyncEngine], AbstractAsyncContextManager[AsyncSession | AsyncConnection]]] = {
    "session": AsyncSession,
    "connection": AsyncEngine.connect,
}

CountRows: TypeAlias = Callable[[], Awaitable[tuple[int, int]]]


class RowCountContract(Contract):
    async def test_bad_input_leaves_the_row_counts(self, storage: ICheckpointStorage, count_rows: CountRows) -> None:
        """After every bad input both tables have as many rows as before."""
        existing = uuid4()
        await storage.create_saga(existing, "order", {})
        before = await count_rows()
        for bad in BAD_INPUTS:
            with pytest.raises(InvalidSagaDataError):
                await bad.call(storage, existing, uuid4())
            assert await count_rows() == before, str(bad)


class CommittingContract(
    CheckpointStorageContract,
    RecoveryStorageContract,
    HistoryStreamContract,
    RunContract,
    StartContract,
    WaitContract,
    RunRaceContract,
    CommitIntoContract,
    LeaseContract,
    LeaseRaceContract,
):
    """What a storage keeps that commits each call, but for what needs tables of its own."""


class KeepingContract(HoldContract, StubContract, RetentionContract, RetentionRaceContract):
    """What it keeps that lets sagas go."""


class MemoryFixtures:
    @pytest.fixture
    def memory(self) -> MemoryDatabase:
        return MemoryDatabase()

    @pytest.fixture
    def count_rows(self, memory: MemoryDatabase) -> CountRows:
        async def count_rows() -> tuple[int, int]:
            return memory.count_rows()

        return count_rows

    @pytest.fixture
    def age(self, memory: MemoryDatabase) -> Age:
        async def age(saga_id: UUID, by: timedelta) -> None:
            memory.age(saga_id, by)

        return age


class TestMemory(
    MemoryFixtures,
    CommittingContract,
    RowCountContract,
    InspectionContract,
    SettlementRaceContract,
    KeepingContract,
):
    @pytest.fixture
    def unit(self, memory: MemoryDatabase) -> CheckpointUnit:
        storage = MemorySagaStorage(memory)
        return lambda: nullcontext(storage)

    @pytest.fixture
    def joinable(self, memory: MemoryDatabase) -> Joinable:
        return lambda: MemorySession(memory)


class TestMemoryTransaction(
    MemoryFixtures,
    TransactionContract,
    CheckpointStorageContract,
    RecoveryStorageContract,
    HistoryStreamContract,
    RunContract,
    StartContract,
    JoinedWaitContract,
    LeaseContract,
    RowCountContract,
    InspectionContract,
    HoldContract,
):
    @pytest.fixture
    def transaction(self, memory: MemoryDatabase) -> Transactions[ICheckpointStorage]:
        @asynccontextmanager
        async def transaction() -> AsyncIterator[tuple[ICheckpointStorage, MemorySession]]:
            async with MemorySession(memory) as session:
                yield MemorySagaStorage(session), session

        return transaction


async def make_older(engine: AsyncEngine, saga_id: UUID, by: timedelta) -> None:
    row = SagaExecutionModel
    async with engine.begin() as connection:
        await connection.execute(
            update(row)
            .where(row.id == saga_id)
            .values(updated_at=row.updated_at - by, lease_expires_at=row.lease_expires_at - by)
        )


class PostgreSQLFixtures:
    @pytest.fixture(params=DRIVERS)
    def engine(self, request: pytest.FixtureRequest, make_engine: Callable[[str], AsyncEngine]) -> AsyncEngine:
        return make_engine(request.param)

    @pytest.fixture
    def count_rows(self, engine: AsyncEngine) -> CountRows:
        async def count_rows() -> tuple[int, int]:
            sagas = select(func.count()).select_from(SagaExecutionModel).scalar_subquery()
            entries = select(func.count()).select_from(SagaLogModel).scalar_subquery()
            async with engine.connect() as connection:
                row = (await connection.execute(select(sagas, entries))).one()
            return row[0], row[1]

        return count_rows

    @pytest.fixture
    def age(self, engine: AsyncEngine) -> Age:
        return partial(make_older, engine)


@pytest.fixture(scope="class")
def database(databases: Databases, template: Database) -> Iterator[Database]:
    """One for all tests of a class, whose sagas have ids and names of their own: no contract needs an empty one."""
    with databases.clone(template) as database:
        yield database


def unit_of(bind: str, engine: AsyncEngine) -> CheckpointUnit:
    storage = SqlAlchemySagaStorage(OWNING_BINDS[bind](engine))
    return lambda: nullcontext(storage)


def transaction_of(bind: str, engine: AsyncEngine) -> Transactions[ICheckpointStorage]:
    @asynccontextmanager
    async def transaction() -> AsyncIterator[tuple[ICheckpointStorage, AsyncSession | AsyncConnection]]:
        async with JOINING_BINDS[bind](engine) as joined:
            yield SqlAlchemySagaStorage(joined), joined

    return transaction


class TestPostgreSQL(
    PostgreSQLFixtures,
    CommittingContract,
    RowCountContract,
):
    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        return unit_of("engine", engine)

    @pytest.fixture
    def joinable(self, engine: AsyncEngine) -> Joinable:
        return partial(JOINING_BINDS["connection"], engine)


class TestPostgreSQLViews(PostgreSQLFixtures, InspectionContract, SettlementRaceContract):
    """In a database without the contexts of other tests, which a search by context would have to go through."""

    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        return unit_of("engine", engine)


class TestPostgreSQLRetention(PostgreSQLFixtures, KeepingContract):
    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        return unit_of("engine", engine)


class TestPostgreSQLTransaction(
    PostgreSQLFixtures,
    TransactionContract,
    CheckpointStorageContract,
    RecoveryStorageContract,
    HistoryStreamContract,
    RunContract,
    StartContract,
    JoinedWaitContract,
    LeaseContract,
    RowCountContract,
    InspectionContract,
    HoldContract,
):
    @pytest.fixture
    def transaction(self, engine: AsyncEngine) -> Transactions[ICheckpointStorage]:
        return transaction_of("connection", engine)


class TestSessionmaker(
    PostgreSQLFixtures,
    CheckpointContract,
    ConcurrencyContract,
    VersionRaceContract,
    HistoryStreamContract,
    ClaimContract,
    InterventionContract,
    LeaseRaceContract,
    InspectionContract,
    SettlementRaceContract,
    RunRaceContract,
    StartContract,
    WaitContract,
    CommitIntoContract,
    StubContract,
    RetentionRaceContract,
):
    """What goes another way than with an engine: each kind of statement, where it is routed, alone and in a crowd."""

    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        return unit_of("sessionmaker", engine)

    @pytest.fixture
    def joinable(self, engine: AsyncEngine) -> Joinable:
        return partial(JOINING_BINDS["session"], engine)


class TestSession(
    PostgreSQLFixtures,
    TransactionContract,
    CheckpointContract,
    HistoryStreamContract,
    ClaimContract,
    InterventionContract,
    LeaseContract,
    StartContract,
    JoinedWaitContract,
    InspectionContract,
    HoldContract,
):
    """What goes another way than with a connection: each kind of statement, in a transaction that the session began."""

    @pytest.fixture
    def transaction(self, engine: AsyncEngine) -> Transactions[ICheckpointStorage]:
        return transaction_of("session", engine)
