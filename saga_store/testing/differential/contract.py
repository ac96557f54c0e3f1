"""The differential contract: whatever is done to a storage and to its twin in memory, both answer the same."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from saga_store.storage import SagaStorage
from saga_store.testing.claim import Age, AgingContract
from saga_store.testing.commit_into import Joinable
from saga_store.testing.differential.machine import Arena, DifferentialMachine, Tally
from saga_store.testing.differential.transactions import JoiningMachine, OwningMachine
from saga_store.testing.differential.world import Opener, Unit
from saga_store.testing.lease import LeaseUnit
from saga_store.testing.transaction import TransactionalContract, Transactions


async def find_difference(  # noqa: PLR0913 - how much to try, all keywords
    opener: Opener,
    age: Age,
    *,
    joins: bool,
    schedules: int,
    steps: int,
    start: int,
    shrink: bool = True,
    tally: Tally | None = None,
    joinable: Joinable | None = None,
) -> Tally:
    """Run schedules that are the same whenever they start from the same number, and compare each step.

    Args:
        opener: Opens a unit of the storage under test; several are open at the same time.
        age: Moves a saga of that storage back in time.
        joins: Whether each unit is a transaction of the caller's.
        schedules: How many to try.
        steps: How long each of them is.
        start: Where the choice of schedules starts.
        shrink: Whether to look for a shorter schedule once one is found.
        tally: Counts them, if the caller wants to know how far it has come.
        joinable: Opens a transaction that runs may commit into; for storages that commit each call by themselves.

    Returns:
        How much was tried, which is less than was asked for if a difference was found.

    Raises:
        AssertionError: The storage differs from its twin; the notes have the shortest schedule found.
    """
    arena = Arena(asyncio.get_running_loop(), opener, age, joins, tally=tally or Tally(), joinable=joinable)
    kind: type[DifferentialMachine] = JoiningMachine if joins else OwningMachine

    @seed(start)
    def machine() -> DifferentialMachine:
        return kind(arena)

    await asyncio.to_thread(
        run_state_machine_as_test,
        machine,  # type: ignore[arg-type] # anything that makes a machine, says its documentation
        settings=settings(
            max_examples=schedules,
            stateful_step_count=steps,
            phases=[Phase.generate, *[Phase.shrink] * shrink],
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return arena.tally


class _Budget:
    schedules: ClassVar[int] = 20
    """How many schedules are tried."""

    steps: ClassVar[int] = 50
    """How long each of them is."""

    start: ClassVar[int] = 0
    """Another number makes other schedules; the same one the same, whenever and wherever."""

    patience: ClassVar[timedelta] = timedelta(minutes=30)
    """How long all schedules together may take."""


class DifferentialContract(_Budget, AgingContract):
    """For storages built on ``SagaStorage`` that commit each call by themselves: override ``unit`` and ``age``."""

    @pytest.fixture
    def joinable(self) -> Joinable | None:
        """Override this if runs may commit into a caller's transaction: see ``CommitIntoContract``."""
        return None

    async def test_it_answers_as_its_twin(self, unit: LeaseUnit, age: Age, joinable: Joinable | None) -> None:
        """Whatever is done to the storage and to its twin in memory, both answer the same and store the same."""

        @asynccontextmanager
        async def opener() -> AsyncIterator[Unit]:
            async with unit() as storage:
                yield storage, None

        tried = await find_difference(
            opener,
            age,
            joins=False,
            schedules=self.schedules,
            steps=self.steps,
            start=self.start,
            joinable=joinable,
        )
        assert tried.schedules >= self.schedules


class TransactionDifferentialContract(_Budget, TransactionalContract, AgingContract):
    """For storages that join a transaction of the caller's: override ``transaction`` and ``age``."""

    async def test_its_transactions_answer_as_its_twins(self, transaction: Transactions[SagaStorage], age: Age) -> None:
        """Two transactions at a time, committed and rolled back in any order, answer and leave what the twin's do."""
        tried = await find_difference(
            transaction, age, joins=True, schedules=self.schedules, steps=self.steps, start=self.start
        )
        assert tried.schedules >= self.schedules
