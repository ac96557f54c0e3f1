"""What the tests of archives have in common: storages, targets, and what goes wrong with them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saga_store import MemoryDatabase, MemorySagaStorage, SagaStorage
from saga_store.retention import Target
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.retention.faulty import Faults, faulty

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


@pytest.fixture(params=["memory", "asyncpg", "psycopg"])
def storage(request: pytest.FixtureRequest) -> SagaStorage:
    if request.param == "memory":
        return MemorySagaStorage(MemoryDatabase())
    make_engine: Callable[[str], AsyncEngine] = request.getfixturevalue("make_engine")
    return SqlAlchemySagaStorage(make_engine(request.param))


@pytest.fixture
def twin() -> MemorySagaStorage:
    return MemorySagaStorage(MemoryDatabase())


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(str(tmp_path))


@pytest.fixture
def faults() -> Iterator[Faults]:
    with faulty() as faults:
        yield faults
