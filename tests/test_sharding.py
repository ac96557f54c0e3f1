"""The contract kit on shards: memory twins, two databases of one server, and two servers, over both drivers."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga_store import MemoryDatabase, MemorySagaStorage, MemorySession
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing import (
    Age,
    CheckpointUnit,
    InspectionContract,
    JoinableFor,
    SettlementRaceContract,
)
from saga_store.testing.postgres import embedded
from tests.databases import Database, Databases
from tests.extent import WHOLE
from tests.test_contract import DRIVERS, JOINING_BINDS, CommittingContract, KeepingContract, make_older

MakeSharded: TypeAlias = Callable[[list[str]], ShardedSagaStorage]


class ShardedFixtures:
    @pytest.fixture
    def unit(self, sharded: ShardedSagaStorage) -> CheckpointUnit:
        return lambda: nullcontext(sharded)


class MemoryShards(ShardedFixtures):
    @pytest.fixture
    def shards(self) -> list[MemoryDatabase]:
        return [MemoryDatabase() for _ in range(3)]

    @pytest.fixture
    def sharded(self, shards: list[MemoryDatabase]) -> ShardedSagaStorage:
        return ShardedSagaStorage([MemorySagaStorage(shard) for shard in shards])

    @pytest.fixture
    def age(self, shards: list[MemoryDatabase], sharded: ShardedSagaStorage) -> Age:
        async def age(saga_id: UUID, by: timedelta) -> None:
            shards[sharded.shard_of(saga_id)].age(saga_id, by)

        return age

    @pytest.fixture
    def joinable_for(self, shards: list[MemoryDatabase], sharded: ShardedSagaStorage) -> JoinableFor:
        return lambda saga_id: MemorySession(shards[sharded.shard_of(saga_id)])


class TestMemoryShards(
    MemoryShards,
    CommittingContract,
    InspectionContract,
    SettlementRaceContract,
    KeepingContract,
): ...


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Databases]:
    """Databases on a second server."""
    with embedded() as server, psycopg.connect(server.url, autocommit=True) as admin:
        databases = Databases(server, admin)
        yield databases
        databases.drop_doomed()


@pytest.fixture(scope="session")
def template_elsewhere(elsewhere: Databases) -> Iterator[Database]:
    with elsewhere.migrated() as database:
        yield database


@pytest.fixture(scope="class")
def one_server(databases: Databases, template: Database) -> Iterator[list[Database]]:
    with databases.clone(template) as first, databases.clone(template) as second:
        yield [first, second]


@pytest.fixture(scope="class")
def two_servers(
    databases: Databases, template: Database, elsewhere: Databases, template_elsewhere: Database
) -> Iterator[list[Database]]:
    with databases.clone(template) as first, elsewhere.clone(template_elsewhere) as second:
        yield [first, second]


class PostgreSQLShards(ShardedFixtures):
    """Override ``shards`` and ``driver``."""

    @pytest.fixture
    async def engines(self, driver: str, shards: list[Database]) -> AsyncIterator[list[AsyncEngine]]:
        engines = [create_async_engine(shard.url(driver)) for shard in shards]
        yield engines
        for engine in engines:
            await engine.dispose()

    @pytest.fixture
    def sharded(self, engines: list[AsyncEngine]) -> ShardedSagaStorage:
        return ShardedSagaStorage([SqlAlchemySagaStorage(engine) for engine in engines])

    @pytest.fixture
    def age(self, engines: list[AsyncEngine], sharded: ShardedSagaStorage) -> Age:
        async def age(saga_id: UUID, by: timedelta) -> None:
            await make_older(engines[sharded.shard_of(saga_id)], saga_id, by)

        return age

    @pytest.fixture(params=JOINING_BINDS)
    def joinable_for(
        self, request: pytest.FixtureRequest, engines: list[AsyncEngine], sharded: ShardedSagaStorage
    ) -> JoinableFor:
        open_on = JOINING_BINDS[request.param]
        return lambda saga_id: open_on(engines[sharded.shard_of(saga_id)])


class OnOneServer(PostgreSQLShards):
    @pytest.fixture(params=DRIVERS if WHOLE else ["psycopg"])
    def driver(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def shards(self, one_server: list[Database]) -> list[Database]:
        return one_server


class OnTwoServers(PostgreSQLShards):
    @pytest.fixture(params=DRIVERS if WHOLE else ["asyncpg"])
    def driver(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def shards(self, two_servers: list[Database]) -> list[Database]:
        return two_servers


class TestOneServer(
    OnOneServer,
    CommittingContract,
): ...


class TestOneServerViews(OnOneServer, InspectionContract, SettlementRaceContract):
    """In databases without the contexts of other tests."""


class TestOneServerRetention(OnOneServer, KeepingContract):
    """Where no other test forgets stubs."""


class TestTwoServers(
    OnTwoServers,
    CommittingContract,
): ...


class TestTwoServersViews(OnTwoServers, InspectionContract, SettlementRaceContract):
    """Likewise."""


class TestTwoServersRetention(OnTwoServers, KeepingContract): ...
