"""The contract of a storage whose telemetry fails whenever it is told anything."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.testing import (
    Age,
    CheckpointContract,
    CheckpointUnit,
    ClaimContract,
    CommitIntoContract,
    Joinable,
    RunRaceContract,
    VersionRaceContract,
)
from tests.databases import Database, Databases
from tests.telemetries import Failing
from tests.test_contract import make_older


@pytest.fixture(scope="class")
def database(databases: Databases, template: Database) -> Iterator[Database]:
    """One for all of them, as in test_contract."""
    with databases.clone(template) as database:
        yield database


class TestFailing(CheckpointContract, VersionRaceContract, ClaimContract, RunRaceContract, CommitIntoContract):
    """It holds, to the last answer and error."""

    @pytest.fixture
    def engine(self, make_engine: Callable[[str], AsyncEngine]) -> AsyncEngine:
        return make_engine("asyncpg")

    @pytest.fixture(autouse=True)
    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some look at what a storage logs."""
        monkeypatch.setattr(logging.getLogger("saga_store.telemetry"), "disabled", True)

    @pytest.fixture
    def age(self, engine: AsyncEngine) -> Age:
        return partial(make_older, engine)

    @pytest.fixture
    def unit(self, engine: AsyncEngine) -> CheckpointUnit:
        storage = SqlAlchemySagaStorage(engine, telemetry=Failing())
        return lambda: nullcontext(storage)

    @pytest.fixture
    def joinable(self, engine: AsyncEngine) -> Joinable:
        return partial(AsyncEngine.connect, engine)
